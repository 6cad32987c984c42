"""The long crash test: a training that is killed, cut off from its disk or handed damaged files loses nothing.

    uv run python -m scripts.eval.soak
    uv run python -m scripts.eval.soak --kills 1000 --parts training --json weights/soak.json

Small trainings (AR pretraining, diffusion pretraining, diffusion fine-tuning) run undisturbed once, then again under
every fault, on the CPU. After each fault the files are whole, --resume auto goes on, and in the end weights, optimizer
and log are those of the undisturbed run to the last bit. Exit code 1 if any are not.

Parts: training (SIGKILL, --kills times), distributed (SIGKILL to one of two processes), disk (full at a random moment),
read-only, bytes (files cut off and changed).
"""

import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from scripts.engine.cli import parse_args, run
from scripts.engine.files import require_output, write_json
from scripts.engine.loaded import circumstances
from scripts.engine.runtime import RuntimeConfig, command_line
from tests.soak.faults import damaged_bytes, disk, distributed, read_only, training
from tests.soak.workplace import Outcome, Workplace

PARTS: dict[str, Callable[[Workplace, int], Iterator[Outcome]]] = {
    "training": training,
    "distributed": distributed,
    "disk": disk,
    "read-only": read_only,
    "bytes": damaged_bytes,
}
# Tries of a part for each of --kills.
SHARE = {"training": 1.0, "distributed": 0.2, "disk": 0.5, "read-only": 0.2}


@dataclass(frozen=True)
class SoakConfig:
    """What is tried, and how often."""

    kills: Annotated[
        int,
        "kills of trainings; other faults are tried in proportion",
        "at least 1",
        "with --parts training, distributed, disk or read-only",
    ] = 100
    changes: Annotated[int, "changed bytes and zeroed blocks", "at least 1", "with --parts bytes"] = 1000
    parts: Annotated[tuple[Literal[*PARTS], ...], "what is tried"] = tuple(PARTS)
    seed: Annotated[int, "seed of the moments, the sizes and the bytes", "in [0, 2^32)"] = 1337
    json: Annotated[Path | None, "also write the result to this file"] = None

    def tries(self, part: str) -> int:
        return self.changes if part == "bytes" else max(2, math.ceil(self.kills * SHARE[part]))


def main(argv: list[str] | None = None) -> None:
    config, _ = parse_args(__doc__, SoakConfig, argv=argv)
    require_output(config.json, "--json")
    folder = Path(tempfile.mkdtemp(prefix="soak-")).resolve()
    place = Workplace(folder, config.seed)
    outcomes = soak(place, config)
    if config.json:
        command = command_line(__spec__.name, argv)
        runtime = RuntimeConfig(device="cpu", dtype="float32", seed=config.seed)
        record = circumstances(command, runtime, place.tokenizer, place.folder / "corpus.jsonl", (), config)
        write_json(config.json, {"outcomes": [vars(outcome) for outcome in outcomes], **record})
    if any(outcome.failures for outcome in outcomes):
        print(f"the files of what failed are in {folder}")
        sys.exit(1)
    shutil.rmtree(folder)


def soak(place: Workplace, config: SoakConfig) -> list[Outcome]:
    """All parts, each printed when it is done."""
    outcomes = []
    for part in config.parts:
        began = time.monotonic()
        for outcome in PARTS[part](place, config.tries(part)):
            where = ", ".join(f"{name} {count}" for name, count in outcome.where.most_common())
            print(f"{part}: {outcome.fault}: survived {outcome.survived} of {outcome.tries} ({where})", flush=True)
            for failure in outcome.failures[:5]:
                print(f"  failed: {failure}", flush=True)
            outcomes.append(outcome)
        print(f"{part}: {time.monotonic() - began:.0f} s", flush=True)
    return outcomes


if __name__ == "__main__":
    run(main)
