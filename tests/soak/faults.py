"""Trainings that are killed again and again and must end as the run that was not."""

import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dataset.corpus.bundled import conversations, pretraining_rows
from dataset.tokenizer import load_tokenizer, save_tokenizer, train_bpe
from model.checkpoint import load_checkpoint
from tests.soak.processes import Command, Disturbance, Ended, FallingClock, die, forks, nothing, temporaries
from tests.soak.state import difference_of_runs, unsound

STEPS = 12
EVERY = 4  # steps between validations; saves are every 3
SHAPE = (
    "--hidden-size 48 --num-hidden-layers 2 --num-attention-heads 4 --intermediate-size 96 --max-seq-len 48"
    " --batch-size 4 --warmup-steps 2"
)
SHARED = (
    f"--tokenizer-dir tokenizer --val-fraction 0.1 --eval-max-batches 10 --dtype float32 --device cpu"
    f" --max-iters {STEPS} --log-interval 1 --eval-interval {EVERY} --save-interval 3"
)
KILLS_PER_RUN = 12  # at most; then it may end
ALONE = 0.08  # share of the kills that meet processes started as users start them


@dataclass(frozen=True)
class Recipe:
    """A training: its run, its command, its flags."""

    run: str
    module: str
    flags: str

    def argv(self, save_dir: str, *more: str) -> list[str]:
        return [*self.flags.split(), "--run-name", self.run, "--save-dir", save_dir, *more]


PRETRAINING = f"--data corpus.jsonl {SHAPE} {SHARED}"
DECODING = "--train --use-tokenizer --max-new-tokens 4 --gen-steps 2"
AR = Recipe("ar", "scripts.train.train_pretrain", f"{PRETRAINING} --optimizer muon --ema-decay 0.9 --dropout 0.1")
DIFFUSION = Recipe(
    "diffusion",
    "scripts.train.diffusion",
    f"{PRETRAINING} {DECODING} --mask-schedule iid_t --topk-merge 2 --accumulation-steps 2",
)
SFT = Recipe(
    "sft",
    "scripts.train.train_sft_diffusion",
    f"--data chats.jsonl --max-seq-len 64 --batch-size 4 --warmup-steps 2 {SHARED} --eos-fill 6 --ema-decay 0.9"
    " --load-from whole/diffusion_state_dict.pt",
)
RECIPES = (AR, DIFFUSION, SFT)  # the last starts from the one before it


@dataclass
class Outcome:
    """How often a fault was tried and survived, where it hit, and what was wrong where it was not."""

    part: str
    fault: str
    tries: int = 0
    survived: int = 0
    where: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    note: str = ""

    def add(self, where: str, failure: str | None) -> None:
        self.hit(where)
        self.survived += failure is None
        self.failures += [failure] if failure else []

    def hit(self, where: str) -> None:
        self.tries += 1
        self.where[where] = self.where.get(where, 0) + 1


@dataclass(frozen=True)
class Undisturbed:
    """A recipe's run from beginning to end: how long it took, and which files it opened, renamed and deleted."""

    seconds: float
    operations: list[str]


