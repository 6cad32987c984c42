"""Speed and memory of training: whole optimizer steps on real rows, beside a plain implementation of the same step, and
with one optimisation at a time left out.

The plain step is what such code usually is: float32, a row for each document, padded, PyTorch's fused attention with a
mask of booleans, logits at every position, autograd's cross-entropy, the optimizer in single operations, everything
eager; freed memory it keeps, as ours does. It computes the same loss.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

import torch
from torch import Tensor

import model.attention
from dataset.pretrain import PretrainData, PretrainDataset
from dataset.tokenizer import load_tokenizer, token_ids
from model.attention_mask import causal_attention
from model.block_diffusion import predict
from model.config import ModelConfig
from model.forward_process import StepNoise
from model.losses import forbid, token_nats
from model.masked_diffusion import MaskedDiffusion
from model.objective import NextToken, Objective
from model.transformer import Transformer
from scripts.engine.bench.flops import step_flops
from scripts.engine.bench.timing import Timing, interleave, synchronise
from scripts.engine.runtime import RuntimeConfig, keep_freed_memory, peak_of, to_device
from scripts.engine.training.compiling import compile_layers
from scripts.engine.training.loader import Rows
from scripts.engine.training.optim import OptimConfig, make_optimizers, scale_and_clip

KINDS = ("ar", "full", "block")
PARTS = ("data", "forward", "backward", "optimizer")


@dataclass(frozen=True)
class Made:
    """How a step is made; what a field says is left out where it is False."""

    bfloat16: bool = True
    packing: bool = True
    scored_logits: bool = True  # alone, in chunks, their gradient instead of them kept
    compiled: bool = True
    explicit_attention: bool = True  # at short lengths on a CPU, instead of the fused kernel
    fused_optimizer: bool = True
    kept_memory: bool = True


OURS = Made()
# It keeps its memory, too: what one case gives back to the system, those beside it would have to ask for again.
PLAIN = replace(Made(*[False] * 7), kept_memory=True)
WARM_UP = 2  # turns: the first compiles, and the allocator's store grows until it has room for every size


@dataclass(frozen=True)
class TrainingBenchmarkConfig:
    """Measuring training."""

    kinds: Annotated[tuple[str, ...], "ar = autoregressive, full = diffusion, block = block diffusion"] = KINDS
    batch_size: Annotated[int, "rows per step"] = 8
    block_size: Annotated[int, "of block diffusion"] = 32
    rounds: Annotated[int, "measured steps of every case, which take turns"] = 5
    compile: Annotated[bool, "compile the layers (needs a C++ compiler on a CPU)"] = True

    def __post_init__(self):
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown:
            raise ValueError(f"--kinds: {unknown[0]!r} is none; expected some of {', '.join(KINDS)}")
        for name in ("batch_size", "block_size", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")


def objective_of(kind: str, block_size: int) -> Objective:
    if kind == "ar":
        return NextToken()
    return MaskedDiffusion(block_size=block_size if kind == "block" else 0, variable_length_prob=0.0)


def plain_nats(network: Transformer, prepared: dict[str, Any]) -> Tensor:
    """The loss of NextToken and MaskedDiffusion, summed over the batch, from logits at all positions."""
    ids = prepared["input_ids"]
    everywhere, documents = torch.arange(ids.numel(), device=ids.device), prepared.get("document_ids")
    targets, weight = (torch.zeros(ids.numel(), dtype=d, device=ids.device) for d in (torch.long, torch.float32))
    targets[prepared["positions"]] = prepared["targets"]
    weight[prepared["positions"]] = prepared.get("weight", torch.ones((), device=ids.device))
    if "noised_ids" in prepared:
        logits = predict(network, prepared["noised_ids"], ids, documents, prepared["block_size"], everywhere)
        logits = forbid(logits, network.config.mask_token_id)
    else:
        logits = network(ids, **causal_attention(documents, ids.shape[1])).flatten(0, 1)
    return (token_nats(logits, targets) * weight).sum()


class Case:
    """A model in training, a step at a time. Rows, noise and initial weights are the same in every case."""

    def __init__(self, kind: str, made: Made, config: ModelConfig, rows: Rows, bench: TrainingBenchmarkConfig, runtime):
        self.objective, self.made, self.rows, self.bench = objective_of(kind, bench.block_size), made, rows, bench
        self.device, self.step_number = runtime.torch_device, 0
        self.runtime = runtime if made.bfloat16 else replace(runtime, dtype="float32")
        self.order = rows.order(runtime.seed, bench.batch_size)
        torch.manual_seed(runtime.seed)
        self.network = Transformer(config).to(self.device).train()
        self.parameters = list(self.network.parameters())
        self.optimizers = make_optimizers(self.network, OptimConfig())
        if not made.fused_optimizer:
            groups = self.optimizers[0].param_groups
            keys = {"params", "weight_decay"}
            groups = [{k: v for k, v in group.items() if k in keys} for group in groups]
            self.optimizers = [torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), foreach=False, fused=False)]
        if made.compiled:
            compile_layers(self.network)
        self.parts, self.real, self.padded, self.flops = [], [], [], []

    def turn(self) -> None:
        """Two steps, of which the second counts: the first finds the caches and the allocator as another case left
        them."""
        with self._switched():
            self._step()
            self._step()

    def _step(self) -> None:
        marks, count, device = [time.perf_counter()], self.bench.batch_size, self.device
        batch = self.rows.batch(self.order(self.step_number * count, count))
        noise = StepNoise(self.runtime.seed, self.step_number, count, width=self.rows.seq_len, progress=0.5)
        host = self.objective.prepare(batch, self.network.config, noise)
        prepared = to_device(host, device)
        self._mark(marks)
        with self.runtime.autocast():
            if self.made.scored_logits:
                nats = self.objective.loss(self.network, prepared).nats.sum()
            else:
                nats = plain_nats(self.network, prepared)
        self._mark(marks)
        (nats / batch["input_ids"].numel()).backward()
        self._mark(marks)
        scale_and_clip(self.parameters, torch.ones((), device=device), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._mark(marks)
        self.parts.append([after - before for before, after in zip(marks, marks[1:], strict=False)])
        self.real.append(int((batch["input_ids"] != self.network.config.pad_token_id).sum()))
        self.padded.append(batch["input_ids"].numel())
        self.flops.append(step_flops(self.network.config, host))
        self.step_number += 1

    def _mark(self, marks: list[float]) -> None:
        synchronise(self.device)
        marks.append(time.perf_counter())

    @contextmanager
    def _switched(self) -> Iterator[None]:
        keep_freed_memory(self.made.kept_memory)
        usual = model.attention.EXPLICIT_ATTENTION_KEYS
        model.attention.EXPLICIT_ATTENTION_KEYS = usual if self.made.explicit_attention else 0
        try:
            yield
        finally:
            model.attention.EXPLICIT_ATTENTION_KEYS = usual

    def row(self, rounds: int) -> dict[str, Any]:
        """What is reported of the last `rounds` turns."""
        last = slice(1 - 2 * rounds, None, 2)
        parts = torch.tensor(self.parts[last], dtype=torch.float64)
        timing = Timing(tuple(parts.sum(dim=1).tolist()))
        seconds = timing.median
        real, padded, flops = (sum(values[last]) / rounds for values in (self.real, self.padded, self.flops))
        medians = parts.quantile(0.5, dim=0).tolist()
        return {
            "seconds_per_step": seconds,
            "spread": timing.spread,
            "real_tokens_per_second": real / seconds,
            "padded_tokens_per_second": padded / seconds,
            "flops_per_step": flops,
            "flops_per_second": flops / seconds,
            **{f"{name}_seconds": value for name, value in zip(PARTS, medians, strict=True)},
        }


@dataclass(frozen=True)
class Setting:
    """All that a case is built from, in a form that another process can be given."""

    shape: ModelConfig
    data: PretrainData
    bench: TrainingBenchmarkConfig
    runtime: RuntimeConfig

    def cases(self, kind: str, made: dict[str, Made]) -> dict[str, Case]:
        tokenizer = load_tokenizer(self.data.tokenizer_dir)
        config = replace(self.shape, **token_ids(tokenizer))
        rows = {
            packing: PretrainDataset(replace(self.data, packing=packing), tokenizer).train
            for packing in {one.packing for one in made.values()}
        }
        return {
            name: Case(kind, one, config, rows[one.packing], self.bench, self.runtime) for name, one in made.items()
        }

    def measured(self, kind: str, made: dict[str, Made]) -> dict[str, dict[str, Any]]:
        """Rows by name; every case takes its turn in each round."""
        torch._dynamo.reset()  # lest the shapes of another kind make these dynamic
        cases, rounds = self.cases(kind, made), self.bench.rounds
        for name in cases:
            print(f"{kind}: {name}", file=sys.stderr)
        interleave({name: case.turn for name, case in cases.items()}, rounds, WARM_UP, self.runtime.torch_device)
        return {name: {"kind": kind, "case": name} | case.row(rounds) for name, case in cases.items()}


def take_steps(setting: Setting, kind: str, made: Made) -> None:
    """For `peak_of`."""
    (case,) = setting.cases(kind, {"": made}).values()
    case.turn()


def measure_training(setting: Setting, peaks: dict[str, float]) -> list[dict[str, Any]]:
    """Ours and the plain one, in turns, and the plain one by itself with the allocator as it is usually. peaks: matmul
    operations per second, by dtype."""
    rows, dtype = [], str(setting.runtime.torch_dtype).removeprefix("torch.")
    for kind in setting.bench.kinds:
        made = {"ours": replace(OURS, compiled=setting.bench.compile), "plain": PLAIN}
        usual = {"plain, usual memory": replace(PLAIN, kept_memory=False)}
        found = setting.measured(kind, made) | setting.measured(kind, usual)
        made |= usual
        for name, row in found.items():
            print(f"{kind}: memory of {name}", file=sys.stderr)
            eager = replace(made[name], compiled=False)  # compiling takes memory of its own, once
            row["peak_bytes"] = peak_of(take_steps, setting.runtime.torch_device, setting, kind, eager)
            row["mfu"] = row["flops_per_second"] / peaks[dtype if name == "ours" else "float32"]
            row["speedup"] = row["real_tokens_per_second"] / found["plain"]["real_tokens_per_second"]
        rows += found.values()
    return rows


def measure_ablation(setting: Setting) -> list[dict[str, Any]]:
    """Ours, and ours with one thing left out; they take turns, but for the one that gives memory back."""
    rows, ours = [], replace(OURS, compiled=setting.bench.compile)
    made = {"ours": ours} | {
        f"without {field.name.replace('_', ' ')}": replace(ours, **{field.name: False})
        for field in fields(Made)
        if getattr(ours, field.name)
    }
    unkept = made.popitem()  # by itself, and last
    for kind in setting.bench.kinds:
        found = setting.measured(kind, made) | setting.measured(kind, dict([unkept]))
        for row in found.values():
            row["worth"] = found["ours"]["real_tokens_per_second"] / row["real_tokens_per_second"]
        rows += found.values()
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = "| kind | case | s per step | real tokens/s | padded tokens/s | GFLOP/s |" + "".join(
        f" {name} |" for name in (*PARTS, *EXTRA) if any(name in row or f"{name}_seconds" in row for row in rows)
    )
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for row in rows:
        cells = [row["kind"], row["case"], f"{row['seconds_per_step']:.3f} +- {row['spread']:.0%}"]
        cells += [f"{row[f'{name}_tokens_per_second']:,.0f}" for name in ("real", "padded")]
        cells.append(f"{row['flops_per_second'] / 1e9:,.0f}")
        whole = sum(row[f"{name}_seconds"] for name in PARTS)
        cells += [f"{row[f'{name}_seconds'] / whole:.1%}" for name in PARTS]
        cells += [form(row[name]) for name, form in EXTRA.items() if name in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *(NOTE if "mfu" in rows[0] else [])])


NOTE = [
    "",
    "mfu: operations that a step needs per second, as a share of the best product in that precision; needed are no",
    "padding, no pair of positions that a mask hides, nothing twice, and for the backward pass two forward ones.",
    "Peak memory is that of an eager step, also where the timed one is compiled.",
]
EXTRA = {
    "mfu": lambda share: f"{share:.1%}",
    "speedup": lambda ratio: f"{ratio:.2f}",
    "peak_bytes": lambda number: f"{number / 2**30:.2f} GiB",
    "worth": lambda ratio: f"{ratio:.2f}",
}
