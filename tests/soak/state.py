"""Whether the files of a run are whole, and equal to those of another run to the last bit."""

import json
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import load_checkpoint
from scripts.engine.files import read_log

# Of a checkpoint: where and when a run was made, not what it computed.
NOT_COMPUTED = {"settings", "command", "provenance", "seconds", "log_lines"}
CLOCK = {"seconds", "tokens_per_second"}
PNG_END = b"IEND\xaeB`\x82"


def difference(a: Any, b: Any, where: str = "") -> str | None:
    """The first entry in which two nested states differ, to the bit."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return None if same else f"{where} differs"
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{where}: {sorted(map(str, a.keys() ^ b.keys()))} on one side only"
        differences = (difference(a[key], b[key], f"{where}/{key}") for key in a)
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return f"{where}: {len(a)} entries, {len(b)} entries"
        differences = (difference(x, y, f"{where}/{i}") for i, (x, y) in enumerate(zip(a, b, strict=True)))
    else:
        return None if a == b else f"{where}: {a} is not {b}"
    return next(filter(None, differences), None)


def computed(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint that do not depend on when and where it was written."""
    return {name: value for name, value in load_checkpoint(path).items() if name not in NOT_COMPUTED}


def events(path: Path) -> list[dict[str, Any]]:
    """The lines of a log without times, starts and resumptions."""
    return [
        {name: value for name, value in row.items() if name not in CLOCK}
        for row in read_log(path)
        if row["event"] not in ("start", "resume")
    ]


def difference_of_runs(whole: Path, parts: Path, run_name: str) -> str | None:
    """The first difference between the run `run_name` in two folders: in the weights of any file, the optimizer,
    averages, counters, or the log."""
    suffixes, others = ({path.name[len(run_name) :] for path in f.glob(f"{run_name}*.pt")} for f in (whole, parts))
    if suffixes != others:
        return f"{sorted(suffixes ^ others)} on one side only"
    for suffix in sorted(suffixes):
        name = run_name + suffix
        if fault := difference(computed(whole / name), computed(parts / name), suffix):
            return fault
    log = f"{run_name}_log.jsonl"
    return difference(events(whole / log), events(parts / log), "the log")


def temporaries(folder: Path) -> list[str]:
    """Files that are not yet under their names."""
    return sorted(path.name for path in folder.glob("*.tmp*"))


def unsound(folder: Path, run_name: str) -> str | None:
    """A fault of the files under final names, which must be whole whenever their run was stopped: a checkpoint that
    does not load, a picture that is cut off, a line that the checkpoint counts on and that is not in the log."""
    try:
        for path in sorted(folder.glob("*.pt")):
            load_checkpoint(path)
        for path in sorted(folder.glob("*.png")):
            if ".tmp" not in path.name and not path.read_bytes().endswith(PNG_END):
                return f"{path} is cut off"
        state = folder / f"{run_name}.pt"
        lines = load_checkpoint(state)["log_lines"] if state.exists() else 0
        log = (folder / f"{run_name}_log.jsonl").read_text(encoding="utf-8").split("\n") if lines else []
        if len(log) <= lines and lines:
            return f"{state} counts on {lines} lines of {run_name}_log.jsonl, which has {len(log) - 1}"
        for line in log[:lines]:
            json.loads(line)
    except (ValueError, OSError) as error:
        return str(error)
    return None
