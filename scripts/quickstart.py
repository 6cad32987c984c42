"""Everything at once: three models trained and compared, AR, diffusion and both in one, on a CPU, from nothing.

    uv run python -m scripts.quickstart
    uv run python -m scripts.quickstart --full

Learns the bundled corpus; nothing is downloaded. Every stage is an ordinary command, printed before it runs: copy one,
change it, run it alone. The same command again skips finished stages and continues an interrupted one.
--full is the recipe of README.md, 32M parameters on MiniMind's data, which is downloaded: hours on one large GPU.
"""

import hashlib
import importlib
import itertools
import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from dataset.corpus.bundled import bundled_file
from scripts.engine.bench.pace import seconds_of_a_step
from scripts.engine.cli import parse_args, run
from scripts.engine.files import locked, require_writable, write_json
from scripts.engine.report.summary import summary
from scripts.engine.runtime import RuntimeConfig
from scripts.engine.training.guard import Interrupted


class Stage(NamedTuple):
    """One command. In its flags {out} stands for the quickstart's folder."""

    title: str
    module: str
    flags: str
    makes: str  # a file in {out}
    steps: int = 0  # of a training of the small recipe


# Measured on one machine in one hour: seconds of the small recipe's stages, and of the step that `pace` measures.
SECONDS = {
    "tokenizer": 1,
    "AR pretraining": 131,
    "AR fine-tuning": 131,
    "joint fine-tuning, from AR": 369,
    "diffusion fine-tuning, from joint": 123,
    "evaluation": 42,
    "trace": 1,
}
STEP_SECONDS = 0.33
STORY = "Tell me a short story about Anna."
SMALL_MODEL = "--hidden-size 192 --num-hidden-layers 4 --num-attention-heads 6 --tie-embeddings"
TRAINED = (
    " --save-dir {out} --tokenizer-dir {out}/tokenizer --optimizer muon --batch-size 64 --log-interval 100"
    " --eval-interval 500 --eval-max-batches 2"
)
LEARNING = " --lr-stable-ratio 0.6 --min-lr-ratio 0.05" + TRAINED
TURNING = " --lr-stable-ratio 0.1 --min-lr-ratio 0.01" + TRAINED  # to full attention
COMPARED = (  # joint weights under both kinds
    "--minimind-checkpoint {out}/ar_sft_state_dict.pt,{out}/joint_sft_state_dict.pt"
    " --diffusion-checkpoint {out}/diffusion_sft_state_dict.pt,{out}/joint_sft_state_dict.pt"
)
TRACED = "--minimind-checkpoint {out}/ar_sft_state_dict.pt --diffusion-checkpoint {out}/joint_sft_state_dict.pt"
GREEDY = " --ar-temperature 0 --gen-temp 0 --ar-repeat-penalty 0 --gen-repeat-penalty 0"
SMALL = (
    Stage(
        "tokenizer",
        "scripts.train.train_tokenizer",
        "--target-vocab-size 4096 --out {out}/tokenizer",
        "tokenizer/tokenizer.json",
    ),
    Stage(
        "AR pretraining",
        "scripts.train.train_pretrain",
        f"--run-name ar {SMALL_MODEL} --max-seq-len 64 --learning-rate 3e-3{LEARNING}",
        "ar_state_dict.pt",
        steps=260,
    ),
    Stage(  # never from joint weights: they know facts backwards, which the comparison is about
        "AR fine-tuning",
        "scripts.train.train_sft_minimind",
        f"--run-name ar_sft --load-from {{out}}/ar_state_dict.pt --max-seq-len 80 --learning-rate 2e-3{LEARNING}",
        "ar_sft_state_dict.pt",
        steps=550,
    ),
    Stage(
        "joint fine-tuning, from AR",
        "scripts.train.train_sft_diffusion",
        "--run-name joint_sft --load-from {out}/ar_state_dict.pt --block-size 8 --next-token-weight 1"
        f" --max-seq-len 80 --learning-rate 3e-3{LEARNING}",
        "joint_sft_state_dict.pt",
        steps=1000,
    ),
    Stage(
        "diffusion fine-tuning, from joint",
        "scripts.train.train_sft_diffusion",
        "--run-name diffusion_sft --load-from {out}/joint_sft_state_dict.pt --block-size 0 --next-token-weight 0"
        f" --eos-fill 8 --max-seq-len 80 --learning-rate 3e-3{TURNING}",
        "diffusion_sft_state_dict.pt",
        steps=450,
    ),
    Stage(
        "evaluation",
        "scripts.eval.report",
        f"--eval-data bundled:questions,bundled:pretrain,bundled:sft --eval-split validation {COMPARED}"
        " --tokenizer-dir {out}/tokenizer --out {out} --seq-len 80 --max-new-tokens 24 --canvas 24 --num-samples 8"
        " --frontier-questions 60 --frontier-policies threshold,self_speculative"
        f" --gen-remasking threshold{GREEDY}",
        "report.json",
    ),
    Stage(
        "trace",
        "scripts.eval.eval_sft_one_prompt",
        f"{TRACED} --tokenizer-dir {{out}}/tokenizer --seq-len 80 --max-new-tokens 48{GREEDY}"
        f" --gen-remasking threshold --trace {{out}}/trace.html --prompt '{STORY}'",
        "trace.html",
    ),
)
DATASET = "gongjy/minimind_dataset"
TEXTS, CHATS = "dataset/pretrain_hq.jsonl", "dataset/sft_mini_512.jsonl"
FULL = (
    Stage(
        "AR pretraining",
        "scripts.train.train_pretrain",
        f"--data {TEXTS} --run-name ar --save-dir {{out}} --hidden-size 512 --num-hidden-layers 8"
        " --num-attention-heads 8 --max-seq-len 256 --epochs 1 --batch-size 96",
        "ar_state_dict.pt",
    ),
    Stage(
        "AR fine-tuning",
        "scripts.train.train_sft_minimind",
        f"--data {CHATS} --load-from {{out}}/ar_state_dict.pt --run-name ar_sft --save-dir {{out}} --max-seq-len 512"
        " --epochs 2 --batch-size 96",
        "ar_sft_state_dict.pt",
    ),
    Stage(
        "joint fine-tuning, from AR",
        "scripts.train.train_sft_diffusion",
        f"--data {CHATS} --load-from {{out}}/ar_state_dict.pt --block-size 32 --next-token-weight 0.5"
        " --run-name joint_sft --save-dir {out} --max-seq-len 512 --epochs 3 --batch-size 96",
        "joint_sft_state_dict.pt",
    ),
    Stage(
        "diffusion pretraining, from AR",
        "scripts.train.diffusion",
        f"--train --use-tokenizer --data {TEXTS} --init-from-minimind {{out}}/ar_state_dict.pt --run-name diffusion"
        " --save-dir {out} --inference-rope-scaling --learning-rate 4e-4 --warmup-steps 2000 --min-lr-ratio 0.025"
        " --mask-schedule iid_t --repeat-penalty-weight 0 --early-stop-patience 5 --early-stop-min-delta 0.001"
        " --max-iters 40000 --batch-size 96",
        "diffusion_state_dict.pt",
    ),
    Stage(
        "diffusion fine-tuning",
        "scripts.train.train_sft_diffusion",
        f"--data {CHATS} --load-from {{out}}/diffusion_state_dict.pt --run-name diffusion_sft --save-dir {{out}}"
        " --max-seq-len 512 --epochs 3 --batch-size 96",
        "diffusion_sft_state_dict.pt",
    ),
    Stage(
        "evaluation",
        "scripts.eval.report",
        f"{COMPARED} --out {{out}} --seq-len 512 --eval-data {TEXTS},{CHATS} --eval-split validation --max-rows 2000",
        "report.json",
    ),
    Stage(
        "trace",
        "scripts.eval.eval_sft_one_prompt",
        f"{TRACED} --seq-len 512 --trace {{out}}/trace.html --prompt '{STORY}'",
        "trace.html",
    ),
)


