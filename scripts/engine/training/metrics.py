"""The record of a run: one JSON line per event, sums for the averages in it, and the loss curve drawn from it."""

import io
import json
import os
import sys
from collections.abc import Callable
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
        """Return the sums of all processes on the first one, and none on the others."""
        if world.size == 1:
            return self
        together, device = Meter(), next((total.device for total, _ in self.sums.values()), None)
        for sums in world.gather({name: (total.cpu(), count.cpu()) for name, (total, count) in self.sums.items()}):
            for name, (total, count) in sums.items():
                together.add(name, total.to(device), count.to(device))
        return together

    def read(self) -> dict[str, Any]:
        """Return name -> sum / count, a float or a list of floats, None if not finite; clear the sums."""
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
    """Draw training and validation loss against the step, with the mean loss at light and heavy mask rates if logged.

    The environment variable NANO_LLADA_PLOTS=0 turns it off: drawing takes a second or two.
    """
    if os.environ.get("NANO_LLADA_PLOTS") == "0":
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_log(log_path)
    unit = next((row["unit"] for row in rows if "unit" in row), "nats per token")
    by_row = unit == "nats per token" and any(row.get("chat") for row in rows)
    figure, axes = plt.subplots(figsize=(8, 5))

    def draw(event: str, value: Callable[[dict], float | None], label: str, **style: Any) -> None:
        points = [(row["step"], value(row)) for row in rows if row["event"] == event]
        points = [point for point in points if point[1] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)

    def at_rate(number: int) -> Callable[[dict], float | None]:
        return lambda row: row["loss_by_rate"][number] if "loss_by_rate" in row else None

    training = "training (mean over rows)" if by_row else "training"
    draw("train", lambda row: row["loss"], training, linewidth=0.8, alpha=0.6)
    draw("eval", lambda row: row["loss"], "validation", marker="o", markersize=3)
    draw("eval", lambda row: row.get("diffusion"), "validation, diffusion", linestyle="--")
    draw("eval", lambda row: row.get("next_token"), "validation, next token", linestyle="--")
    draw("eval", at_rate(0), "masked tokens, mask rate up to 10 %", linestyle=":")
    draw("eval", at_rate(-1), "masked tokens, mask rate above 90 %", linestyle=":")
    loss = "loss (nats per token)" if unit == "nats per token" else f"loss ({unit})"
    axes.set(xlabel="step", ylabel=loss, title=log_path.stem.removesuffix("_log"))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncol=2, frameon=False)
    figure.tight_layout()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    plt.close(figure)
    write_bytes(image_path, image.getvalue())
