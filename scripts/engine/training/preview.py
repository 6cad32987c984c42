"""Looking before training: --dry-run and --show-batch."""

import copy
import sys
import time

import numpy as np
import torch

from dataset.tokenizer import PreTrainedTokenizerFast, decode
from model.config import ModelConfig
from model.forward_process import StepNoise
from model.objective import Objective
from model.transformer import Transformer
from scripts.engine.runtime import RuntimeConfig, to_device
from scripts.engine.training.loader import Rows
from scripts.engine.training.trainer_config import TrainerConfig

COLOURS = {"masked": "\033[41m", "scored": "\033[42m", "context": "\033[44m", "padding": "\033[100m"}
RESET = "\033[0m"
# Where colours are lost.
MARKS = {"masked": ("[", "]"), "scored": ("", ""), "context": ("(", ")"), "padding": (".", "")}
TIMED_STEPS, SAMPLED_STEPS = 5, 50


def dry_run(
    model: Transformer,
    objective: Objective,
    rows: Rows,
    trainer: TrainerConfig,
    runtime: RuntimeConfig,
    total_steps: int,
) -> None:
    """Print shapes, parameters, memory and hours; a copy of the model is timed forward and backward."""
    widest, typical = _widest_and_typical(rows, trainer, runtime.seed, total_steps)
    for name, parameter in model.named_parameters():
        if not name.startswith("layers.") or name.startswith("layers.0."):
            print(f"  {name:<45} {tuple(parameter.shape)}")
    print(f"  ({model.config.num_hidden_layers} layers, all as layers.0)")
    device = runtime.torch_device
    network = copy.deepcopy(model).to(device).train()
    fed: list[torch.Size] = []  # by what a pass computes: block diffusion feeds more than the batch holds
    network.register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0].shape))
    seconds = []
    for step, batch in enumerate([widest] + [typical] * TIMED_STEPS):
        started, rows_here = time.perf_counter(), len(batch["input_ids"])
        progress = (step - 0.5) / TIMED_STEPS if step else 0.0  # spread over the run, whose schedules change the work
        with runtime.autocast():
            noise = StepNoise(runtime.seed, step, rows_here, progress=progress)
            loss = objective.loss(network, to_device(objective.prepare(batch, model.config, noise), device))
        (loss.nats.sum() / loss.count.sum().clamp(min=1)).backward()
        float(loss.nats.detach().sum())  # wait for the device
        seconds.append(time.perf_counter() - started)
    seconds_per_step = sum(seconds[1:]) / TIMED_STEPS * trainer.accumulation_steps
    parameters, most = model.num_parameters(), max(fed, key=lambda shape: shape.numel() * shape[1])
    tokens, length, scored = most.numel(), most[1], widest["input_ids"].numel()
    width, heads = model.config.hidden_size, model.config.num_attention_heads
    element = runtime.torch_dtype.itemsize
    per_layer = (
        tokens * (10 * width + 3 * model.config.intermediate_size) * element + 2 * tokens * heads * length * element
    )
    logits = 3 * 4 if objective.keeps_logits else element  # bytes of each: themselves, or their gradient alone
    activations = model.config.num_hidden_layers * per_layer + scored * model.config.vocab_size * logits
    print(
        f"parameters {parameters:,}; weights, gradients and optimizer {16 * parameters / 2**30:.2f} GiB; "
        f"activations of one forward pass at most about {activations / 2**30:.2f} GiB"
    )
    if device.type == "cuda":
        print(
            f"measured peak of the device's memory, without the optimizer: "
            f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB"
        )
    print(
        f"{total_steps:,} steps, {seconds_per_step:.2f} s each without the optimizer (measured, {TIMED_STEPS} passes), "
        f"{total_steps * seconds_per_step / 3600:.2f} hours; nothing was trained"
    )


def _widest_and_typical(
    rows: Rows, trainer: TrainerConfig, seed: int, total_steps: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Of the first micro-batches of the first steps the widest, and the one nearest to their mean width."""
    order, size = rows.order(seed, trainer.rows_per_step), trainer.rows_per_step
    steps = range(min(total_steps, SAMPLED_STEPS))
    batches = [rows.batch(order(step * size, size)[: trainer.batch_size]) for step in steps]
    widths = np.array([batch["input_ids"].shape[1] for batch in batches])
    return batches[widths.argmax()], batches[np.abs(widths - widths.mean()).argmin()]


def show_batch(
    tokenizer: PreTrainedTokenizerFast,
    objective: Objective,
    rows: Rows,
    rows_per_step: int,
    config: ModelConfig,
    seed: int,
    step: int | None,
    total_steps: int,
) -> None:
    """Print the rows of a step, or four of the first one: what is masked, scored, context and padding, and where
    documents change."""
    before, shown = ((step or 1) - 1), rows_per_step if step else min(rows_per_step, 4)
    indices = rows.order(seed, rows_per_step)(before * rows_per_step, shown)
    batch = rows.batch(indices)
    documents = batch.get("document_ids", torch.zeros_like(batch["input_ids"]))
    noise = StepNoise(seed, before, rows_per_step, width=rows.seq_len, progress=before / total_steps)
    view = objective.view(batch, config, noise)
    scored, masked = view.scored, view.masked
    marks = {kind: (colour, RESET) for kind, colour in COLOURS.items()} if sys.stdout.isatty() else MARKS
    print("  ".join(f"{before}{kind}{after}" for kind, (before, after) in marks.items()) + "  | document boundary")
    for row in range(len(scored)):
        pieces = []
        for i, token in enumerate(batch["input_ids"][row].tolist()):
            kind = "masked" if masked[row, i] else "scored" if scored[row, i] else "context"
            kind = "padding" if token == tokenizer.pad_token_id else kind
            boundary = "|" if i and documents[row, i] != documents[row, i - 1] else ""
            text = decode(tokenizer, [token], skip_special=False).replace("\n", "\\n")
            pieces.append(f"{boundary}{marks[kind][0]}{text}{marks[kind][1]}")
        counts = f"{int(scored[row].sum())} scored tokens"
        if masked.any():
            counts = f"{int(masked[row].sum())} masked of {int(scored[row].sum())} maskable"
        print(f"row {indices[row % len(indices)] % len(rows)}: {counts}\n{''.join(pieces)}\n")
