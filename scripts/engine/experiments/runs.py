"""The trainings that experiments compare: ordinary stage commands, each run once and reused; the documents that they
learn and are measured on; and the measurements, which are remembered beside the weights."""

import heapq
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from dataset.content import content_hash, is_validation
from dataset.corpus.bundled import bundled_file
from dataset.reading.documents import read_documents
from dataset.reading.files import container_of
from dataset.tokenizer import decode, encode, load_tokenizer
from model.config import ModelConfig
from scripts.engine.files import or_none, read_log, sha256_of, write_json, write_text
from scripts.engine.likelihood.documents import evaluate_file
from scripts.engine.likelihood.windows import DataEvalConfig
from scripts.engine.loaded import Loaded, load_for_use
from scripts.engine.runtime import RuntimeConfig
from scripts.engine.training.config import TrainerConfig

STAGES = {  # kind of model -> command and its own flags
    "ar": ("scripts.train.train_pretrain", ()),
    # Only rows of full length and without fill, so that every run sees exactly its number of tokens.
    "diffusion": (
        "scripts.train.diffusion",
        ("--train", "--use-tokenizer", "--variable-length-prob", "0", "--eos-fill", "0", "--max-new-tokens", "1"),
    ),
}
LEARNING = ("--optimizer", "muon", "--lr-stable-ratio", "0.6", "--min-lr-ratio", "0.05", "--tie-embeddings")


@dataclass(frozen=True)
class TrainingsConfig:
    """All trainings."""

    seeds: Annotated[
        tuple[int, ...],
        "training seeds; --seed seeds the masks of the evaluations",
        "in [0, 2^32)",
        "rising",
    ] = (1, 2, 3)
    data: Annotated[Path | None, "corpus, a file of rows or plain text (none: the bundled corpus)"] = None
    jsonl_field: Annotated[str, "field of a row that holds the document"] = "text"
    tokenizer_dir: Annotated[Path | None, "directory of a tokenizer (none: one is trained on --data)"] = None
    target_vocab_size: Annotated[int, "entries of the tokenizer trained", "at least 1", "without --tokenizer-dir"] = (
        2048
    )
    cache_dir: Annotated[Path, "directory for tokenised corpora; may be deleted at any time"] = Path("dataset/.cache")
    val_fraction: Annotated[float, "share of documents held out, by content hash", "in [0, 1)"] = 0.02
    heldout_tokens: Annotated[
        int, "tokens, at most, of the held-out documents that runs are measured on", "at least 1"
    ] = 40_000
    num_samples: Annotated[int, "masks drawn per row for a diffusion bound", "--nmc", "at least 1"] = 8

    def __post_init__(self):
        if self.data is not None:
            container_of(self.data)


