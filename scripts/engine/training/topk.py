"""The best checkpoints of a run, kept while it trains and averaged at its end (LLaDA 2.0, section 4.3)."""

import re
from collections.abc import Callable
from pathlib import Path

from model.checkpoint import average_weights, load_checkpoint
from scripts.engine.training.run import RunConfig


class TopK:
    """The --topk-merge best validated weights, in files of their own: <run>_top_<step>.pt."""

    def __init__(self, run: RunConfig, best: list[tuple[float, int]], deletes: bool = True):
        """best: (validation loss, step) of those kept so far, best first. deletes: whether this process may."""
        self.run, self.best, self.deletes = run, [(loss, step) for loss, step in best], deletes

    def path(self, step: int) -> Path:
        return self.run.path(f"_top_{step}.pt")

    def offer(self, loss: float, step: int, write: Callable[[Path], None]) -> None:
        """Keep the weights of `step`, which `write` writes, if they are among the best; the worst drop out."""
        self.best = sorted([*((a, b) for a, b in self.best if b != step), (loss, step)])[: self.run.topk_merge]
        if (loss, step) in self.best:
            write(self.path(step))

    def average(self) -> dict:
        """The mean of the weights kept."""
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
        """ValueError if a file is gone that the run has kept; found out before it goes on, not at its end."""
        for _, step in self.best:
            if not self.path(step).is_file():
                raise ValueError(f"{self.path(step)}, one of the best weights of this run, is gone; put it back")
