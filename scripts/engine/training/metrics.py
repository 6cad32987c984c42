"""The record of a run: one JSON line per event, sums for the averages in it, and the loss curve drawn from it."""

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.engine.files import lines_of, or_none, read_log, write_bytes, write_text
from scripts.engine.training.distributed import World


class Meter:
    """Running sums of (sum, count) pairs, kept on the device and read once per log line."""

    def __init__(self, state: dict[str, tuple[Tensor, Tensor]] | None = None):
        self.sums: dict[str, tuple[Tensor, Tensor]] = dict(state or {})

    def add(self, name: str, total: Tensor, count: Tensor) -> None:
        # On MPS there is no float64; its sums over one log interval bear float32.
        wide = torch.float32 if total.device.type == "mps" else torch.float64
        total, count = total.detach().to(wide), count.detach().to(wide)
        old = self.sums.get(name)
        self.sums[name] = (total, count) if old is None else (old[0] + total, old[1] + count)

    def gathered(self, world: World) -> "Meter":
        """The sums of all processes on the first one, none on the others."""
        if world.size == 1:
            return self
        everything, device = Meter(), next((total.device for total, _ in self.sums.values()), None)
        for sums in world.gather({name: (total.cpu(), count.cpu()) for name, (total, count) in self.sums.items()}):
            for name, (total, count) in sums.items():
                everything.add(name, total.to(device), count.to(device))
        return everything

    def read(self) -> dict[str, Any]:
        """name -> sum / count, a float or a list of floats, None where not finite; clears the sums."""
        values = {}
        for name, (total, count) in self.sums.items():
            ratio = torch.where(count > 0, total / count.clamp(min=1e-12), torch.nan).tolist()
            values[name] = [or_none(x) for x in ratio] if isinstance(ratio, list) else or_none(ratio)
        self.sums.clear()
        return values


class RunLog:
    """Appends events to <run>_log.jsonl. `lines` counts them, so that a resumed run can drop those of a lost future."""

    def __init__(self, path: Path, keep_lines: int = 0):
        self.path = path
        kept = lines_of(path)[:keep_lines] if path.exists() else []
        self.lines = len(kept)
        if self.lines < keep_lines:
            print(f"{path} has lost {keep_lines - self.lines} of its {keep_lines} lines; going on", file=sys.stderr)
        write_text(path, "".join(line + "\n" for line in kept))

    def write(self, event: str, **values: Any) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"event": event, **values}, ensure_ascii=False) + "\n")
        except OSError as error:
            remedy = "make room, or choose another place"
            raise OSError(f"{self.path} cannot be written ({error.strerror}); {remedy}") from error
        self.lines += 1

    def sync(self) -> None:
        """Have the lines on the disk, before something says how many there are."""
        with self.path.open("ab") as file:
            os.fsync(file.fileno())


def plot_losses(log_path: Path, image_path: Path) -> None:
    """Training and validation loss against the step, with the mean loss at light and heavy mask rates where logged."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_log(log_path)
    by_row = any("sft" in row.get("stage", "") for row in rows)
    labels = {"train": "training (mean over rows)" if by_row else "training", "eval": "validation"}
    figure, axes = plt.subplots(figsize=(8, 5))
    for event, style in (("train", {"linewidth": 0.8, "alpha": 0.6}), ("eval", {"marker": "o", "markersize": 3})):
        points = [(row["step"], row["loss"]) for row in rows if row["event"] == event and row["loss"] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=labels[event], **style)
    for bin_index, label in ((0, "masked tokens, mask rate up to 10 %"), (-1, "masked tokens, mask rate above 90 %")):
        points = [
            (row["step"], row["loss_by_rate"][bin_index])
            for row in rows
            if row["event"] == "eval" and "loss_by_rate" in row
        ]
        points = [p for p in points if p[1] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), linestyle=":", label=label)
    axes.set(
        xlabel="step",
        ylabel="loss (per pair)" if any("dpo" in row.get("stage", "") for row in rows) else "loss (nats per token)",
        title=log_path.stem.removesuffix("_log"),
    )
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, -0.3), ncol=2, frameon=False)
    figure.tight_layout()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    plt.close(figure)
    write_bytes(image_path, drawn.getvalue())
