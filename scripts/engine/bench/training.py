"""Speed and memory of training: whole optimizer steps on real rows, beside a plain implementation of the same step, and
with one optimisation at a time left out.

The plain step is what such code usually is: float32, a row for each document, padded, PyTorch's fused attention with a
mask of booleans, logits at every position, autograd's cross-entropy, the optimizer in single operations, everything
eager; freed memory it keeps, as ours does. It computes the same loss.
"""

import itertools
import sys
import time
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from dataset.pretrain import PretrainData, PretrainDataset
from dataset.tokenizer import load_tokenizer, token_ids
from model import cpu_attention
from model.attention import causal_attention
from model.block_diffusion import denoising_inputs
from model.config import ModelConfig
from model.forward_process import StepNoise
from model.losses import forbid, token_nats
from model.masked_diffusion import MaskedDiffusion
from model.objective import NextToken, Objective
from model.transformer import Transformer
from scripts.engine.bench.flops import step_flops
from scripts.engine.bench.memory import in_own_process, most_resident
from scripts.engine.bench.timing import Row, Timing, synchronise, take_turns
from scripts.engine.runtime import RuntimeConfig, keep_freed_memory, to_device
from scripts.engine.training.compiling import compile_layers
from scripts.engine.training.loader import Rows
from scripts.engine.training.optim import OptimConfig, make_optimizers, scale_and_clip

KINDS = ("ar", "full", "block", "joint")
STEPS = "with --parts training, ablation or scaling"
PARTS = ("data", "forward", "backward", "optimizer")
NEXT_TOKEN_WEIGHT = 0.5  # of joint weights


@dataclass(frozen=True)
class Variant:
    """How a step is made: the optimisations that are in it."""

    bfloat16: bool = True
    packing: bool = True
    scored_logits: bool = True  # logits at scored positions only, in chunks, their gradient kept instead of them
    compiled: bool = True
    explicit_attention: bool = True  # at short lengths on a CPU, instead of the fused kernel
    fused_optimizer: bool = True
    kept_memory: bool = True


OURS = Variant()
# It keeps its memory, too: what one case gives back to the system, those beside it would have to ask for again.
PLAIN = replace(Variant(*[False] * 7), kept_memory=True)
WARM_UP = 2  # turns: the first compiles, and the allocator's store grows until it has room for every size


@dataclass(frozen=True)
class TrainingBenchmarkConfig:
    """Measuring training."""

    kinds: Annotated[
        tuple[Literal[*KINDS], ...],
        "ar = autoregressive, full = diffusion, block = block diffusion, joint = blocks and next tokens",
        STEPS,
    ] = KINDS
    batch_size: Annotated[int, "rows per step", "at least 1", STEPS] = 8
    block_size: Annotated[int, "of block diffusion and joint weights", "at least 1", STEPS] = 32
    rounds: Annotated[int, "measured steps of every case, which take turns", "at least 1", STEPS] = 5
    compile: Annotated[
        bool, "compile the layers (needs a C++ compiler on a CPU)", "with --parts training or ablation"
    ] = True


def objective_of(kind: str, block_size: int) -> Objective:
    if kind == "ar":
        return NextToken()
    weight = NEXT_TOKEN_WEIGHT if kind == "joint" else None
    size = 0 if kind == "full" else block_size
    return MaskedDiffusion(block_size=size, next_token_weight=weight, variable_length_prob=0.0)


