"""Experiments on a small scale, each one JSON and one figure with intervals.

    uv run python -m scripts.eval.experiments --data dataset/pretrain_hq.jsonl --seeds 1,2,3 --out weights/experiments
    uv run python -m scripts.eval.experiments --experiments reversal,frontier \\
        --reports weights/quickstart/report.json,weights/quickstart_2/report.json
    uv run python -m scripts.eval.experiments --draw weights/experiments

schedules       1/t, fixed-count, uniform and banded diffusion training, by full-range bound and by generated texts
initialisation  diffusion from AR weights and from scratch at equal total tokens
repetition      AR and diffusion as one small corpus is seen again and again
reversal        facts told in one direction, asked in the other; read off reports of scripts.eval.report
frontier        quality against forward passes and seconds, per decoding policy; read off the same reports

The first three train, by the ordinary commands, each of which is printed and recorded: what was stopped goes on where
it was, and what is finished in --out is not run again.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from scripts.engine.cli import parse_args, run
from scripts.engine.experiments.figures import draw
from scripts.engine.experiments.readings import READINGS, origin, read_reports
from scripts.engine.experiments.runs import Lab, Recipe, TrainingsConfig
from scripts.engine.experiments.trainings import (
    TRAININGS,
    InitialisationConfig,
    RepetitionConfig,
    SchedulesConfig,
    lines,
    summarise,
)
from scripts.engine.files import require_output, require_writable, write_json
from scripts.engine.loaded import circumstances
from scripts.engine.runtime import RuntimeConfig, command_line, provenance

EXPERIMENTS = *TRAININGS, *READINGS


@dataclass(frozen=True)
class ExperimentsConfig:
    """Experiments and their folder."""

    experiments: Annotated[tuple[Literal[*EXPERIMENTS], ...], "which ones", "without --draw"] = tuple(TRAININGS)
    out: Annotated[Path, "folder of <experiment>.json and .png, and in runs/ of all trainings"] = Path(
        "weights/experiments"
    )
    reports: Annotated[
        tuple[Path, ...] | None, "report.json of each seed", "with --experiments reversal or frontier"
    ] = None
    draw: Annotated[Path | None, "draw the figures of this folder's JSONs again; nothing else is done"] = None

    def __post_init__(self):
        if self.reports is None and any(name in READINGS for name in self.experiments):
            raise ValueError(f"--experiments {','.join(self.experiments)}: reversal and frontier need --reports")


TRAINS = "without --draw", "with --experiments schedules, initialisation or repetition"
NEEDS = {
    **dict.fromkeys((TrainingsConfig, Recipe, RuntimeConfig), TRAINS),
    **dict.fromkeys(("out", "reports"), "without --draw"),
    SchedulesConfig: ("without --draw", "with --experiments schedules"),
    InitialisationConfig: ("without --draw", "with --experiments initialisation"),
    RepetitionConfig: ("without --draw", "with --experiments repetition"),
}


def main(argv: list[str] | None = None) -> None:
    groups = ExperimentsConfig, TrainingsConfig, Recipe, SchedulesConfig, InitialisationConfig, RepetitionConfig
    what, trainings, recipe, *configs, runtime, _ = parse_args(__doc__, *groups, RuntimeConfig, argv=argv, needs=NEEDS)
    if what.draw:
        draw_again(what.draw)
        return
    require_writable(what.out / "runs" / "any", "--out")
    reports = read_reports(what.reports) if what.reports else {}
    for name in what.experiments:
        require_output(what.out / f"{name}.json", "--out", *reports, trainings.data, trainings.tokenizer_dir)
    command = command_line(__spec__.name, argv)
    about = {"reports": origin(reports), "command": command, **provenance(runtime)}
    for name in READINGS:
        if name in what.experiments:
            finish(what.out, {"experiment": name, **READINGS[name](reports), **about})
    for result in train(what, trainings, recipe, dict(zip(TRAININGS, configs, strict=True)), runtime, command):
        finish(what.out, result)


def train(
    what: ExperimentsConfig,
    trainings: TrainingsConfig,
    recipe: Recipe,
    configs: dict[str, Any],
    runtime: RuntimeConfig,
    command: str,
) -> Iterator[dict[str, Any]]:
    """The results of the chosen experiments that train, one after the other."""
    chosen = [name for name in TRAININGS if name in what.experiments]
    if not chosen:
        return
    lab = Lab(what.out / "runs", trainings, recipe, runtime)
    common = lab.commands[:]
    for name in chosen:
        first = len(lab.commands)
        lab.judged.clear()
        result = TRAININGS[name].run(lab, configs[name], trainings.seeds)
        settings = trainings, recipe, configs[name]
        yield {
            "experiment": name,
            "summary": summarise(result["runs"], TRAININGS[name].comparison),
            **result,
            "commands": common + lab.commands[first:],
            **circumstances(command, runtime, lab.tokenizer, lab.source, [], *settings),
            "checkpoints": [{"checkpoint": path, "sha256": digest} for path, digest in lab.judged.items()],
        }


def finish(folder: Path, result: dict[str, Any]) -> None:
    path = folder / f"{result['experiment']}.json"
    write_json(path, result)
    draw(result, path.with_suffix(".png"))
    print("\n".join([*lines(result["summary"]), f"wrote {path} and {path.with_suffix('.png').name}"]), flush=True)


def draw_again(folder: Path) -> None:
    if not (paths := sorted(folder.glob("*.json"))):
        raise ValueError(f"--draw {folder}: there is no JSON of an experiment")
    for path in paths:
        draw(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png"))
        print(path.with_suffix(".png"))


if __name__ == "__main__":
    run(main)