class Workplace:
    """A folder with corpora and a tokenizer, in which each recipe is run undisturbed once, into whole/."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.draw = folder, random.Random(seed)
        self._known: dict[str, Undisturbed] = {}
        self._alone = 0.0
        texts = pretraining_rows()[:400]
        for name, rows in (("corpus", texts), ("chats", conversations()[:300])):
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        save_tokenizer(train_bpe([row["text"] for row in texts], 400), folder / "tokenizer")
        self.tokenizer = load_tokenizer(folder / "tokenizer")

    @property
    def record(self) -> Path:
        return self.folder / "operations.txt"

    def start(
        self,
        recipe: Recipe,
        save_dir: str,
        *more: str,
        before: Callable[[], None] = nothing,
        action: Callable[[], None] = nothing,
        number: int = 0,
        alone: bool = False,
    ) -> Command:
        """The recipe's command, with --resume must where there is something to continue, else auto. It does `before`
        when it begins, `action` before its `number`-th file operation in `save_dir`; neither if it is started alone."""
        resume = "must" if (self.folder / save_dir / f"{recipe.run}.pt").exists() else "auto"
        disturbance = None if alone else Disturbance(before, self.folder / save_dir, self.record, number, action)
        argv = recipe.argv(save_dir, "--resume", resume, *more)
        return Command(self.folder, recipe.module, argv, disturbance, alone)

    def whole(self, recipe: Recipe) -> Undisturbed:
        """Run it undisturbed, unless that has been done. ValueError if it fails."""
        if recipe is SFT:
            self.whole(DIFFUSION)
        if recipe.run not in self._known:
            forks()  # whose start is no part of the time
            began = time.monotonic()
            ended = self.start(recipe, "whole").wait()
            seconds = time.monotonic() - began
            if ended.code != 0:
                raise ValueError(f"{recipe.module} failed undisturbed: {ended.err.strip()}")
            operations = self.record.read_text(encoding="utf-8").splitlines()
            self._known[recipe.run] = Undisturbed(seconds, operations)
        return self._known[recipe.run]

    def start_up(self) -> float:
        """Seconds until a command that is started as users start it has loaded what it needs; measured once."""
        if not self._alone:
            began = time.monotonic()
            Command(self.folder, AR.module, AR.argv("whole", "--resume", "auto", "--dry-run"), alone=True).wait()
            self._alone = time.monotonic() - began
        return self._alone

    def anew(self, save_dir: str = "parts") -> Path:
        folder = self.folder / save_dir
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def finish(self, recipe: Recipe, save_dir: str = "parts") -> str | None:
        """Let the run go on to its end; what is not as in the run that was never disturbed."""
        ended = self.start(recipe, save_dir).wait()
        if ended.code != 0:
            return f"{recipe.run} could not be continued, exit code {ended.code}: {ended.err.strip()[-500:]}"
        left = temporaries(self.folder / save_dir)
        if left:
            return f"{recipe.run} has left {sorted(left)}"
        return difference_of_runs(self.folder / "whole", self.folder / save_dir, recipe.run)


def phase(ended: Ended, folder: Path, before: set[tuple[str, int]]) -> str:
    """What a killed training was doing, by the files that it has left half-written and the lines that it has said."""
    if temporaries(folder) - before:
        return "saving"
    said = re.findall(r"^(step \d+: (?:train|val)|saved \S+(?: \(step \d+\))?)", ended.out, re.MULTILINE)
    if not said:
        return "starting"
    step = re.search(r"\(step (\d+)\)", said[-1])
    if step and int(step[1]) % EVERY == 0:
        return "evaluating"
    return "finishing" if said[-1].startswith("saved") and not step else "training"


def training(place: Workplace, kills: int, recipes: tuple[Recipe, ...] = RECIPES) -> Iterator[Outcome]:
    """SIGKILL at random moments, `kills` times in all, and --resume must after each."""
    for number, recipe in enumerate(recipes):
        share = kills * (number + 1) // len(recipes) - kills * number // len(recipes)
        outcome = Outcome("training", f"SIGKILL, {recipe.module.rpartition('.')[2]}")
        while outcome.tries < share and len(outcome.failures) < 5:
            _kill_one_run(place, recipe, share - outcome.tries, outcome)
        yield outcome


def clock(place: Workplace, tries: int) -> Iterator[Outcome]:
    """A clock that falls at every look, files of any age, and a kill in the middle."""
    outcome = Outcome("clock", "time goes backwards")
    for number in range(tries):
        recipe = RECIPES[number % len(RECIPES)]
        known, folder = place.whole(recipe), place.anew()
        step = place.draw.choice((0.1, 60.0, 86400.0))
        moment = place.draw.randint(1, len(known.operations))
        ended = place.start(recipe, "parts", before=FallingClock(step), action=die, number=moment).wait()
        for path in (*folder.iterdir(), place.folder / "corpus.jsonl", place.folder / "chats.jsonl"):
            age = place.draw.randrange(0, 2**32)
            os.utime(path, (age, age))
        fault = None if ended.killed or ended.code == 0 else f"exit code {ended.code}: {ended.err.strip()[-500:]}"
        outcome.add(f"{step:g} s at every look", fault or place.finish(recipe))
    yield outcome


def _kill_one_run(place: Workplace, recipe: Recipe, kills: int, outcome: Outcome) -> None:
    """One run from its start to its end, killed up to `kills` times on the way."""
    folder, hits, fault = place.anew(), [], None
    for _ in range(min(kills, place.draw.randint(3, KILLS_PER_RUN))):
        before = temporaries(folder)
        ended = _strike(place, recipe, folder)
        if ended.code == 0:
            break
        if not ended.killed:
            fault = f"exit code {ended.code}: {ended.err.strip()[-500:]}"
            break
        hits.append(phase(ended, folder, before))
        fault = unsound(folder, recipe.run)
        if fault:
            break
    fault = fault or place.finish(recipe)
    if fault:
        outcome.failures.append(f"after {', '.join(hits) or 'no kill'}: {fault}")
        _keep(folder)
    for hit in hits:
        outcome.hit(hit)
    outcome.survived += 0 if fault else len(hits)


def _strike(place: Workplace, recipe: Recipe, folder: Path) -> Ended:
    """Start the run, or go on with it, and kill it: before a file operation, while it saves or evaluates, or at any
    time."""
    known, draw = place.whole(recipe), place.draw
    state = folder / f"{recipe.run}.pt"
    step = load_checkpoint(state)["step"] if state.exists() else 0
    left = 1 - step / STEPS
    if draw.random() < ALONE:
        seconds = place.start_up() + draw.uniform(-0.5, 1) * known.seconds
        return place.start(recipe, "parts", alone=True).kill_after(max(seconds, 0))
    how = draw.choice(("operation", "save", "save", "evaluation", "evaluation", "time"))
    if how == "operation":
        number = draw.randint(1, max(1, round(left * len(known.operations))))
        return place.start(recipe, "parts", action=die, number=number).wait()
    command = place.start(recipe, "parts")
    if how == "evaluation":  # the state is saved just before
        step = draw.randrange(step // EVERY * EVERY + EVERY, STEPS + EVERY, EVERY) if step < STEPS else STEPS
        return command.kill_when_said(f"(step {step})", draw.uniform(0, 0.01))
    if how == "save":
        return command.kill_in_save(folder, draw.randint(1, max(1, round(left * STEPS / 2))), draw.expovariate(300))
    return command.kill_after(draw.uniform(0, left * known.seconds))


def _keep(folder: Path) -> None:
    """What a failure has left, for whoever looks into it."""
    shutil.copytree(folder, folder.with_name(f"failed_{time.monotonic_ns()}"), dirs_exist_ok=True)