@dataclass(frozen=True)
class Recipe:
    """Model and training of every run."""

    hidden_size: Annotated[int, "width of the residual stream", "at least 1"] = 128
    num_hidden_layers: Annotated[int, "transformer layers", "at least 1"] = 4
    num_attention_heads: Annotated[int, "attention heads", "at least 1"] = 4
    max_seq_len: Annotated[int, "tokens per row", "--seq-len", "at least 2"] = 64
    batch_size: Annotated[int, "rows per step", "at least 1"] = 64
    learning_rate: Annotated[float, "peak learning rate", "--lr", "above 0"] = 3e-3
    warmup_steps: Annotated[int, "steps of warm-up, but at most a tenth of a run's", "at least 0"] = 30
    compile: Annotated[bool, "compile the layers; worth it for runs of minutes"] = False

    def __post_init__(self):
        ModelConfig(self.hidden_size, self.num_hidden_layers, self.num_attention_heads)
        TrainerConfig(batch_size=self.batch_size, compile=self.compile)

    def steps(self, tokens: int, flag: str) -> int:
        """Full steps of `tokens`, the value of `flag`. Raise ValueError if there is none."""
        per_step = self.batch_size * self.max_seq_len
        if tokens < per_step:
            raise ValueError(
                f"{flag} {tokens} is less than one step of {self.batch_size} rows of {self.max_seq_len} tokens; "
                "raise it, or lower --batch-size"
            )
        return tokens // per_step

    def flags(self, steps: int) -> list[str]:
        """Return the flags of a training of so many steps."""
        names = "hidden_size", "num_hidden_layers", "num_attention_heads", "max_seq_len", "batch_size", "learning_rate"
        given = [part for name in names for part in ("--" + name.replace("_", "-"), str(getattr(self, name)))]
        warmup = str(min(self.warmup_steps, steps // 10))
        compiled = ["--compile"] if self.compile else []
        return [*given, *LEARNING, "--warmup-steps", warmup, "--max-iters", str(steps), *compiled]


@dataclass(frozen=True)
class Training:
    """A training to run."""

    name: str  # of the run
    kind: str  # of model: "ar" or "diffusion"
    steps: int
    seed: int
    flags: Sequence[str] = ()  # more of the stage
    start: "Run | None" = None  # whose weights it starts from
    data: Path | None = None  # instead of the corpus
    recipe: Recipe | None = None  # instead of that of the lab


@dataclass(frozen=True)
class Run:
    """A finished training."""

    path: Path  # files are <path>_state_dict.pt and so on
    tokens: int  # that it saw according to its log, without padding

    @property
    def weights(self) -> Path:
        return Path(f"{self.path}_state_dict.pt")

    @property
    def best(self) -> Path:
        """The weights at the best validation loss."""
        return Path(f"{self.path}_best.pt")


class Lab:
    """A folder of trainings with one corpus, tokenizer and recipe, and held-out documents to measure them on.

    commands: those that were run, or had been run before, in order.
    judged: file of weights -> SHA-256 of those that were measured.
    heldout: file of documents that no run sees and by which none is selected.
    selection: other documents that no run learns, to choose weights by.
    """

    def __init__(self, folder: Path, config: TrainingsConfig, recipe: Recipe, runtime: RuntimeConfig):
        self.folder, self.config, self.recipe, self.runtime = folder, config, recipe, runtime
        self.source = config.data or bundled_file("pretrain", config.cache_dir)
        self.commands: list[str] = []
        self.judged: dict[str, str] = {}
        self.tokenizer_dir = config.tokenizer_dir or self._train_tokenizer()
        self.tokenizer = load_tokenizer(self.tokenizer_dir)
        self.selection, test = self._held_out(config.heldout_tokens)
        self.heldout = write_documents(folder / "heldout.jsonl", test)

    # -- commands ------------------------------------------------------------------------------------------------------

    def train(self, training: Training) -> Run:
        """The finished run; it is trained, or continued, unless it has ended before."""
        module, own_flags = STAGES[training.kind]
        evaluate = [] if "--eval-interval" in training.flags else ["--eval-interval", str(training.steps)]
        argv = [
            *own_flags,
            *("--data", str(training.data or self.source), *([] if training.data else self._field_flags)),
            *("--val-fraction", str(self.config.val_fraction)),
            *("--tokenizer-dir", str(self.tokenizer_dir), "--cache-dir", str(self.config.cache_dir)),
            *(training.recipe or self.recipe).flags(training.steps),
            *("--seed", str(training.seed), "--device", self.runtime.device, "--dtype", self.runtime.dtype),
            *("--save-dir", str(self.folder), "--run-name", training.name, "--resume", "auto"),
            *("--eval-max-batches", "4", "--save-interval", "250", *evaluate),
            *(("--load-from", str(training.start.weights)) if training.start else ()),
            *training.flags,
        ]
        self.run(training.name, module, argv)
        path = self.folder / training.name
        log = read_log(Path(f"{path}_log.jsonl"))
        return Run(path, [row["tokens"] for row in log if row["event"] == "train"][-1])

    def run(self, name: str, module: str, argv: Sequence[str]) -> None:
        """Run a command to its end, unless it has ended before; one that was interrupted continues.

        Raise ValueError if the folder has another command by this name, or if the command fails.
        """
        command = shlex.join(["uv", "run", "python", "-m", module, *argv])
        self.commands.append(command)
        path = self.folder / f"{name}_command.json"
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"command": command}
        if record["command"] != command:
            raise ValueError(f"{path} is of another command, {record['command']!r}; give its flags, or another --out")
        if record.get("finished"):
            return
        print(command, flush=True)
        write_json(path, {"command": command, "finished": False})
        try:
            launch(module, argv, self.folder / f"{name}_output.txt")
        except ValueError:  # so that it can be tried with other flags
            path.unlink()
            raise
        write_json(path, {"command": command, "finished": True})

    def _train_tokenizer(self) -> Path:
        out, entries = self.folder / "tokenizer", str(self.config.target_vocab_size)
        argv = ["--data", str(self.source), *self._field_flags, "--target-vocab-size", entries, "--out", str(out)]
        self.run("tokenizer", "scripts.train.train_tokenizer", [*argv, "--overwrite"])
        return out

    @property
    def _field_flags(self) -> list[str]:
        return [] if self.config.jsonl_field == "text" else ["--jsonl-field", self.config.jsonl_field]

    # -- measurements --------------------------------------------------------------------------------------------------

    def load(self, weights: Path) -> Loaded:
        return load_for_use(weights, self.tokenizer, self.recipe.max_seq_len, self.runtime)

    def likelihood(self, weights: Path) -> dict[str, Any]:
        """nats_per_token of the held-out documents, exact or bounded; document_error: its standard error over them."""
        settings = {"num_samples": self.config.num_samples}

        def measure() -> dict[str, Any]:
            data = DataEvalConfig(eval_data=self.heldout, **settings)
            likelihood = evaluate_file(self.load(weights), data)["all"]
            return {"nats_per_token": likelihood.nats_per_token, "document_error": or_none(likelihood.standard_error)}

        return self.remember(weights, "likelihood", settings, measure)

    def remember(
        self, weights: Path, what: str, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """measure(), or what it returned before for the same weights, settings and held-out documents."""
        path = weights.with_name(f"{weights.stem}_{what}.json")
        self.judged[str(weights)] = digest = sha256_of(weights)
        settings = settings | {"seed": self.runtime.seed, "dtype": str(self.runtime.torch_dtype)}
        settings |= {"weights_sha256": digest, "heldout_sha256": sha256_of(self.heldout)}
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if record.get("settings") != settings:
            record = {"settings": settings, "values": measure()}
            write_json(path, record)
        return record["values"]

    # -- documents -----------------------------------------------------------------------------------------------------

    def small_corpus(self, rows: int, length: int) -> list[str]:
        """Training documents, a random sample without copies, that packed fill `rows` rows of `length` tokens.

        A number of passes over them is then a number of steps. The last document is cut. Raise ValueError if the corpus
        is too small.
        """
        room, chosen = rows * length, []
        for text in self._documents(False, room):
            text = self._beginning(text, room)
            if text is not None:
                chosen.append(text)
                room -= self._size(text)
            if room < length:  # padding of the last row
                return chosen
        raise ValueError(
            f"{self.source}: its training documents have fewer than the {rows * length:,} tokens to be repeated; "
            "lower --repetition-tokens"
        )

    def _held_out(self, tokens: int) -> tuple[list[str], list[str]]:
        """Two lists of different held-out documents, each of about `tokens` tokens at most: to select by, and to
        measure on. Raise ValueError if there are fewer than two such documents."""
        texts = self._documents(True, 2 * tokens)
        if len(texts) < 2:
            raise ValueError(
                f"{self.source}: --val-fraction {self.config.val_fraction} holds out {len(texts)} documents; raise it "
                "to at least 2"
            )
        return self._first(texts[::2], tokens), self._first(texts[1::2], tokens)

    def _documents(self, held_out: bool, tokens: int) -> list[str]:
        """Different documents of one side, in random order, always the same: all, or enough of them for `tokens`."""

        def side() -> Iterator[str]:
            seen = set()
            for text in read_documents(self.source, self.config.jsonl_field):
                key = content_hash(text)
                if text.strip() and is_validation(text, self.config.val_fraction) == held_out and key not in seen:
                    seen.add(key)
                    yield text

        return heapq.nsmallest(tokens // 3 + 1, side(), key=content_hash)  # a document has at least three tokens

    def _first(self, texts: list[str], tokens: int) -> list[str]:
        """The first documents that together have `tokens` tokens, at least one."""
        chosen, left = [], tokens
        for text in texts:
            left -= self._size(text)
            if chosen and left < 0:
                break
            chosen.append(text)
        return chosen

    def _beginning(self, text: str, room: int) -> str | None:
        """Return the part of a document that fits `room` tokens with BOS and EOS; None if no training document is."""
        if self._size(text) <= room:
            return text
        ids = encode(self.tokenizer, text)
        for end in range(room - 2, 0, -1):
            part = decode(self.tokenizer, ids[:end]).rstrip("\ufffd")  # of a character that was cut
            if part.strip() and not is_validation(part, self.config.val_fraction) and self._size(part) <= room:
                return part
        return None

    def _size(self, text: str) -> int:
        """Tokens of a document with BOS and EOS."""
        return len(encode(self.tokenizer, text)) + 2


def write_documents(path: Path, texts: Sequence[str]) -> Path:
    write_text(path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return path


def launch(module: str, argv: Sequence[str], output: Path) -> None:
    """Run a module as a command of its own, its output appended to a file; SIGTERM is passed on, so that it can save.

    Raise ValueError with the last line of its output if it fails.
    """
    command = [sys.executable, "-m", module, *argv]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # that of this process
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
