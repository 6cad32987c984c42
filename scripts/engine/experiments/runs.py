"""The trainings that experiments compare: ordinary stage commands, each run once and reused, and what is measured on
their weights."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from dataset.tokenizer import PreTrainedTokenizerFast
from model.config import ModelConfig
from scripts.engine.files import or_none, read_log, sha256_of, write_json
from scripts.engine.likelihood.documents import evaluate_file
from scripts.engine.likelihood.windows import DataEvalConfig
from scripts.engine.loaded import Loaded, load_for_use
from scripts.engine.runtime import RuntimeConfig
from scripts.engine.training.optim import OptimConfig
from scripts.engine.training.trainer_config import TrainerConfig

STAGES = {  # kind of model -> command and its own flags
    "ar": ("scripts.train.train_pretrain", ()),
    # Rows of full length alone, so that every run sees just the tokens it is said to see.
    "diffusion": (
        "scripts.train.diffusion",
        ("--train", "--use-tokenizer", "--variable-length-prob", "0", "--max-new-tokens", "1"),
    ),
}
LEARNING = ("--optimizer", "muon", "--lr-stable-ratio", "0.6", "--min-lr-ratio", "0.05", "--tie-embeddings")


@dataclass(frozen=True)
class Recipe:
    """Model and training of every run."""

    hidden_size: Annotated[int, "width of the residual stream"] = 128
    num_hidden_layers: Annotated[int, "transformer layers"] = 4
    num_attention_heads: Annotated[int, "attention heads"] = 4
    max_seq_len: Annotated[int, "tokens per row", "--seq-len"] = 64
    batch_size: Annotated[int, "rows per step"] = 64
    learning_rate: Annotated[float, "peak learning rate", "--lr"] = 3e-3
    warmup_steps: Annotated[int, "steps of warm-up, but at most a tenth of a run's"] = 30
    compile: Annotated[bool, "compile the layers; worth it for runs of minutes"] = False

    def __post_init__(self):
        ModelConfig(self.hidden_size, self.num_hidden_layers, self.num_attention_heads)
        OptimConfig(learning_rate=self.learning_rate, warmup_steps=self.warmup_steps)
        TrainerConfig(batch_size=self.batch_size, compile=self.compile)
        if self.max_seq_len < 2:
            raise ValueError(f"--max-seq-len {self.max_seq_len}: expected at least 2 tokens per row")

    def steps(self, tokens: int, flag: str) -> int:
        """Full steps that `tokens`, given by `flag`, are enough for; ValueError if for none."""
        per_step = self.batch_size * self.max_seq_len
        if tokens < per_step:
            raise ValueError(
                f"{flag} {tokens} is less than one step of {self.batch_size} rows of {self.max_seq_len} tokens; "
                "raise it, or lower --batch-size"
            )
        return tokens // per_step

    def flags(self, steps: int) -> list[str]:
        shape = "hidden_size", "num_hidden_layers", "num_attention_heads", "max_seq_len", "batch_size", "learning_rate"
        given = [part for name in shape for part in ("--" + name.replace("_", "-"), str(getattr(self, name)))]
        warmup = str(min(self.warmup_steps, steps // 10))
        compiled = ["--compile"] if self.compile else []
        return [*given, *LEARNING, "--warmup-steps", warmup, "--max-iters", str(steps), *compiled]


@dataclass(frozen=True)
class Run:
    """A finished training."""

    path: Path  # files are <path>_state_dict.pt and so on
    tokens: int  # that it saw, padding not counted, by its log

    @property
    def weights(self) -> Path:
        return Path(f"{self.path}_state_dict.pt")

    @property
    def best(self) -> Path:
        """The weights at the best validation loss."""
        return Path(f"{self.path}_best.pt")


@dataclass
class Lab:
    """A folder of runs with one recipe. `commands` lists what was run, or had been run before, in order; `judged` the
    files of weights that were measured, and their SHA-256."""

    folder: Path
    source: Path  # corpus
    jsonl_field: str
    val_fraction: float
    cache_dir: Path
    recipe: Recipe
    runtime: RuntimeConfig
    commands: list[str] = field(default_factory=list)
    judged: dict[str, str] = field(default_factory=dict)

    def run(self, name: str, module: str, argv: Sequence[str]) -> None:
        """Run a command to its end, unless it has ended before; one that was cut off goes on. ValueError if the folder
        knows another command by this name, or if it fails."""
        command = shlex.join(["uv", "run", "python", "-m", module, *argv])
        self.commands.append(command)
        record = self.folder / f"{name}_command.json"
        known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {"command": command}
        if known["command"] != command:
            raise ValueError(f"{record} is of another command, {known['command']!r}; give its flags, or another --out")
        if known.get("finished"):
            return
        print(command, flush=True)
        write_json(record, {"command": command, "finished": False})
        try:
            launch(module, argv, self.folder / f"{name}_output.txt")
        except ValueError:  # so that it can be tried with other flags
            record.unlink()
            raise
        write_json(record, {"command": command, "finished": True})

    def tokenizer(self, entries: int) -> Path:
        """The folder of a tokenizer of so many entries, trained on the corpus."""
        out = self.folder / "tokenizer"
        more = [] if self.jsonl_field == "text" else ["--jsonl-field", self.jsonl_field]
        argv = ["--data", str(self.source), *more, "--target-vocab-size", str(entries), "--out", str(out)]
        self.run("tokenizer", "scripts.train.train_tokenizer", [*argv, "--overwrite"])
        return out


@dataclass(frozen=True)
class Bench:
    """A lab with a tokenizer and held-out documents to measure on."""

    lab: Lab
    tokenizer_dir: Path
    tokenizer: PreTrainedTokenizerFast
    heldout: Path  # documents that no run sees, and that none is selected by
    selection: Sequence[str]  # other documents that no run learns, to choose weights by
    num_samples: int  # masks per row for a diffusion bound

    def train(
        self,
        name: str,
        kind: str,
        steps: int,
        seed: int,
        *more: str,
        start: Run | None = None,
        data: Path | None = None,
    ) -> Run:
        """A run of `kind` ("ar" or "diffusion"), from `start`'s weights if given, on `data` instead of the corpus."""
        lab, (module, own) = self.lab, STAGES[kind]
        field_flags = [] if data or lab.jsonl_field == "text" else ["--jsonl-field", lab.jsonl_field]
        argv = [
            *own,
            *("--data", str(data or lab.source), *field_flags, "--val-fraction", str(lab.val_fraction)),
            *("--tokenizer-dir", str(self.tokenizer_dir), "--cache-dir", str(lab.cache_dir)),
            *lab.recipe.flags(steps),
            *("--seed", str(seed), "--device", lab.runtime.device, "--dtype", lab.runtime.dtype),
            *("--save-dir", str(lab.folder), "--run-name", name, "--resume", "auto"),
            *("--eval-max-batches", "4", "--save-interval", "250"),
            *(() if "--eval-interval" in more else ("--eval-interval", str(steps))),
            *(("--load-from", str(start.weights)) if start else ()),
            *more,
        ]
        lab.run(name, module, argv)
        path = lab.folder / name
        log = read_log(Path(f"{path}_log.jsonl"))
        return Run(path, [row["tokens"] for row in log if row["event"] == "train"][-1])

    def load(self, weights: Path) -> Loaded:
        return load_for_use(weights, self.tokenizer, self.lab.recipe.max_seq_len, self.lab.runtime)

    def remember(
        self, weights: Path, what: str, settings: dict[str, Any], make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """make(), or what it returned when last asked for `what` of these weights with these settings."""
        path, runtime = weights.with_name(f"{weights.stem}_{what}.json"), self.lab.runtime
        self.lab.judged[str(weights)] = of_weights = sha256_of(weights)
        settings = settings | {"seed": runtime.seed, "dtype": str(runtime.torch_dtype)}
        settings |= {"weights_sha256": of_weights, "heldout_sha256": sha256_of(self.heldout)}
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if known.get("settings") != settings:
            known = {"settings": settings, "values": make()}
            write_json(path, known)
        return known["values"]

    def likelihood(self, weights: Path) -> dict[str, Any]:
        """nats_per_token of the held-out documents, exact or bounded; document_error: its standard error over them."""

        def measure() -> dict[str, Any]:
            data = DataEvalConfig(eval_data=self.heldout, num_samples=self.num_samples)
            found = evaluate_file(self.load(weights), data)["all"]
            return {"nats_per_token": found.nats_per_token, "document_error": or_none(found.standard_error)}

        return self.remember(weights, "likelihood", {"num_samples": self.num_samples}, measure)


def launch(module: str, argv: Sequence[str], output: Path) -> None:
    """Run a module as a command of its own, its output appended to a file. ValueError with its last line if it fails;
    stopped with us, by SIGTERM, it saves itself first."""
    command = [sys.executable, "-m", module, *argv]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # ours, wherever we are
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with output.open("ab") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environment) as process:
            try:
                code = process.wait()
            except SystemExit:
                process.terminate()
                raise
    finally:
        signal.signal(signal.SIGTERM, previous)
    if code:
        lines = output.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        raise ValueError(f"{module} ended with exit code {code} ({output}): {last.strip()}")
