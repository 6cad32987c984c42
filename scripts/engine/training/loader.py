"""Rows as the training loop asks for them, and their way to the device."""

import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
from torch import Tensor

LAST_ITEM = 5.0  # seconds that a thread is given to end


class Rows(Protocol):
    """Rows of a stage, which can be fetched by number as a batch of (B, L) tensors on the host."""

    seq_len: int  # the widest row
    real_token_share: float  # of all positions, those that are not padding

    def __len__(self) -> int: ...

    def order(self, seed: int, rows_per_step: int) -> Callable[[int, int], np.ndarray]:
        """Return (start, count) -> that stretch of the endless sequence in which a run with this seed asks for rows."""

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]: ...


class Dataset(Protocol):
    """The rows of a stage."""

    train: Rows
    validation: Rows
    meta: dict[str, Any]  # source, SHA-256 and counts, for checkpoints and log

    def describe(self) -> str: ...


class Ahead:
    """The items of an iterable, in order, made by a thread while the caller is busy with the ones before.

    A DataLoader with a worker would do the same, but start a process, which takes seconds. An exception in the making
    comes in the place of its item. The thread ends with the `with` statement.
    """

    def __init__(
        self, items: Iterable, depth: int = 2, patience: float = 60.0, between: Callable[[], None] | None = None
    ):
        """depth: items that may lie ready. patience: seconds of waiting before the first report of where the thread is;
        each further report takes twice as long. between() is called every second of waiting, and may raise."""
        self._items, self._ready, self._room = iter(items), queue.SimpleQueue(), threading.Semaphore(depth)
        self._closed, self._patience, self._between = False, patience, between
        self._thread = threading.Thread(target=self._make, name="data", daemon=True)

    def __enter__(self) -> "Ahead":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._room.release()
        self._thread.join(LAST_ITEM)  # one that hangs ends with the process

    def __iter__(self) -> "Ahead":
        return self

    def __next__(self) -> Any:
        item, error = self._wait()
        self._room.release()
        if error is not None:
            self._ready.put((None, error))  # for whoever asks again
            raise error
        return item

    def _wait(self) -> tuple[Any, BaseException | None]:
        start = time.monotonic()
        next_report = self._patience
        while True:
            try:
                return self._ready.get(timeout=min(1.0, self._patience))
            except queue.Empty:
                waited = time.monotonic() - start
            if self._between:
                self._between()
            if waited >= next_report:
                next_report *= 2
                self._report(waited)

    def _report(self, waited: float) -> None:
        """Say on stderr in which line the data thread is."""
        frame = sys._current_frames().get(self._thread.ident)
        place = "it has ended"
        if frame:
            line = traceback.extract_stack(frame)[-1]
            place = f"it is in {line.filename}, line {line.lineno} ({line.name})"
        print(f"no batch for {waited:.0f} s from the data thread; {place}; waiting on", file=sys.stderr, flush=True)

    def _make(self) -> None:
        try:
            while self._room.acquire() and not self._closed:
                self._ready.put((next(self._items), None))
        except BaseException as error:  # StopIteration among them
            self._ready.put((None, error))


def in_order(
    rows: Rows, batch_size: int, max_rows: int, rank: int = 0, size: int = 1
) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """Yield (number of the first row, number of rows that count, batch) over `max_rows` rows spread evenly.

    Each of `size` processes takes an equal, contiguous part of every batch. If the last batch has no row left for a
    process, it gets another's, which does not count: processes that share a model must call it equally often.
    """
    count = min(len(rows), max_rows)
    chosen = np.linspace(0, len(rows) - 1, count).round().astype(np.int64) if count else np.empty(0, dtype=np.int64)
    own = batch_size // size
    for start in range(0, count, batch_size):
        first = start + rank * own
        mine = chosen[first : first + own]
        yield (first, len(mine), rows.batch(mine)) if len(mine) else (start, 0, rows.batch(chosen[start : start + 1]))
