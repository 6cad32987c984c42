"""A run on disk: its files, its settings, and whether it starts, continues or is refused."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

# Settings that a resumed run may change: where it looks, how often it writes, how long it goes on, on what it computes.
# SILENT ones leave every number as it is; REPORTED ones are named if they differ.
SILENT = {
    "resume",
    "overwrite",
    "save_interval",
    "log_interval",
    "dry_run",
    "show_batch",
    "show_step",
    "cache_dir",
    "save_dir",
    "weights_path",
}
REPORTED = {
    "load_from",
    "reference_from",  # whose contents are compared
    "resume_optimizer_state",
    "data",
    "tokenizer_dir",
    "max_iters",
    "epochs",
    "eval_interval",
    "eval_max_batches",
    "early_stop_patience",
    "early_stop_min_delta",
    "device",
    "dtype",
    "compile",
    "fsdp",
    "max_skipped_steps",
    "on_bad_row",  # with an unchanged file both modes read the same rows
}


@dataclass(frozen=True)
class RunConfig:
    """The run and its files."""

    run_name: Annotated[str, "files are <save-dir>/<run-name>*"] = "run"
    save_dir: Annotated[Path, "folder of checkpoints, logs and plots"] = Path("weights")
    weights_path: Annotated[
        Path | None, "file of the weights for later stages (none: <save-dir>/<run-name>_state_dict.pt)"
    ] = None
    load_from: Annotated[
        Path | None, "start from these weights (weights only, no optimizer)", "--init-from-minimind"
    ] = None
    resume_optimizer_state: Annotated[
        bool,
        "from a <run>.pt also its optimizer's moments; steps, learning rate and data begin anew",
        "with --load-from",
    ] = False
    resume: Annotated[
        Literal["never", "auto", "must"],
        "where <run-name>.pt exists: never = refuse to run, auto and must = continue it; must fails where it does not",
    ] = "never"
    overwrite: Annotated[bool, "start anew although <run-name>.pt exists"] = False
    save_interval: Annotated[int, "steps between checkpoints; each validation saves one, too", "at least 1"] = 1000
    log_interval: Annotated[int, "steps between log lines", "at least 1"] = 50
    eval_interval: Annotated[int, "steps between validations", "at least 1"] = 500
    eval_max_batches: Annotated[
        int, "validation batches, of --batch-size rows spread over the validation split", "at least 1"
    ] = 20
    topk_merge: Annotated[
        int,
        "keep the K best validated weights, and average them at the end into <run-name>_topk_merged.pt (0 = no)",
        "in [0, 1000]",
        "--llada2-topk-merge-k",
        ("--llada2-topk-merge", 3),
    ] = 0
    dry_run: Annotated[bool, "print shapes, parameters, memory, steps, tokens and estimated hours; train nothing"] = (
        False
    )
    show_batch: Annotated[bool, "print the first rows of a step in colour; train nothing"] = False
    show_step: Annotated[
        int | None, "all rows of this step (none: a few of the first one)", "at least 1", "with --show-batch"
    ] = None

    def __post_init__(self):
        name = self.run_name
        if name in ("", ".", "..") or Path(name).name != name or "\0" in name or len(name.encode()) > 200:
            raise ValueError(f"--run-name {name!r} must be a plain, short file name; folders belong to --save-dir")
        own = (self.state_path, self.best_path, self.merged_path, self.lock_path)
        own += (self.path("_log.jsonl"), self.path("_loss.png"))
        if self.exported_path.resolve() in {path.resolve() for path in own} or self.exported_path.suffix == ".lock":
            raise ValueError(
                f"--weights-path {self.weights_path} is a file that the run writes for itself; choose another"
            )
        if self.overwrite and self.load_from and self.writes(self.load_from):
            raise ValueError(
                f"--overwrite would delete {self.load_from}, which --load-from names; choose another --run-name"
            )
        if self.overwrite and self.resume != "never":
            raise ValueError(f"--overwrite and --resume {self.resume} contradict each other")

    def path(self, suffix: str) -> Path:
        return self.save_dir / f"{self.run_name}{suffix}"

    @property
    def previewing(self) -> bool:
        return self.dry_run or self.show_batch

    @property
    def state_path(self) -> Path:
        return self.path(".pt")

    @property
    def lock_path(self) -> Path:
        return self.path(".lock")

    @property
    def best_path(self) -> Path:
        return self.path("_best.pt")

    @property
    def merged_path(self) -> Path:
        return self.path("_topk_merged.pt")

    @property
    def exported_path(self) -> Path:
        return self.weights_path or self.path("_state_dict.pt")

    def writes(self, path: Path) -> bool:
        """Return whether `path` is a file of weights of this run."""
        own = (self.state_path, self.best_path, self.merged_path, self.exported_path)
        return path.resolve() in {mine.resolve() for mine in own}


def continues(config: RunConfig) -> bool:
    """Return whether this command continues a saved run, before anything is written.

    Raises ValueError if the run exists and --resume is never, FileNotFoundError if it is missing and --resume is must.
    """
    exists = config.state_path.is_file()
    if config.resume == "must" and not exists:
        raise FileNotFoundError(f"--resume must, but there is no {config.state_path}")
    if exists and config.resume == "never" and not config.overwrite:
        raise ValueError(
            f"{config.state_path} exists: continue it with --resume must, replace it with --overwrite, "
            "or choose another --run-name"
        )
    left = [path for path in (config.best_path, config.exported_path, config.merged_path) if path.is_file()]
    if left and not exists and not config.overwrite:
        raise ValueError(
            f"{left[0]} exists, without a {config.state_path.name} to continue: replace it with --overwrite, "
            "or choose another --run-name"
        )
    return exists and not config.overwrite


def compare_settings(saved: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> list[str]:
    """Return lines on the settings that a resumed run changes; raise ValueError if one makes it another run."""
    differ = [
        name for name in sorted(saved.keys() | now.keys()) if saved.get(name) != now.get(name) and name not in SILENT
    ]
    lines = {name: f"--{name.replace('_', '-')} was {saved.get(name)}, is {now.get(name)}" for name in differ}
    batch = ("batch_size", "accumulation_steps")  # the same rows per step in other portions: sums in another order
    same = len({math.prod(settings.get(name, 0) for name in batch) for settings in (saved, now)}) == 1
    harmless = REPORTED | set(batch) if same else REPORTED
    refused = [lines[name] for name in differ if name not in harmless]
    if refused:
        raise ValueError(
            f"{path} was trained with other settings: {'; '.join(refused)}; "
            "give the same ones, or choose another --run-name and --load-from"
        )
    return [lines[name] for name in differ]
