"""Which texts of files a tokenizer is trained on: those of some sources, and a random sample of much text."""

import heapq
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from dataset.reading.bad_rows import BadRows
from dataset.reading.files import decoded, read_lines


class Sample(NamedTuple):
    """Texts in the order in which they came, and what they were drawn from; sizes are bytes of UTF-8."""

    texts: list[str]
    size: int
    num_seen: int
    size_seen: int

    def line(self) -> str:
        if self.size == self.size_seen:
            return f"{self.num_seen:,} documents, {self.size / 1e6:.1f} MB"
        documents = f"{len(self.texts):,} of {self.num_seen:,} documents"
        return f"a random sample of {documents}, {self.size / 1e6:.1f} MB of {self.size_seen / 1e6:.1f} MB"


def sample_texts(texts: Iterable[str], size: int, seed: int = 0) -> Sample:
    """Draw `size` bytes of text at random in one pass, in memory for these and the longest text; fewer bytes are all
    kept.

    1. Each text gets a random number.  2. Those with the smallest numbers are kept, as few as have `size` bytes.
    3. The one of them with the largest number is cut, so that it is `size` bytes.
    """
    draw = random.Random(seed)
    kept: list[tuple[float, int, str, int]] = []  # a heap, the largest number first: (-number, place, text, bytes)
    total = num_seen = size_seen = 0
    for num_seen, text in enumerate(texts, start=1):
        length = len(text.encode())
        heapq.heappush(kept, (-draw.random(), num_seen, text, length))
        total, size_seen = total + length, size_seen + length
        while total > size and total - kept[0][3] >= size:
            total -= heapq.heappop(kept)[3]
    if total > size:
        number, place, text, length = heapq.heappop(kept)
        text = text.encode()[: length - (total - size)].decode(errors="ignore")
        heapq.heappush(kept, (number, place, text, len(text.encode())))
    kept.sort(key=lambda entry: entry[1])
    return Sample([entry[2] for entry in kept], sum(entry[3] for entry in kept), num_seen, size_seen)


def texts_of_sources(documents: Iterable[str], labels: Path, weights: dict[str, int], bad: BadRows) -> Iterator[str]:
    """Yield the documents of the sources in `weights`, each as often as its weight says.

    labels: a file with one line per row, SOURCE or SOURCE/LANGUAGE. bad: the rows between the documents, which have
    labels, too. ValueError for a source without rows, or if there are not as many rows as labels.
    """
    # Interned, since there are few sources and many rows.
    sources = [sys.intern(decoded(line, number).partition("/")[0].strip()) for number, line in read_lines(labels)]
    if unknown := weights.keys() - set(sources):
        raise ValueError(f"{labels} has no row of {', '.join(sorted(unknown))} (--keep-sources)")
    used = 0
    for used, text in enumerate(documents, start=1):
        rows = used + bad.count
        if rows <= len(sources):
            yield from [text] * weights.get(sources[rows - 1], 0)
    rows = used + bad.count
    if rows != len(sources):
        raise ValueError(f"{labels} has {len(sources)} lines, but --data has {rows} rows; give one a row")
