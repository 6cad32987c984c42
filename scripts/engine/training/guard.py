"""What stops or endangers a training: signals, steps that are not finite, losses that jump, memory that runs out."""

import math
import signal
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import Tensor

from model.files import is_out_of_memory
from scripts.engine.training.config import StageConfigs
from scripts.engine.training.distributed import World
from scripts.engine.training.loader import Rows
from scripts.engine.training.run_files import RunFiles
from scripts.engine.training.state import TrainingState

REMEDY = "start again with a lower --learning-rate or another --dtype"

WINDOW = 20  # log lines that a loss is compared with
FEWEST = 10  # log lines before the first comparison
# A spike is FACTOR robust deviations above the median of the window; a deviation is at least FLOOR of the median.
FACTOR, FLOOR = 8.0, 0.02


class Interrupted(SystemExit):
    """The run was asked to stop, and is saved unless it was asked twice; the exit code is 128 + the signal's number."""


class StopRequest(Exception):
    """Every process of the run has heard of this signal between two steps or batches."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class StopSignals:
    """While active, SIGINT and SIGTERM are noted instead of ending the process."""

    def __init__(self, world: World):
        self.number, self.world = 0, world

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A second signal ends the process at once. Under torchrun one wish may arrive twice, from torchrun and from the
        # system, and torchrun itself does not wait for ever.
        if self.number and self.world.control is None:
            raise Interrupted(128 + number)
        self.number = number

    def check(self) -> None:
        """Raise StopRequest if any process was asked to stop. All processes call it."""
        number = self.world.most(self.number)
        if number:
            raise StopRequest(number)


class Health:
    """The skipped steps and the last logged losses; `state` is what a checkpoint keeps of it."""

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
        """Return the steps noted since the last call that were skipped; `longest` is then the longest row of them, with
        those right before."""
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
        """Return the median and the robust deviation of the losses before if this one is far above them."""
        usual = None
        if len(self.recent) >= FEWEST:
            median = statistics.median(self.recent)
            deviation = 1.4826 * statistics.median(abs(other - median) for other in self.recent)
            deviation = max(deviation, FLOOR * abs(median))
            usual = (median, deviation) if loss > median + FACTOR * deviation else None
        self.recent.append(loss)
        return usual


class Guard:
    """Reports skipped steps, and refuses to go on with weights, losses or memory that will not do."""

    def __init__(self, state: TrainingState, files: RunFiles, configs: StageConfigs, rows: Rows):
        """rows: those of the training."""
        self.state, self.files, self.configs, self.rows = state, files, configs, rows
        self.health = Health()

    def report_skipped(self) -> None:
        """Log the steps that were skipped since the last call, with the numbers of their rows."""
        per_step = self.configs.trainer.rows_per_step
        for step in self.health.read():
            order = self.rows.order(self.configs.runtime.seed, per_step)  # a new one: the data thread uses the other
            rows = sorted((order((step - 1) * per_step, per_step) % len(self.rows)).tolist())
            self.files.record("skipped", step=step, rows=rows)
            first = f"{', '.join(map(str, rows[:8]))}{', ...' if len(rows) > 8 else ''}"
            self.files.say(f"step {step}: loss or gradient not finite, step skipped (training rows {first}, from 0)")

    def give_up(self, validate: Callable[[], Tensor], save: Callable[[], None]) -> None:
        """Save the weights if they are good, and raise ValueError with what to do.

        Good weights are finite and have a finite loss on the validation rows, validate() -> its nats. Without such rows
        an earlier checkpoint is left, since it leads here again.
        """
        health, step = self.health, self.state.progress.step
        fault = f"{health.longest} steps in a row, to step {step}, had no finite loss or gradient: skipped"
        if not self.state.weights_are_finite:
            raise ValueError(f"{fault}; the weights are not finite{self.files.contents}; {REMEDY}")
        health.in_a_row = 0
        nats = validate()
        if len(nats) and not math.isfinite(nats.sum()):
            raise ValueError(f"{fault}; nor is the loss on the validation rows finite{self.files.contents}; {REMEDY}")
        if len(nats) or not self.files.saved_step:
            save()
        raise ValueError(
            f"{fault}{self.files.contents}; look at the rows, by --show-batch --show-step {step}, and go on with "
            "--resume must, or with another --dtype, too"
        )

    def require_finite_weights(self) -> None:
        if not self.state.weights_are_finite:
            step = self.state.progress.step
            raise ValueError(f"the weights are not finite at step {step}{self.files.contents}; {REMEDY}")

    def require_finite_loss(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise ValueError(
                f"the validation loss at step {self.state.progress.step} is not finite, the weights are spoilt"
                f"{self.files.contents}; {REMEDY}"
            )

    @contextmanager
    def memory(self, save: Callable[[], None] | None = None) -> Iterator[None]:
        """If memory runs out inside, call save() and raise ValueError with the flags of a smaller batch.

        save: to be given if nothing has been changed since the last completed step.
        """
        try:
            yield
            return
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the except clause, which would keep the step's tensors alive.
        for optimizer in self.state.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if save:
            save()
        flags = smaller_batch(self.configs, self.state.world.size)
        advice = f"give {flags}, which trains the same" if flags else "give a smaller model or --max-seq-len"
        again = ", and --resume must" if flags and self.files.saved_step else ""
        step = self.state.progress.step
        raise ValueError(f"out of memory after step {step}{self.files.contents}; {advice}{again}")


def smaller_batch(configs: StageConfigs, num_processes: int) -> str:
    """Return flags for the same training with less memory at once, or "" if one row at a time is too much."""
    batch_size = configs.trainer.batch_size
    sizes = (n for n in range(batch_size // 2, 0, -1) if batch_size % n == 0 and n % num_processes == 0)
    size = next(sizes, None)
    if size is None:
        return ""
    factor = batch_size // size
    return (
        f"--batch-size {size} --accumulation-steps {configs.trainer.accumulation_steps * factor} "
        f"--eval-max-batches {configs.run.eval_max_batches * factor}"
    )
