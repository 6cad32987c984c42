"""The rows of each step: functions of (seed, step), so a resumed run only has to count."""

from collections.abc import Callable

import numpy as np

STEPS_PER_WINDOW = 50  # at most, among which rows are sorted by length: little padding, and yet every step differs
WINDOWS_PER_EPOCH = 4  # at least, or a small corpus would be grouped alike in every epoch


class RowOrder:
    """An endless sequence of row numbers: one permutation of all rows after another, each from (seed, epoch)."""

    def __init__(self, num_rows: int, seed: int):
        self.num_rows, self.seed = num_rows, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def __call__(self, start: int, count: int) -> np.ndarray:
        """Entries start .. start + count of the sequence, (count,) int64."""
        return self.visits(start, count) % self.num_rows

    def visits(self, start: int, count: int) -> np.ndarray:
        """The same as visit numbers, epoch * num_rows + row."""
        places = np.arange(start, start + count)
        rows = np.empty(count, dtype=np.int64)
        for epoch in np.unique(places // self.num_rows):
            here = places // self.num_rows == epoch
            rows[here] = epoch * self.num_rows + self._order(int(epoch))[places[here] % self.num_rows]
        return rows

    def _order(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._permutation = np.empty(0, dtype=np.int64)  # never two of them: 8 bytes for each row of the corpus
            self._epoch, self._permutation = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
        return self._permutation


class LengthOrder:
    """The visits of `visits`, regrouped so that the rows of a step are of similar length.

    visits(start, count) -> visit numbers (count,); lengths(visits) -> tokens of each (count,). An epoch of `num_rows`
    visits is cut into windows of up to STEPS_PER_WINDOW steps; a window's rows are sorted by length, dealt out to its
    steps, and the steps shuffled. Each step of `rows_per_step` is one aligned stretch of the sequence, and every epoch
    visits every row; a last, incomplete step is completed from the epoch after it.
    """

    def __init__(
        self,
        visits: Callable[[int, int], np.ndarray],
        lengths: Callable[[np.ndarray], np.ndarray],
        num_rows: int,
        seed: int,
        rows_per_step: int,
    ):
        self.visits, self.lengths, self.num_rows = visits, lengths, num_rows
        self.seed, self.rows_per_step = seed, rows_per_step
        self.steps_per_window = min(max(num_rows // rows_per_step // WINDOWS_PER_EPOCH, 1), STEPS_PER_WINDOW)
        self._window, self._steps = (-1, -1), np.empty((0, rows_per_step), dtype=np.int64)

    def __call__(self, start: int, count: int) -> np.ndarray:
        """Entries start .. start + count of the sequence, (count,) int64 visit numbers."""
        first, last = start // self.rows_per_step, -(-(start + count) // self.rows_per_step)
        entries = np.concatenate([self._step(step) for step in range(first, last)])
        return entries[start - first * self.rows_per_step :][:count]

    def _step(self, step: int) -> np.ndarray:
        epoch = step * self.rows_per_step // self.num_rows
        begin, end = (-(-e * self.num_rows // self.rows_per_step) for e in (epoch, epoch + 1))
        begin += (step - begin) // self.steps_per_window * self.steps_per_window
        window = begin, min(begin + self.steps_per_window, end)
        if window != self._window:
            size = window[1] - begin
            visits = self.visits(begin * self.rows_per_step, size * self.rows_per_step)
            visits = visits[np.argsort(self.lengths(visits), kind="stable")].reshape(size, self.rows_per_step)
            self._window, self._steps = window, np.random.default_rng([self.seed, begin, 1]).permutation(visits)
        return self._steps[step - begin]
