"""What a row of multiple choice is: a question, its choices and the right one, in one of several formats.

Each format is one entry of a table. To add one, list it in CHOICE_FORMATS. A text that stands beside it and would not
be asked makes a row bad, as in dataset/rows/formats.py; EXPLANATIONS of the answer may stand there, and are not asked.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dataset.content import language_of
from dataset.reading.bad_rows import BadRows
from dataset.reading.files import Observer
from dataset.reading.parse import JSON_TYPES
from dataset.reading.rows import Check, read_as, read_rows
from dataset.rows.formats import TEXT_FIELDS
from dataset.rows.messages import (
    EXPLANATIONS,
    GROUPS,
    TOPICS,
    Row,
    from_json,
    labels_of,
    read_array,
    require_used,
    text_in,
    without_null,
)

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ANSWER_FIELDS = ("answer", "Answer", "answerKey", "answer_key", "answer_idx", "answer_index")
LABEL_FIELDS = ("label", "correct", "correct_option", "correct_answer_num", "cop")  # the answer, if there is no other
PASSAGES = ("passage", "article", "context", "hint", "flores_passage")  # read before the question
RARE = 0.05  # chance of a file without any answer 0, below which its answers are taken to count from 1


class Question(NamedTuple):
    text: str
    choices: list[str]
    answer: int  # index of the right choice
    language: str
    labels: dict[str, str] = {}  # by which questions may be grouped

    @property
    def content(self) -> str:
        """The text that identifies the question among the rows of a file."""
        return "\n".join([self.text, *self.choices])


class Listed(NamedTuple):
    """A question as a row puts it."""

    text: str
    choices: list[Any]
    used: tuple[str, ...]  # the fields that this was read from
    labels: Sequence[str] = LETTERS


class ChoiceFormat(NamedTuple):
    fits: Callable[[Row], bool]
    listed: Callable[[Row], Listed]
    first: int = 0  # index of the first choice, where an answer is a number
    by_index: bool = False  # an answer of digits is an index, whatever the choices are


# -- formats -----------------------------------------------------------------------------------------------------------


def _first_of(row: Row, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in row), None)


def _after_passages(row: Row, question: str) -> tuple[str, tuple[str, ...]]:
    """The text in the field `question` after the passages beside it, and the names of all these fields."""
    names = (*(name for name in PASSAGES if row.get(name, "") != ""), question)
    return "\n".join(text_in(row, name) for name in names), names


def _has(questions: Sequence[str], *others: str) -> Callable[[Row], bool]:
    return lambda row: _first_of(row, questions) is not None and all(name in row for name in others)


def _texts_and_labels(value: Any, name: str) -> tuple[list[Any], Sequence[str]]:
    """Choices as an array of texts or of {"label", "text"}, as {"text": [], "label": []} or as {label: text}; any of
    these may be a string of JSON."""
    value = from_json(value, name)
    if isinstance(value, list) and value and all(isinstance(choice, dict) for choice in value):
        for choice in value:
            require_used(choice, {"text", "label"}, (), TEXT_FIELDS)
        value = {key: [choice.get(key) for choice in value] for key in ("text", "label")}
    if isinstance(value, dict) and {"text", "label"} <= value.keys():
        texts, labels = value["text"], value["label"]
        if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
            raise ValueError(f'"text" and "label" of field "{name}" must be arrays of the same length')
        require_used(value, {"text", "label"}, (), TEXT_FIELDS)
        return texts, [*map(str, labels)]
    if isinstance(value, dict):
        return [*without_null(value).values()], [*without_null(value)]
    if not isinstance(value, list):
        raise ValueError(f'field "{name}" is {JSON_TYPES[type(value)]}, expected an array of choices')
    return value, LETTERS


QUESTION_FIELDS = ("question", "Question", "question_stem", "problem", "query", "instruction")


def _with_choices(row: Row, name: str) -> Listed:
    text, used = _after_passages(row, _first_of(row, QUESTION_FIELDS))
    choices, labels = _texts_and_labels(row[name], name)
    return Listed(text, choices, (*used, name), labels)


def _stem(row: Row) -> Listed:
    stem = row["question"]
    text, used = _after_passages(stem | {name: row[name] for name in PASSAGES if name in row}, "stem")
    choices, labels = _texts_and_labels(stem["choices"], "choices")
    require_used(stem, {"stem", "choices"}, (), TEXT_FIELDS)
    return Listed(text, choices, ("question", *used), labels)


def _columns(row: Row, names: Sequence[str], questions: Sequence[str]) -> Listed:
    """A choice in each column; the last of them may be empty."""
    text, used = _after_passages(row, _first_of(row, questions))
    names = [name for name in names if name in row]
    while len(names) > 1 and row[names[-1]] == "":
        used += (names.pop(),)
    labels = [name[-1].upper() for name in names] if names[0][-1].isalpha() else LETTERS
    return Listed(text, [row[name] for name in names], (*used, *names), labels)


def _endings(row: Row) -> Listed:
    """HellaSwag: the beginning is `ctx`, or else `ctx_a` and `ctx_b`, after the name of the activity."""
    beginning = ("ctx",) if "ctx" in row else ("ctx_a", "ctx_b")
    text = " ".join(text_in(row, name) for name in beginning if name in row)
    if row.get("activity_label"):
        text = f"{text_in(row, 'activity_label')}: {text}"
    return Listed(text, read_array(row["endings"], "endings"), (*beginning, "activity_label", "endings"))


def _blank(row: Row) -> Listed:
    """Winogrande: the text before the blank asks, and a choice goes on after it."""
    before, blank, after = text_in(row, "sentence").partition("_")
    if not blank or "_" in after:
        raise ValueError('field "sentence" needs one blank, written as _')
    names = ("option1", "option2")
    return Listed(before, [f"{text_in(row, name)}{after}" for name in names], ("sentence", *names))


def _in_columns(
    *names: str, questions: Sequence[str] = QUESTION_FIELDS, first: int = 0, by_index: bool = True
) -> ChoiceFormat:
    listed = partial(_columns, names=names, questions=questions)
    return ChoiceFormat(_has(questions, *names[:2]), listed, first, by_index)


CHOICE_FORMATS = {  # the first that fits
    "stem": ChoiceFormat(
        lambda row: isinstance(row.get("question"), dict) and {"stem", "choices"} <= row["question"].keys(), _stem
    ),
    "choices": ChoiceFormat(_has(QUESTION_FIELDS, "choices"), partial(_with_choices, name="choices")),
    "options": ChoiceFormat(_has(QUESTION_FIELDS, "options"), partial(_with_choices, name="options")),
    "columns": _in_columns(*LETTERS[:10], by_index=False),
    "opa": _in_columns("opa", "opb", "opc", "opd"),
    "option_a": _in_columns(*(f"option_{letter}" for letter in "abcdefgh"), by_index=False),
    "answerA": _in_columns("answerA", "answerB", "answerC", first=1),
    "answer0": _in_columns(*(f"answer{number}" for number in range(4))),
    "mc_answer1": _in_columns(*(f"mc_answer{number}" for number in range(1, 5)), first=1),
    "endings": ChoiceFormat(_has(("ctx", "ctx_a"), "endings"), _endings, by_index=True),
    "solutions": _in_columns("sol1", "sol2", questions=("goal",)),
    "blank": ChoiceFormat(_has(("sentence",), "option1", "option2"), _blank, first=1, by_index=True),
}


# -- a question --------------------------------------------------------------------------------------------------------


def format_of(row: Row) -> ChoiceFormat | None:
    """The first format that fits a row without null fields; None if there is none."""
    return next((form for form in CHOICE_FORMATS.values() if form.fits(row)), None)


def is_choice(row: Row) -> bool:
    """Return whether a row has the fields of a question with its choices."""
    return format_of(without_null(row)) is not None


def question_of(row: Row, check: Check = str) -> Question:
    """The question of a row; ValueError if it has none that can be asked, or if a text fails `check`."""
    row = without_null(row)
    form = format_of(row)
    if form is None:
        raise ValueError(
            "expected a question with its choices (choices, options, or A, B, C, D; other formats in "
            f"dataset/rows/choice_formats.py); fields present: {', '.join(row) or 'none'}"
        )
    text, choices, used, labels = form.listed(row)
    if len(choices) < 2:
        raise ValueError(f"expected at least 2 choices, found {len(choices)}")
    for number, choice in enumerate(choices, start=1):
        if not isinstance(choice, str) or not choice.strip():
            kind = "empty" if isinstance(choice, str) else JSON_TYPES[type(choice)]
            raise ValueError(f"choice {number} is {kind}, expected a text")
    if len(set(choices)) < len(choices):
        raise ValueError("two choices are the same, expected different ones")
    for part in (text, *choices):
        check(part)
    answers = answers_in(row)
    if not answers:
        raise ValueError(f'field "answer" is missing or empty; fields present: {", ".join(row)}')
    places = [_answer_of(_index(row[name], form.by_index), name, choices, labels, form.first) for name in answers]
    if len(set(places)) > 1:
        raise ValueError(f"fields {' and '.join(answers)} are two different answers; delete one of them")
    require_used(row, {*used, *answers, *EXPLANATIONS, *TOPICS, *GROUPS}, [text, *choices], TEXT_FIELDS)
    language = row.get("lang")
    if not isinstance(language, str):
        language = language_of("\n".join([text, *choices]))
    return Question(text, choices, places[0], language, labels_of(row))


def answers_in(row: Row) -> list[str]:
    """The fields that say which choice is right."""
    given = [name for name in (*ANSWER_FIELDS, *LABEL_FIELDS) if row.get(name, "") != ""]
    return [name for name in given if name in ANSWER_FIELDS] or given[:1]


def _index(answer: Any, by_index: bool) -> Any:
    return int(answer) if by_index and isinstance(answer, str) and answer.strip().isdecimal() else answer


def _answer_of(answer: Any, name: str, choices: list[str], labels: Sequence[str], first: int) -> int:
    """Index of the right choice, given as a number that is `first` for the first choice, a label or a choice's text."""
    expected = f"expected an index from {first} to {first + len(choices) - 1}, a letter or a choice's text"
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    labels = list(labels[: len(choices)])
    if isinstance(answer, int) and not isinstance(answer, bool):
        if str(answer) in labels:
            return labels.index(str(answer))
        if not 0 <= answer - first < len(choices):
            raise ValueError(f"{name} {answer} is out of range, {expected}")
        return answer - first
    if not isinstance(answer, str):
        raise ValueError(f"{name} is {JSON_TYPES[type(answer)]}, {expected}")
    places = {place for place, choice in enumerate(choices) if choice == answer}
    places |= {place for place, label in enumerate(labels) if label == answer}
    if not places:
        places |= {place for place, label in enumerate(labels) if label == answer.strip().strip("().").upper()}
    if not places and answer.isdecimal() and not _are_numbers(choices):
        return _answer_of(int(answer), name, choices, labels, first)
    if len(places) != 1:
        fault = "is one choice's letter and another's text" if places else "is none of the choices"
        raise ValueError(f'{name} "{answer}" {fault}; {expected}')
    return places.pop()


