"""The kinds of rows of training data, and which kind a file holds: the same for every command."""

from collections import Counter
from itertools import islice
from pathlib import Path

from dataset.reading.bad_rows import BadRows
from dataset.reading.files import is_plain_text
from dataset.reading.rows import read_rows
from dataset.rows.formats import is_conversation
from dataset.rows.messages import Row
from dataset.rows.pair_formats import is_pair

FIRST_ROWS = 100  # by which the kind of rows is decided


def kinds_of(row: Row, field: str = "text") -> list[str]:
    """The kinds that a row has the fields of, the one that it is read as first: "pairs", "chat", "text"."""
    facts = {"pairs": is_pair(row), "chat": is_conversation(row), "text": row.get(field) is not None}
    facts["chat"] &= not facts["pairs"]  # a pair with one reply unused would be a bad row
    return [kind for kind, fits in facts.items() if fits]


def kinds_of_rows(path: Path, field: str, bad: BadRows) -> list[str]:
    """The kinds that most of the first rows of a file can be read as, that of most rows first."""
    if is_plain_text(path):
        return ["text"]
    kinds: Counter[tuple[str, ...]] = Counter()
    for _, row in islice(read_rows(path, bad=bad), FIRST_ROWS):
        if fitting := kinds_of(row, field):
            kinds[tuple(fitting)] += 1
    firsts = Counter()
    for fitting, count in kinds.items():
        firsts[fitting[0]] += count
    kind = max(firsts, key=firsts.get, default="text")
    others = {other for fitting in kinds if fitting[0] == kind for other in fitting[1:]}
    return [kind, *sorted(others)]
