"""The health of a training: steps that are not taken, losses that jump, memory that does not suffice."""

import statistics
from collections import deque
from typing import Any

from torch import Tensor

WINDOW = 20  # log lines that a loss is compared with
FEWEST = 10  # of them, before any comparison
FACTOR, FLOOR = 8.0, 0.02  # a spike is so many robust deviations above their median; a deviation as share of it


class Health:
    """Which steps were skipped, and which losses were logged of late; `state` is what a checkpoint keeps of it."""

    def __init__(self, state: dict[str, Any] | None = None):
        state = state or {"skipped": 0, "in_a_row": 0, "recent": []}
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self.longest = self.in_a_row
        self.recent: deque[float] = deque(state["recent"], maxlen=WINDOW)
        self._unread: list[tuple[int, Tensor]] = []

    @property
    def state(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "recent": list(self.recent)}

    def note(self, step: int, sound: Tensor) -> None:
        """sound: () bool on the device, whether the step was taken; nothing waits for it here."""
        self._unread.append((step, sound))

    def read(self) -> list[int]:
        """The steps noted since the last call that were skipped; `longest` is then the longest row of them, with those
        right before."""
        self.longest = self.in_a_row
        steps = [step for step, sound in self._unread if not self._count(bool(sound))]
        self._unread.clear()
        return steps

    def _count(self, sound: bool) -> bool:
        self.skipped += not sound
        self.in_a_row = 0 if sound else self.in_a_row + 1
        self.longest = max(self.longest, self.in_a_row)
        return sound

    def spike(self, loss: float) -> tuple[float, float] | None:
        """(median, robust deviation) of the losses before, if this one is far above them; it counts among them then."""
        usual = None
        if len(self.recent) >= FEWEST:
            median = statistics.median(self.recent)
            spread = 1.4826 * statistics.median(abs(one - median) for one in self.recent)
            spread = max(spread, FLOOR * abs(median))
            usual = (median, spread) if loss > median + FACTOR * spread else None
        self.recent.append(loss)
        return usual


def smaller_batch(batch_size: int, accumulation_steps: int, eval_max_batches: int, num_processes: int) -> str:
    """Flags for less memory at once and the same training; "" where a row at a time is too much."""
    divisors = (d for d in range(batch_size // 2, 0, -1) if batch_size % d == 0 and d % num_processes == 0)
    size = next(divisors, None)
    if size is None:
        return ""
    times = batch_size // size
    return (
        f"--batch-size {size} --accumulation-steps {accumulation_steps * times} "
        f"--eval-max-batches {eval_max_batches * times}"
    )