@dataclass(frozen=True)
class Quickstart:
    """Folder and size of the quickstart."""

    out: Annotated[Path, "folder of checkpoints, logs, report and trace"] = Path("weights/quickstart")
    scale: Annotated[
        float, "multiplies the steps of every training; 0.05 tries the machinery", "in (0, 100]", "without --full"
    ] = 1.0
    full: Annotated[bool, "the recipe of README.md: 32M parameters, on MiniMind's data, which is downloaded"] = False
    overwrite: Annotated[bool, "start anew although --out holds a quickstart"] = False

    @property
    def stages(self) -> tuple[Stage, ...]:
        return FULL if self.full else SMALL


def main(argv: list[str] | None = None) -> None:
    config, runtime, _ = parse_args(__doc__, Quickstart, RuntimeConfig, argv=argv)
    require_writable(config.out / "quickstart.json", "--out")
    with locked(config.out / "quickstart.lock", "--out"):
        perform_all(config, runtime)


def perform_all(config: Quickstart, runtime: RuntimeConfig) -> None:
    """Run the stages that are not done yet, one after the other."""
    done = open_record(config, runtime)
    print(announcement(config, runtime, done), flush=True)
    if config.full:
        download()
    for number, stage in enumerate(config.stages, start=1):
        heading = f"\n[{number}/{len(config.stages)}] {stage.title}"
        if stage.title in done:
            print(f"{heading}: done before, in {done[stage.title]:.0f} s", flush=True)
            continue
        command = command_of(stage, config, runtime)
        print(f"{heading}\nuv run python -m {stage.module} {shlex.join(command)}", flush=True)
        done[stage.title] = perform(stage.module, command)
        write_record(config, runtime, done)
    print("\n".join(["", *summary(config.out, done)]))


