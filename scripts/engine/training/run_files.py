"""The files of a run: checkpoint, log, loss curve, best weights and their average."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from model.checkpoint import average_weights, load_checkpoint, save_checkpoint
from scripts.engine.training.metrics import RunLog, plot_losses
from scripts.engine.training.run import RunConfig
from scripts.engine.training.state import TrainingState


class RunFiles:
    """Writes the files of a run, on the first process alone; the methods are called on all of them."""

    def __init__(self, run: RunConfig, state: TrainingState, identity: dict[str, Any]):
        """identity: what every checkpoint of the run says of it: tokenizer, stage, settings, ..."""
        self.run, self.state, self.identity = run, state, identity
        self.is_main = state.world.is_main
        self.saved_step = 0
        self.top = TopK(run, [], deletes=self.is_main)

    def start(self) -> None:
        """Open the log. Files of an earlier run, replaced by --overwrite, must not pass for this one's."""
        if self.is_main:
            self.log = RunLog(self.run.path("_log.jsonl"))
            for path in (self.run.state_path, self.run.best_path, self.run.exported_path, self.run.path("_loss.png")):
                path.unlink(missing_ok=True)
            self.top.clear()

    def resume(self, saved: dict[str, Any]) -> None:
        """Continue from a checkpoint that `save` has written; raise ValueError if weights that it needs are gone."""
        self.top = TopK(self.run, saved.get("top", []), deletes=self.is_main)
        self.top.require_files()
        self.state.load_state_dict(saved, str(self.run.state_path))
        self.saved_step = self.state.progress.step
        if self.is_main:
            self.log = RunLog(self.run.path("_log.jsonl"), saved["log_lines"])

    def save(self, **extras: Any) -> None:
        """Write <run>.pt: everything needed to continue."""
        self.state.collect()
        state = self.state.state_dict()
        if self.is_main:
            self.log.sync()
            path, config = self.run.state_path, self.state.model.config
            save_checkpoint(
                path, config, **state, **self.identity, **extras, top=self.top.best, log_lines=self.log.lines
            )
            self.top.prune()
        self.saved_step = self.state.progress.step
        self.say(f"saved {self.run.state_path} (step {self.saved_step})")

    def write_weights(self, path: Path) -> None:
        """Write the weights that are in the model now, for evaluations and later stages."""
        weights, progress = self.state.weights(), self.state.progress
        if self.is_main:
            counters = {"step": progress.step, "best_loss": progress.best_loss}
            save_checkpoint(path, self.state.model.config, weights, **self.identity, **counters)

    @property
    def contents(self) -> str:
        """Part of a message: which step the checkpoint holds, or "" if there is none."""
        return f"; {self.run.state_path} holds step {self.saved_step}" if self.saved_step else ""

    def record(self, event: str, **values: Any) -> None:
        """Write a line to the log: the one place where events of a training are written."""
        if self.is_main:
            self.log.write(event, **values)

    def say(self, line: str) -> None:
        if self.is_main:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def plot(self) -> None:
        if self.is_main:
            plot_losses(self.log.path, self.run.path("_loss.png"))


class TopK:
    """The --topk-merge best validated weights, in files of their own: <run>_top_<step>.pt (LLaDA 2.0, section 4.3)."""

    def __init__(self, run: RunConfig, best: list[tuple[float, int]], deletes: bool = True):
        """best: (validation loss, step) of those kept so far, best first. deletes: whether this process may."""
        self.run, self.best, self.deletes = run, [(loss, step) for loss, step in best], deletes

    def path(self, step: int) -> Path:
        return self.run.path(f"_top_{step}.pt")

    def offer(self, loss: float, step: int, write: Callable[[Path], None]) -> None:
        """Keep the weights of `step`, which `write` writes, if they are among the best; the worst drop out."""
        others = [(other_loss, other) for other_loss, other in self.best if other != step]
        self.best = sorted([*others, (loss, step)])[: self.run.topk_merge]
        if (loss, step) in self.best:
            write(self.path(step))

    def average(self) -> dict:
        """Return the mean of the weights kept."""
        return average_weights([load_checkpoint(self.path(step))["weights"] for _, step in self.best])

    def prune(self) -> None:
        """Delete the files of all others; not before a checkpoint is on the disk that needs none of them."""
        own = re.compile(re.escape(self.run.run_name) + r"_top_\d+\.pt")
        kept = {self.path(step).name for _, step in self.best}
        for path in self.run.save_dir.iterdir() if self.deletes and self.run.save_dir.is_dir() else ():
            if own.fullmatch(path.name) and path.name not in kept:
                path.unlink()

    def clear(self) -> None:
        """Delete the files that an earlier run of this name has left."""
        self.prune()
        self.run.merged_path.unlink(missing_ok=True)

    def require_files(self) -> None:
        """Raise ValueError if weights that the run has kept are gone: before it goes on, not at its end."""
        for _, step in self.best:
            if not self.path(step).is_file():
                raise ValueError(f"{self.path(step)}, one of the best weights of this run, is gone; put it back")
