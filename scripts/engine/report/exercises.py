"""Rows that are answered in words: questions, lines of poems, and open questions with a reference."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dataset.content import content_hash, language_of
from dataset.reading.bad_rows import BadRows
from dataset.reading.parse import JSON_TYPES
from dataset.reading.rows import Check, read_as
from dataset.tokenizer import PreTrainedTokenizerFast, encode

LABELS = ("split", "kind", "direction", "seen_in_pretrain")  # fields by which rows may be grouped


class Exercise(NamedTuple):
    """A question to be answered in words."""

    row: int  # of the file
    text: str  # of the question
    reference: str
    wanted: str | None  # what a right answer holds as words of its own; None: there is no right and wrong
    language: str
    labels: dict[str, str]
    couplet: str | None = None  # of a line of a poem, the same in either direction

    @property
    def complete(self) -> bool:
        """True if there is a question, and an answer to compare with."""
        return all(text is None or bool(text.strip()) for text in (self.text, self.reference, self.wanted))

    @property
    def key(self) -> str:
        texts = self.text, self.reference, self.wanted or "", self.language
        return key_of("\n".join([*texts, *self.labels.values()]))

    def item(self, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
        """The exercise in report.json."""
        return {
            "key": self.key,
            "lang": self.language,
            **self.labels,
            **({"couplet": self.couplet} if self.couplet else {}),
            "question": self.text,
            "reference": self.reference,
            **({} if self.wanted is None else {"wanted": self.wanted}),
            "reference_tokens": len(encode(tokenizer, self.reference)) + 1,
        }


def read_exercises(path: Path, form: str, bad: BadRows | None = None, check: Check = str) -> Iterator[Exercise]:
    """The exercises of a file of poems, questions or open questions; rows whose texts fail `check` are bad rows."""
    for number, exercise in read_as(path, partial(_exercise_of, form=form, check=check), bad=bad):
        yield exercise._replace(row=number)


def _exercise_of(row: dict[str, Any], form: str, check: Check) -> Exercise:
    reference = "reference" if form == "open" else "answer"
    fields = ["question", reference]
    fields += ["prompt"] if form == "poems" else []
    fields += ["final"] if "final" in row else []
    for name in fields:
        value = row.get(name)
        if not isinstance(value, str):
            kind = JSON_TYPES[type(value)] if name in row else "missing"
            raise ValueError(f'field "{name}" is {kind}, expected a text; correct the row')
        check(value)
    if form == "poems" and row.get("direction") not in ("forward", "backward"):
        raise ValueError(f'field "direction" is {row.get("direction")!r}, expected "forward" or "backward"')
    language = row.get("lang")
    if not isinstance(language, str):
        language = language_of(row["question"] + row[reference])
    wanted = None if form == "open" else row.get("final", row["answer"]).strip()
    couplet = key_of("\n".join(sorted((row["prompt"], row["answer"])))) if form == "poems" else None
    return Exercise(0, row["question"], row[reference], wanted, language, labels_of(row), couplet)


def whole_couplets(exercises: list[Exercise], kept: list[Exercise]) -> list[Exercise]:
    """`kept` without couplets of which only a part was kept: both directions or neither."""
    rows = {exercise.row for exercise in kept}
    cut = {exercise.couplet for exercise in exercises if exercise.couplet and exercise.row not in rows}
    return [exercise for exercise in kept if exercise.couplet not in cut]


def key_of(content: str) -> str:
    """Return the key that items are sorted by."""
    return f"{content_hash(content):016x}"


def labels_of(row: dict[str, Any]) -> dict[str, str]:
    return {name: str(row[name]) for name in LABELS if isinstance(row.get(name), str | bool)}