# -- rows of a file ----------------------------------------------------------------------------------------------------


def read_questions(
    path: Path, observe: Observer | None = None, bad: BadRows | None = None, check: Check = str
) -> Iterator[tuple[int, Question]]:
    """Yield (row number from 1, question) as `read_as`. ValueError if the answers of the file count from 1."""
    refuse_counting_from_one(path)
    yield from read_as(path, partial(question_of, check=check), observe, bad)


def refuse_counting_from_one(path: Path) -> None:
    """ValueError if answers that are numbers are never 0, and one is the number of choices, or they are too many for
    that to be chance."""
    chance, beyond = 1.0, None
    for number, row in read_rows(path, bad=BadRows("skip")):
        place, count = _index_in(without_null(row))
        if place == 0:
            return
        if place is not None and 0 < place <= count:
            chance *= 1 - 1 / count
            beyond = beyond or (number if place == count else None)
    if beyond or chance < RARE:
        why = f"none is 0, and that of row {beyond} is the number of its choices" if beyond else "none is 0"
        remedy = "count from 0, or give the letters or texts of the right choices"
        raise ValueError(f"{path}: the answers seem to count from 1, for {why}; {remedy}")


def _index_in(row: Row) -> tuple[int | None, int]:
    """The answer of a row if it is a number that should count from 0, and the number of choices."""
    form, answers = format_of(row), answers_in(row)
    if form is None or form.first or not answers:
        return None, 0
    try:
        listed = form.listed(row)
    except ValueError:
        return None, 0
    answer = _index(row[answers[0]], form.by_index)
    if isinstance(answer, str) and answer.isdecimal() and not _are_numbers(listed.choices):
        answer = int(answer)
    is_index = isinstance(answer, int) and not isinstance(answer, bool) and str(answer) not in listed.labels
    return answer if is_index else None, len(listed.choices)


def _are_numbers(choices: list[Any]) -> bool:
    return any(isinstance(choice, str) and choice.strip().isdecimal() for choice in choices)
