"""Small trainings, a folder to run them in, and the count of what they survive."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dataset.corpus.bundled import conversations, pretraining_rows
from dataset.tokenizer import load_tokenizer, save_tokenizer, train_bpe
from tests.soak.processes import Command, Disturbance, nothing
from tests.soak.state import difference_of_runs, temporaries

STEPS = 12  # saves are every 3, validations every 4
SHAPE = (
    "--hidden-size 48 --num-hidden-layers 2 --num-attention-heads 4 --intermediate-size 96 --max-seq-len 48"
    " --batch-size 4 --warmup-steps 2"
)
SHARED = (
    "--tokenizer-dir tokenizer --val-fraction 0.1 --eval-max-batches 10 --dtype float32 --device cpu"
    f" --max-iters {STEPS} --log-interval 1 --eval-interval 4 --save-interval 3"
)
PRETRAINING = f"--data corpus.jsonl {SHAPE} {SHARED}"


@dataclass(frozen=True)
class Recipe:
    """A training: its run, its command, its flags."""

    run: str
    module: str
    flags: str

    def argv(self, save_dir: str, resume: str, *flags: str) -> list[str]:
        return [*self.flags.split(), "--run-name", self.run, "--save-dir", save_dir, "--resume", resume, *flags]


AR = Recipe("ar", "scripts.train.train_pretrain", f"{PRETRAINING} --optimizer muon --ema-decay 0.9 --dropout 0.1")
DIFFUSION = Recipe(
    "diffusion",
    "scripts.train.diffusion",
    f"{PRETRAINING} --train --use-tokenizer --max-new-tokens 4 --gen-steps 2 --mask-schedule iid_t --topk-merge 2"
    " --accumulation-steps 2",
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
    """How often a fault was tried and survived, where it hit, and what was wrong otherwise."""

    part: str
    fault: str
    tries: int = 0
    survived: int = 0
    where: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, where: str, failure: str | None) -> None:
        self.tries += 1
        self.where[where] += 1
        if failure:
            self.failures.append(failure)
        else:
            self.survived += 1


class Workplace:
    """A folder with corpora and a tokenizer, in which each recipe is run undisturbed once, into whole/."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.draw = folder, random.Random(seed)
        self.record = folder / "operations.txt"
        self._operations: dict[Recipe, list[str]] = {}
        texts = pretraining_rows()[:400]
        for name, rows in (("corpus", texts), ("chats", conversations()[:300])):
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        save_tokenizer(train_bpe([row["text"] for row in texts], 400), folder / "tokenizer")
        self.tokenizer = load_tokenizer(folder / "tokenizer")

    def start(
        self, recipe: Recipe, save_dir: str, *flags: str, number: int = 0, action: Callable[[], None] = nothing
    ) -> Command:
        """The recipe's command, which goes on with the run in `save_dir` if there is one, and does `action` before its
        `number`-th file operation there."""
        disturbance = Disturbance(self.folder / save_dir, self.record, number, action)
        return Command(self.folder, recipe.module, recipe.argv(save_dir, "auto", *flags), disturbance)

    def operations(self) -> list[str]:
        """The file operations of the command that was started last."""
        return self.record.read_text(encoding="utf-8").splitlines()

    def whole(self, recipe: Recipe) -> list[str]:
        """Run it undisturbed, unless that has been done; its file operations. ValueError if it fails."""
        if recipe is SFT:
            self.whole(DIFFUSION)
        if recipe not in self._operations:
            ended = self.start(recipe, "whole").wait()
            if ended.code != 0:
                raise ValueError(f"{recipe.module} failed undisturbed: {ended.err.strip()}")
            self._operations[recipe] = self.operations()
        return self._operations[recipe]

    def empty(self, save_dir: str = "parts") -> Path:
        """A folder that does not exist."""
        folder = self.folder / save_dir
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def fault_at_end(self, recipe: Recipe) -> str | None:
        """Let the run in parts/ go on to its end; what differs from the run that was never disturbed."""
        ended = self.start(recipe, "parts").wait()
        if ended.code != 0:
            return f"{recipe.run} could not be continued, exit code {ended.code}: {ended.err.strip()[-500:]}"
        if left := temporaries(self.folder / "parts"):
            return f"{recipe.run} has left {left}"
        return difference_of_runs(self.folder / "whole", self.folder / "parts", recipe.run)
