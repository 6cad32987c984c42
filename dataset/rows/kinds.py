"""The kinds of rows, and which a file holds: the same for every command, each with its order of preference."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from dataset.reading.bad_rows import BadRows
from dataset.reading.files import data_files, is_plain_text
from dataset.reading.rows import read_rows
from dataset.rows.choice_formats import is_choice, question_of
from dataset.rows.exercise_formats import EXERCISES, exercise_of
from dataset.rows.exercise_formats import format_of as exercise_format_of
from dataset.rows.formats import is_conversation, messages_of
from dataset.rows.messages import EXPLANATIONS, Row, holds_text, require_used, text_in, without_null
from dataset.rows.pair_formats import is_pair, pair_of

FIRST_ROWS = 100  # by which the kind of rows is decided
WORDS = {
    "pairs": "pairs of replies",
    "choices": "multiple choice",
    "poems": "lines of poems",
    "open": "open questions",
    "questions": "questions with their answers",
    "chat": "conversations",
    "text": "documents",
}
TRAINERS = {
    "pairs": "scripts.train.train_dpo_minimind",
    "chat": "scripts.train.train_sft_minimind",
    "text": "scripts.train.train_pretrain",
}
# The first command that reads rows of each kind.
COMMANDS = {
    **TRAINERS,
    "choices": "scripts.eval.likelihood",
    **dict.fromkeys(("poems", "open", "questions"), "scripts.eval.report"),
}


def _is_exercise(row: Row, form: str) -> bool:
    found = exercise_format_of(row)
    return found is not None and found.form == form


FITS: dict[str, Callable[[Row], bool]] = {
    "pairs": is_pair,
    "choices": is_choice,
    **{form: partial(_is_exercise, form=form) for form in EXERCISES},
    "chat": is_conversation,
}
# What is made of a row of each kind but documents, and the texts in it.
CONTENTS: dict[str, tuple[Callable[[Row], Any], Callable[[Any], Sequence[str]]]] = {
    "pairs": (pair_of, lambda pair: pair.contents),
    "choices": (question_of, lambda question: [question.text, *question.choices]),
    **{form: (partial(exercise_of, form=form), lambda row: [row.text, row.reference]) for form in EXERCISES},
    "chat": (messages_of, lambda messages: [message["content"] for message in messages]),
}
ALONE = ("pairs", "choices", "poems")  # with a field unused, which would be a bad row of another kind


def kinds_of(row: Row, field: str = "text") -> list[str]:
    """The kinds that a row has the fields of, in the order of WORDS."""
    row = without_null(row)
    kinds = [kind for kind, fits in FITS.items() if fits(row)]
    alone = [kind for kind in kinds if kind in ALONE][:1]
    return [*(alone or kinds), *(["text"] if row.get(field) is not None else [])]


def kinds_of_rows(
    path: Path,
    known: Sequence[str],
    bad: BadRows,
    chosen: str = "auto",
    flag: str = "--eval-format",
    field: str = "text",
) -> list[str]:
    """The kinds, of those `known`, that most of the first rows of a file can be read as: the one that comes first in
    `known`, then the others. [] if no row is of a known kind. A kind `chosen` by `flag` stands alone; ValueError for a
    text file that has another one."""
    if is_plain_text(path):
        if chosen not in ("auto", "text"):
            raise ValueError(f"{flag} {chosen}: {path} is plain text and has no fields; expected rows")
        return ["text"]
    if chosen != "auto":
        return [chosen]
    kinds: Counter[tuple[str, ...]] = Counter()
    for row in _first_rows(path, bad):
        fitting = kinds_of(row, field)
        kinds[tuple(kind for kind in known if kind in fitting)] += 1
    firsts: Counter[str] = Counter()
    for fitting, count in kinds.items():
        firsts.update({kind: count for kind in fitting[:1]})
    if not firsts:
        return []
    kind = max(firsts, key=firsts.get)
    others = {other for fitting in kinds if fitting[:1] == (kind,) for other in fitting[1:]}
    return [kind, *(other for other in known if other in others)]


def _first_rows(path: Path, bad: BadRows) -> Iterator[Row]:
    return (row for _, row in islice(read_rows(path, bad=bad), FIRST_ROWS))


# -- what is said ------------------------------------------------------------------------------------------------------


def note_on_others(path: Path, kinds: Sequence[str], flag: str, field: str = "text") -> str:
    """A line on what else the rows of a file can be read as, "" if on nothing."""
    others = [f"{flag} {kind} reads {f'the field {field}' if kind == 'text' else WORDS[kind]}" for kind in kinds[1:]]
    return f"{path}: read as {WORDS[kinds[0]]}; {', '.join(others)}" if others else ""


def refuse_unknown(path: Path, known: Sequence[str]) -> NoReturn:
    """Raise ValueError with the fields of the first row of a file that is of none of the `known` kinds."""
    number, first = next(read_rows(path, bad=BadRows("skip")))
    kinds = ", ".join(f"{name} ({WORDS[name]})" for name in known)
    raise ValueError(
        f"{path}, row {number}: fields {', '.join(first) or 'none'} are of no known format; expected {kinds}"
    )


def note_on_unused(path: Path, field: str = "text") -> str:
    """A line on texts beside documents, by the first rows of a file; "" if there are none."""
    rows = () if is_plain_text(path) else _first_rows(path, BadRows("skip"))
    found = {name for row in rows for name in without_null(row) if name != field and not _is_used(row, name, field)}
    return f'{", ".join(sorted(found))} stands beside the field "{field}" and is not learnt' if found else ""


def _is_used(row: Row, name: str, field: str) -> bool:
    try:
        require_used({name: row[name]}, (), [str(row.get(field))], ())
    except ValueError:
        return False
    return True


def note_on_explanations(path: Path) -> str:
    """A line on texts beside questions that are not asked, by the first rows of a file; "" if there are none."""
    rows = () if is_plain_text(path) else _first_rows(path, BadRows("skip"))
    found = {name for row in rows for name in EXPLANATIONS if row.get(name)}
    return f"{path}: {', '.join(sorted(found))} stands beside the questions and is not asked" if found else ""


def notes_on_texts(path: Path, kind: str, field: str = "text") -> list[str]:
    """A line on every field that holds text in rows of a file, and without which these rows would be the same; one
    reading of the file."""
    if is_plain_text(path):
        return []
    use, texts_of = CONTENTS.get(kind, (partial(text_in, name=field), lambda text: [text]))
    rows, found = 0, Counter[str]()
    for row in _rows_of(path):
        with suppress(ValueError, KeyError):
            used = use(row)
            rows, texts = rows + 1, texts_of(used)
            found.update(name for name in row if holds_text(name, row[name], texts) and _same(use, row, name, used))
    return [f'field "{name}" holds text in {n:,} of {rows:,} rows and is not used' for name, n in found.most_common()]


def _rows_of(path: Path) -> Iterator[Row]:
    with suppress(ValueError):  # none is a row
        yield from (row for _, row in read_rows(path, bad=BadRows("skip")))


def _same(use: Callable[[Row], Any], row: Row, name: str, used: Any) -> bool:
    """Return whether a row without a field is used as with it."""
    with suppress(ValueError, KeyError):
        return use({other: value for other, value in row.items() if other != name}) == used
    return False


def note_on_kind(path: Path, kind: str, field: str = "text") -> str:
    """Words on what the first rows of a file are if it is not `kind`, and on the command that reads them; else ""."""
    with suppress(ValueError):
        found = kinds_of_rows(path, tuple(dict.fromkeys((kind, *COMMANDS))), BadRows("skip"), field=field)
        if found and found[0] != kind:
            return f"; the rows are {WORDS[found[0]]}, which {COMMANDS[found[0]]} reads"
    return ""


def note_on_training(path: Path | None, kind: str, field: str = "text") -> str:
    """A line on what training on rows of a kind leaves unused: a text beside conversations, or the reverse; else ""."""
    if path is None or is_plain_text(first_file := data_files(path)[0]):
        return ""
    first, *others = kinds_of_rows(first_file, (kind, *TRAINERS), BadRows("skip"), field=field) or [kind]
    other = next((other for other in others if other != kind), None)
    if first != kind:
        return ""
    if other is None:
        return note_on_unused(first_file, field) if kind == "text" else ""
    if other == "text":
        return f'the rows have a field "{field}", too, which is not learnt; {TRAINERS[other]} reads it'
    return f'only the field "{field}" is learnt; the rows are {WORDS[other]}, too, which {TRAINERS[other]} reads'
