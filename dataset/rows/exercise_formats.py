"""What a row that is answered in words is: a question with the answer to compare with, in one of several formats.

Each format is one entry of a table; to add one, list it in EXERCISE_FORMATS. A text that stands beside it and would not
be asked makes a row bad, as in dataset/rows/formats.py; EXPLANATIONS of the answer may stand there.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dataset.content import content_hash, language_of
from dataset.reading.bad_rows import BadRows
from dataset.reading.files import Observer
from dataset.reading.parse import JSON_TYPES
from dataset.reading.rows import Check, read_as
from dataset.rows.formats import TEXT_FIELDS
from dataset.rows.messages import EXPLANATIONS, GROUPS, TOPICS, Row, labels_of, require_used, without_null

MATCH, WHOLE = "match", "whole"  # field and value of a row whose right answer has one form
FINAL = re.compile(r"^####([^\n]*\S)\s*\Z", re.MULTILINE)  # the last line of a worked answer, as in GSM8K


class ExerciseFormat(NamedTuple):
    form: str  # a key of EXERCISES
    fields: tuple[str, ...]  # question, answer to compare with, others that a row of this format has
    final: tuple[str, ...] = ()  # fields of what a right answer holds, the first that a row has


EXERCISE_FORMATS = (  # the first of which a row has all fields
    ExerciseFormat("poems", ("question", "answer", "prompt", "direction")),
    ExerciseFormat("open", ("question", "reference")),
    ExerciseFormat("questions", ("problem", "solution", "answer"), ("answer",)),  # MATH
    ExerciseFormat("questions", ("question", "answer"), ("final", "final_answer")),
    ExerciseFormat("questions", ("problem", "answer")),
)
EXERCISES = tuple(dict.fromkeys(form.form for form in EXERCISE_FORMATS))


class Exercise(NamedTuple):
    """A question to be answered in words."""

    row: int  # of the file
    text: str  # of the question
    reference: str
    wanted: str | None  # what a right answer holds as words of its own; None: there is no right and wrong
    language: str
    labels: dict[str, str]
    couplet: str | None = None  # of a line of a poem, the same in either direction
    whole: bool = False  # a right answer is `wanted` and nothing else

    @property
    def complete(self) -> bool:
        """True if there is a question, and an answer to compare with."""
        return all(text is None or bool(text.strip()) for text in (self.text, self.reference, self.wanted))

    @property
    def key(self) -> str:
        texts = self.text, self.reference, self.wanted or "", self.language
        return key_of("\n".join([*texts, *self.labels.values()]))


def format_of(row: Row, form: str | None = None) -> ExerciseFormat | None:
    """The first format, of those of `form`, of which a row has all fields; None if there is none."""
    candidates = [entry for entry in EXERCISE_FORMATS if form in (None, entry.form)]
    return next((entry for entry in candidates if all(row.get(name) is not None for name in entry.fields)), None)


def exercise_of(row: Row, form: str, check: Check = str) -> Exercise:
    """The exercise of a row; ValueError if it has none of this form, or if a text fails `check`.

    The wanted answer is that in a field of its own, or what follows #### at the end of a worked answer, or the answer
    as it is. The reference stays as the file has it.
    """
    row = without_null(row)
    known = [entry for entry in EXERCISE_FORMATS if entry.form == form]
    entry = format_of(row, form) or max(known, key=lambda entry: len(row.keys() & {*entry.fields}))
    finals = [name for name in entry.final if name in row][:1]
    for name in dict.fromkeys([*entry.fields, *finals]):
        if not isinstance(row.get(name), str):
            kind = JSON_TYPES[type(row[name])] if name in row else "missing"
            raise ValueError(f'field "{name}" is {kind}, expected a text; correct the row')
        check(row[name])
    if form == "poems" and row["direction"] not in ("forward", "backward"):
        raise ValueError(f'field "direction" is {row["direction"]!r}, expected "forward" or "backward"')
    question, reference = (row[name] for name in entry.fields[:2])
    used = {*entry.fields, *finals, *EXPLANATIONS, *TOPICS, *GROUPS}
    require_used(row, used, [question, reference], TEXT_FIELDS)
    language = row.get("lang")
    if not isinstance(language, str):
        language = language_of(question + reference)
    final = FINAL.search(reference)
    wanted = row[finals[0]] if finals else final[1] if final else reference
    couplet = key_of("\n".join(sorted((row["prompt"], reference)))) if form == "poems" else None
    wanted = None if form == "open" else wanted.strip()
    whole = row.get(MATCH) == WHOLE and wanted is not None
    return Exercise(0, question, reference, wanted, language, labels_of(row), couplet, whole)


def read_exercises(
    path: Path, form: str, observe: Observer | None = None, bad: BadRows | None = None, check: Check = str
) -> Iterator[tuple[int, Exercise]]:
    """Yield (row number from 1, exercise) as `read_as`; rows whose texts fail `check` are bad rows."""
    for number, exercise in read_as(path, lambda row: exercise_of(row, form, check), observe, bad):
        yield number, exercise._replace(row=number)


def key_of(content: str) -> str:
    """Return the key that items are sorted by."""
    return f"{content_hash(content):016x}"
