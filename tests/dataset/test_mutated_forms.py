"""Rows of every form, damaged at random: all commands take the same ones, and nothing of a taken row is lost."""

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dataset.preferences import PreferenceData, PreferenceDataset
from dataset.reading.bad_rows import BadRows
from dataset.rows.choice_formats import answers_in, question_of, read_questions
from dataset.rows.exercise_formats import exercise_of, read_exercises
from dataset.rows.formats import messages_of, read_conversations
from dataset.rows.kinds import kinds_of
from dataset.rows.messages import EXPLANATIONS, GROUPS, METADATA, TOPICS, without_null
from dataset.rows.pair_formats import pair_of, read_pairs
from dataset.sft import SFTData, SFTDataset
from dataset.survey import Survey
from tests.dataset import test_formats, test_questions
from tests.dataset.test_mutated_rows import change_structure

ROWS = 40  # of each form
LABEL = re.compile(r"[\w.:/@+#=-]{0,64}", re.ASCII)
UNASKED = {*EXPLANATIONS, *GROUPS, *TOPICS}
PARTS = "the river 中文", "it is 7.5 long\nor so", "a small 🙂", "no, \\ 4"

FORMS: dict[str, list[Callable[[], dict]]] = {
    "chat": [lambda make=make: make(*PARTS[:2]) for make in test_formats.FORMS.values()]
    + [lambda row=row: row for row in test_formats.TOOL_FORMS.values()],
    "pairs": [lambda make=make: make(*PARTS[:3]) for make in test_formats.PAIRS.values()],
    "choices": [lambda make=make: make(PARTS[0], [*PARTS[1:3]], 1) for make in test_questions.FORMS.values()],
    "questions": [lambda make=make: make(*PARTS[:2]) for make in test_questions.EXERCISES.values()],
}


def contents_of(kind: str, part: Any) -> list[str]:
    if kind == "chat":
        return [message["content"] for message in part]
    return part.contents if kind == "pairs" else [part.text, *(part[1] if kind == "choices" else [part.reference])]


READ = {
    "chat": (messages_of, read_conversations),
    "pairs": (pair_of, read_pairs),
    "choices": (question_of, read_questions),
    "questions": (
        lambda row: exercise_of(row, "questions"),
        lambda path, bad: read_exercises(path, "questions", bad=bad),
    ),
}


def damaged(kind: str, draw: random.Random) -> list[dict]:
    rows = [{"question": "?", "choices": ["a", "b"], "answer": 0}]  # so answers count from 0; a bad row of other kinds
    for make in FORMS[kind]:
        for _ in range(ROWS):
            row = json.loads(json.dumps(make()))
            for _ in range(draw.choice([0, 1, 1, 2])):
                change_structure(row, draw)
            rows.append(row)
    return [row for row in rows if "@deep@" not in (text := repr(row)) and "@long@" not in text and "\\ud" not in text]


def strings(value: Any, unasked: set[str]) -> Iterator[str]:
    """The strings of a value without those under names that may be left out; a dialogue in one string by its turns."""
    if isinstance(value, str) and value[:1] not in ("[", "{"):
        yield from re.split(r"\n\n(?:Human|Assistant):|_", value)  # _: the blank of Winogrande
    elif isinstance(value, list):
        for item in value:
            yield from strings(item, unasked)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name not in unasked and not METADATA.fullmatch(name):
                yield from strings(item, unasked)


def lost(kind: str, row: dict, contents: list[str]) -> list[str]:
    """Texts of a row that are neither in its contents nor such as may be left out."""
    answers = {"choices": [*answers_in(row), "label"], "questions": ["answer", "final"]}.get(kind, ())
    unasked = {"text", *(UNASKED if answers else ()), *answers}
    joined = "\n".join(contents)
    return [text for text in strings(row, unasked) if not LABEL.fullmatch(text) and text.strip() not in joined]


@pytest.mark.parametrize("kind", FORMS)
def test_readers_agree_on_every_row_and_lose_nothing(kind, tmp_path, small):
    rows = damaged(kind, random.Random(kind))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    use, read = READ[kind]
    taken, faults = {}, {}
    for number, row in enumerate(rows, start=1):
        try:
            taken[number] = use(row)
        except ValueError as error:
            faults[number] = str(error)
        else:
            row = without_null(row)
            assert kind in kinds_of(row) or kind == "questions" and kinds_of(row)[:1] == ["poems"], row
            assert not lost(kind, row, contents_of(kind, taken[number])), row
    assert len(faults) > len(rows) / 8 and len(taken) > len(rows) / 4
    bad = BadRows("skip")
    found = dict(read(path, bad=bad))
    assert [contents_of(kind, part) for part in found.values()] == [contents_of(kind, part) for part in taken.values()]
    assert found.keys() == taken.keys() and bad.count == len(faults)
    survey = Survey([path], kind, small, 64).result
    assert (survey["used_rows"], survey["bad_rows"]) == (len(taken), len(faults))
    assert count_in_training(kind, path, tmp_path / "cache", small) in (None, len(taken))


def count_in_training(kind: str, path: Path, cache: Path, small) -> int | None:
    config = {"data": path, "val_fraction": 0, "cache_dir": cache, "on_bad_row": "skip"}
    if kind == "chat":
        return SFTDataset(SFTData(**config), small, True, rows_per_step=1).meta["conversations"]
    if kind == "pairs":
        return PreferenceDataset(PreferenceData(**config), small, "full", 0).meta["pairs"]
    return None