def plain_nats(network: Transformer, prepared: dict[str, Any]) -> Tensor:
    """The loss of NextToken and MaskedDiffusion, summed over the batch, from logits at all positions."""
    ids, joint = prepared["input_ids"], prepared.get("joint", False)
    everywhere, documents = torch.arange(ids.numel(), device=ids.device), prepared.get("document_ids")
    targets, weight = (torch.zeros(ids.numel(), dtype=d, device=ids.device) for d in (torch.long, torch.float32))
    targets[prepared["positions"]] = prepared["targets"]
    weight[prepared["positions"]] = prepared.get("weight", torch.ones((), device=ids.device))
    if "noised_ids" in prepared:
        noised_ids, size = prepared["noised_ids"], prepared["block_size"]
        both, attention = denoising_inputs(noised_ids, ids, documents, size, everywhere, joint)
        if joint:  # the clean half, too
            attention["select"] = torch.cat([attention["select"], attention["select"] + ids.shape[1]])
        logits, before_next = network(both, **attention).tensor_split([ids.numel()])
        logits = forbid(logits, network.config.mask_token_id)
    else:
        logits = network(ids, **causal_attention(documents, ids.shape[1])).flatten(0, 1)
    nats = (token_nats(logits, targets) * weight).sum()
    if joint:
        places, share = prepared["next_positions"], prepared["count"] / prepared["next_count"].clamp(min=1)
        of_next = token_nats(before_next, ids.flatten().roll(-1))[places]
        nats = nats + NEXT_TOKEN_WEIGHT * (of_next * share[places // ids.shape[1]]).sum()
    return nats


@dataclass(frozen=True)
class Setting:
    """All that a case is built from, in a form that can be sent to another process."""

    shape: ModelConfig
    data: PretrainData
    bench: TrainingBenchmarkConfig
    runtime: RuntimeConfig


class Case:
    """A model in training, a step at a time. Rows, noise and initial weights are the same in every case."""

    def __init__(self, kind: str, variant: Variant, rows: Rows, setting: Setting):
        runtime, self.batch_size = setting.runtime, setting.bench.batch_size
        self.objective, self.variant, self.rows = objective_of(kind, setting.bench.block_size), variant, rows
        self.runtime = runtime if variant.bfloat16 else replace(runtime, dtype="float32")
        self.order = rows.order(runtime.seed, self.batch_size)
        torch.manual_seed(runtime.seed)
        self.network = Transformer(setting.shape).to(runtime.torch_device).train()
        self.parameters = list(self.network.parameters())
        self.optimizers = make_optimizers(self.network, OptimConfig())
        if not variant.fused_optimizer:
            for group in self.optimizers[0].param_groups:
                group.update(fused=False, foreach=False)
        if variant.compiled:
            compile_layers(self.network)
        self.step_number = 0
        self.steps: list[list[float]] = []  # of each turn: seconds of PARTS, real tokens, all tokens, operations

    def turn(self) -> None:
        """Two steps, of which the second counts: the first finds the caches and the allocator as another case left
        them."""
        keep_freed_memory(self.variant.kept_memory)
        usual = cpu_attention.EXPLICIT_ATTENTION_KEYS
        cpu_attention.EXPLICIT_ATTENTION_KEYS = usual if self.variant.explicit_attention else 0
        try:
            self._step()
            self.steps.append(self._step())
        finally:
            cpu_attention.EXPLICIT_ATTENTION_KEYS = usual

    def _step(self) -> list[float]:
        device, config = self.runtime.torch_device, self.network.config
        marks = [time.perf_counter()]

        def mark() -> None:
            synchronise(device)
            marks.append(time.perf_counter())

        batch = self.rows.batch(self.order(self.step_number * self.batch_size, self.batch_size))
        noise = StepNoise(self.runtime.seed, self.step_number, self.batch_size, width=self.rows.seq_len, progress=0.5)
        host = self.objective.prepare(batch, config, noise)
        prepared = to_device(host, device)
        mark()
        with self.runtime.autocast():
            if self.variant.scored_logits:
                nats = self.objective.loss(self.network, prepared).nats.sum()
            else:
                nats = plain_nats(self.network, prepared)
        mark()
        ids = batch["input_ids"]
        (nats / ids.numel()).backward()
        mark()
        scale_and_clip(self.parameters, torch.ones((), device=device), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        mark()
        self.step_number += 1
        real_tokens = int((ids != config.pad_token_id).sum())
        return [*np.diff(marks).tolist(), real_tokens, ids.numel(), step_flops(config, host)]

    def row(self, rounds: int) -> Row:
        """The results of the last `rounds` turns: medians of seconds, means of counts, shares of the parts."""
        steps = np.array(self.steps[-rounds:])
        seconds, counts = steps[:, : len(PARTS)], steps[:, len(PARTS) :]
        timing = Timing(seconds.sum(axis=1).tolist())
        real, padded, flops = (counts.mean(axis=0) / timing.median).tolist()
        parts = np.median(seconds, axis=0)
        return {
            "s per step": timing.median,
            "spread": timing.spread,
            "real tokens/s": real,
            "padded tokens/s": padded,
            "GFLOP/s": flops / 1e9,
            **dict(zip(PARTS, (parts / parts.sum()).tolist(), strict=True)),
        }


def cases_of(setting: Setting, kind: str, variants: dict[str, Variant]) -> dict[str, Case]:
    tokenizer = load_tokenizer(setting.data.tokenizer_dir)
    setting = replace(setting, shape=replace(setting.shape, **token_ids(tokenizer)))
    rows = {
        packing: PretrainDataset(replace(setting.data, packing=packing), tokenizer).train
        for packing in {variant.packing for variant in variants.values()}
    }
    return {name: Case(kind, variant, rows[variant.packing], setting) for name, variant in variants.items()}


def measured(setting: Setting, variants: dict[str, Variant]) -> dict[tuple[str, str], Row]:
    """Rows by kind and name. Every case of a kind takes its turn in each round; those that give memory back do so after
    the others."""
    rows, rounds = {}, setting.bench.rounds
    for kind, kept in itertools.product(setting.bench.kinds, (True, False)):
        torch._dynamo.reset()  # the shapes of another kind would make these dynamic
        group = {name: variant for name, variant in variants.items() if variant.kept_memory == kept}
        print(f"{kind}: {'; '.join(group)}", file=sys.stderr)
        cases = cases_of(setting, kind, group)
        take_turns({name: case.turn for name, case in cases.items()}, rounds, WARM_UP, setting.runtime.torch_device)
        rows |= {(kind, name): {"kind": kind, "case": name} | case.row(rounds) for name, case in cases.items()}
    return rows


def memory_of_a_turn(setting: Setting, kind: str, variant: Variant) -> int:
    """Bytes that a turn takes at most beyond those that any process takes; for a process of its own."""
    torch.ones(8, 8, requires_grad=True).square().sum().backward()  # the first use loads libraries
    device, before = setting.runtime.torch_device, most_resident()
    cases_of(setting, kind, {"": variant})[""].turn()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return most_resident() - before


def measure_training(setting: Setting, peaks: dict[str, float]) -> list[Row]:
    """Ours, the plain one, and the plain one with the allocator's usual settings, of each kind.

    peaks: GFLOP/s of the best matrix product in each precision.
    """
    ours = replace(OURS, compiled=setting.bench.compile)
    variants = {"ours": ours, "plain": PLAIN, "plain, usual memory": replace(PLAIN, kept_memory=False)}
    rows = measured(setting, variants)
    for (kind, name), row in rows.items():
        print(f"{kind}: memory of {name}", file=sys.stderr)
        eager = replace(variants[name], compiled=False)  # compiling takes memory of its own, once
        dtype = setting.runtime.dtype_name if eager.bfloat16 else "float32"
        row["mfu"] = row["GFLOP/s"] / peaks[dtype]
        row["speedup"] = row["real tokens/s"] / rows[kind, "plain"]["real tokens/s"]
        row["peak GiB"] = in_own_process(memory_of_a_turn, setting, kind, eager)[0] / 2**30
    return list(rows.values())


def measure_ablation(setting: Setting) -> list[Row]:
    """Ours, and ours without one optimisation at a time, of each kind."""
    ours = replace(OURS, compiled=setting.bench.compile)
    names = [field.name for field in fields(Variant) if getattr(ours, field.name)]
    variants = {"ours": ours} | {f"without {n.replace('_', ' ')}": replace(ours, **{n: False}) for n in names}
    rows = measured(setting, variants)
    for (kind, _), row in rows.items():
        row["worth"] = rows[kind, "ours"]["real tokens/s"] / row["real tokens/s"]
    return list(rows.values())