def command_of(stage: Stage, config: Quickstart, runtime: RuntimeConfig) -> list[str]:
    """The flags of a stage, as a user would type them."""
    flags = [flag.replace("{out}", str(config.out)) for flag in shlex.split(stage.flags)]
    if stage.module == "scripts.train.train_tokenizer":
        return [*flags, "--overwrite"] if (config.out / "tokenizer").exists() else flags
    flags += ["--seed", str(runtime.seed), "--device", runtime.device, "--dtype", runtime.dtype]
    if not stage.module.startswith("scripts.train."):
        return flags
    if stage.steps:
        steps = max(round(stage.steps * config.scale), 2)
        flags += ["--max-iters", str(steps), "--warmup-steps", str(min(30, steps // 4))]
    return [*flags, "--resume", "auto"]


def perform(module: str, command: list[str]) -> float:
    """Run a command in this process; returns its seconds."""
    start = time.monotonic()
    try:
        importlib.import_module(module).main(command)
    except Interrupted:
        print("give the command of the quickstart again, without --overwrite, and it goes on from here")
        raise
    return round(time.monotonic() - start, 1)


def announcement(config: Quickstart, runtime: RuntimeConfig, done: dict[str, float]) -> str:
    """The stages to come, and the minutes that they take on this machine."""
    lines = [
        "nano-llada quickstart: an autoregressive (AR) model, a masked-diffusion model, and one that is both (joint)",
        f"learn the same text and are compared. Everything goes to {config.out}; device {runtime.describe()}.",
    ]
    minutes, how = ({}, "") if config.full else estimate(config, runtime, done)
    for number, stage in enumerate(config.stages, start=1):
        told = f"about {minutes[stage.title]:.1f} min" if stage.title in minutes else "says itself how long it takes"
        lines.append(f"  {number}  {stage.title:<36}{'done before' if stage.title in done else told}")
    return "\n".join([*lines, how] if how else lines)


def estimate(config: Quickstart, runtime: RuntimeConfig, done: dict[str, float]) -> tuple[dict[str, float], str]:
    """The minutes of each stage to come, and a sentence on their sum and where it is from; no sentence if none is to
    come."""
    to_come = [stage for stage in config.stages if stage.title not in done]
    if not to_come:
        return {}, ""
    step = seconds_of_a_step(runtime)
    minutes = {
        stage.title: SECONDS[stage.title] * (config.scale if stage.steps else 1) * step / STEP_SECONDS / 60
        for stage in to_come
    }
    how = (
        f"About {sum(minutes.values()):.1f} minutes in all: a training step takes {step:.2f} s here, and took "
        f"{STEP_SECONDS:.2f} s where the stages were timed."
    )
    return minutes, how


# -- the record of finished stages -------------------------------------------------------------------------------------


def open_record(config: Quickstart, runtime: RuntimeConfig) -> dict[str, float]:
    """Seconds of every finished stage whose file is there. ValueError if the folder holds another recipe's work."""
    path, now, done = config.out / "quickstart.json", recipe(config, runtime), {}
    if config.overwrite:  # at once: if interrupted, it must not go on from the old one
        clear(config.stages, config.out)
    elif path.exists():
        record = read_record(path)
        before = record["recipe"]
        differences = [f"{k} was {before.get(k)}, is {v}" for k, v in now.items() if before.get(k) != v]
        if differences:
            raise ValueError(
                f"{config.out} holds a quickstart of another kind ({'; '.join(differences)}): "
                "give --out another folder, or start anew with --overwrite"
            )
        done = record["done"]
    # A stage counts as done only if all before it do.
    finished = list(itertools.takewhile(lambda s: s.title in done and (config.out / s.makes).exists(), config.stages))
    # Weights without the run that wrote them cannot be continued.
    clear([s for s in config.stages[len(finished) :] if not run_file(s, config.out).exists()], config.out)
    done = {stage.title: done[stage.title] for stage in finished}
    write_record(config, runtime, done)
    return done


def clear(stages: Sequence[Stage], folder: Path) -> None:
    """Delete what the stages wrote."""
    for stage in stages:
        run = run_file(stage, folder)
        for path in (folder / stage.makes, run.with_name(f"{run.stem}_best.pt"), run):
            path.unlink(missing_ok=True)


def read_record(path: Path) -> dict[str, Any]:
    """Raise ValueError if the file is not a record of a quickstart."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        seconds = record["done"].values()
        if isinstance(record["recipe"], dict) and all(isinstance(value, float | int) for value in seconds):
            return record
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise ValueError(f"{path} is damaged; delete it and finished trainings are found again, or give --overwrite")


def run_file(stage: Stage, folder: Path) -> Path:
    """The file that a training is resumed from."""
    return folder / stage.makes.replace("_state_dict.pt", ".pt")


def recipe(config: Quickstart, runtime: RuntimeConfig) -> dict[str, Any]:
    """Return what the results depend on."""
    stages = repr([(stage.module, stage.flags, stage.steps) for stage in config.stages])
    return asdict(runtime) | {
        "scale": config.scale,
        "full": config.full,
        "corpus": bundled_file("sft").parent.name,
        "stages": hashlib.sha256(stages.encode()).hexdigest()[:12],
    }


def write_record(config: Quickstart, runtime: RuntimeConfig, done: dict[str, float]) -> None:
    write_json(config.out / "quickstart.json", {"recipe": recipe(config, runtime), "done": done})


def download() -> None:
    """Download the training files that are missing. OSError, with the remedy, if the hub cannot be reached."""
    for path in map(Path, (TEXTS, CHATS)):
        if path.exists():
            continue
        from modelscope.hub.file_download import dataset_file_download

        print(f"\ndownloading {path.name} of {DATASET} from ModelScope", flush=True)
        try:
            dataset_file_download(DATASET, path.name, local_dir=str(path.parent))
        except Exception as error:  # of requests, urllib3 or modelscope itself, as the version has it
            raise OSError(
                f"{path} cannot be downloaded ({type(error).__name__}: {error}); "
                f"put it there yourself, from the dataset {DATASET} on ModelScope"
            ) from None


if __name__ == "__main__":
    run(main)
