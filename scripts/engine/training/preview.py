"""Looking before training: --dry-run and --show-batch."""

import copy
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dataset.rows.pair_formats import SIDES
from dataset.tokenizer import PreTrainedTokenizerFast, decode
from model.config import ModelConfig
from model.forward_process import StepNoise
from model.objective import Objective
from model.transformer import Transformer
from scripts.engine.runtime import to_device
from scripts.engine.training.config import StageConfigs
from scripts.engine.training.loader import Rows

COLOURS = {"masked": "\033[41m", "scored": "\033[42m", "context": "\033[44m", "padding": "\033[100m"}
RESET = "\033[0m"
# In a file or a pipe.
MARKS = {"masked": ("[", "]"), "scored": ("", ""), "context": ("(", ")"), "padding": (".", "")}
TIMED_STEPS, SAMPLED_STEPS = 5, 50


def dry_run(model: Transformer, objective: Objective, rows: Rows, configs: StageConfigs) -> None:
    """Print shapes, parameters, memory and hours; a copy of the model is timed forward and backward."""
    total_steps, device = configs.trainer.total_steps(len(rows)), configs.runtime.torch_device
    for name, parameter in model.named_parameters():
        if not name.startswith("layers.") or name.startswith("layers.0."):
            print(f"  {name:<45} {tuple(parameter.shape)}")
    print(f"  ({model.config.num_hidden_layers} layers, all as layers.0)")
    widest, typical = _widest_and_typical(rows, configs)
    seconds, kept = _timed(model, objective, [widest] + [typical] * TIMED_STEPS, configs)
    seconds_per_step = sum(seconds[1:]) / TIMED_STEPS * configs.trainer.accumulation_steps
    parameters = model.num_parameters()
    print(
        f"parameters {parameters:,}; weights, gradients and optimizer {16 * parameters / 2**30:.2f} GiB; "
        f"a forward pass keeps up to {max(kept) / 2**30:.2f} GiB for its backward pass (counted, {len(kept)} passes)"
    )
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        print(f"measured peak of the device's memory, without the optimizer: {peak / 2**30:.2f} GiB")
    print(
        f"{total_steps:,} steps, {seconds_per_step:.2f} s each without the optimizer (measured, {TIMED_STEPS} passes), "
        f"{total_steps * seconds_per_step / 3600:.2f} hours; nothing was trained"
    )


def _timed(
    model: Transformer, objective: Objective, batches: list[dict[str, torch.Tensor]], configs: StageConfigs
) -> tuple[list[float], list[int]]:
    """Return the seconds of each batch forward and backward, and the bytes that are kept between the two."""
    runtime, device = configs.runtime, configs.runtime.torch_device
    network = copy.deepcopy(model).to(device).train()
    seconds, kept = [], []
    for step, batch in enumerate(batches):
        start = time.perf_counter()
        progress = (step - 0.5) / TIMED_STEPS if step else 0.0  # spread over the run, whose schedules change the work
        with runtime.autocast(), _counted(network) as sizes:
            noise = StepNoise(runtime.seed, step, len(batch["input_ids"]), progress=progress)
            loss = objective.loss(network, to_device(objective.prepare(batch, model.config, noise), device))
        (loss.nats.sum() / loss.count.sum().clamp(min=1)).backward()
        float(loss.nats.detach().sum())  # wait for the device
        seconds.append(time.perf_counter() - start)
        kept.append(sum(sizes.values()))
    return seconds, kept


@contextmanager
def _counted(network: Transformer) -> Iterator[dict[int, int]]:
    """Yield the sizes, by address, of what forward passes inside keep for their backward passes; not of parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    sizes: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        yield sizes


def _widest_and_typical(rows: Rows, configs: StageConfigs) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return, of the first micro-batches of the first steps, the widest and the one nearest to their mean width."""
    trainer, size = configs.trainer, configs.trainer.rows_per_step
    order = rows.order(configs.runtime.seed, size)
    steps = range(min(trainer.total_steps(len(rows)), SAMPLED_STEPS))
    batches = [rows.batch(order(step * size, size)[: trainer.batch_size]) for step in steps]
    widths = np.array([batch["input_ids"].shape[1] for batch in batches])
    return batches[widths.argmax()], batches[np.abs(widths - widths.mean()).argmin()]


def show_batch(
    config: ModelConfig,
    objective: Objective,
    rows: Rows,
    configs: StageConfigs,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Print the rows of --show-step, or four of the first one: what is masked, scored, context and padding, and where
    documents change."""
    step, per_step, seed = configs.run.show_step, configs.trainer.rows_per_step, configs.runtime.seed
    before, count = (step or 1) - 1, per_step if step else min(per_step, 4)
    indices = rows.order(seed, per_step)(before * per_step, count)
    batch = rows.batch(indices)
    documents = batch.get("document_ids", torch.zeros_like(batch["input_ids"]))
    progress = before / configs.trainer.total_steps(len(rows))
    noise = StepNoise(seed, before, per_step, width=rows.seq_len, progress=progress)
    view = objective.view(batch, config, noise)
    marks = {kind: (colour, RESET) for kind, colour in COLOURS.items()} if sys.stdout.isatty() else MARKS
    print("  ".join(f"{start}{kind}{end}" for kind, (start, end) in marks.items()) + "  | document boundary")
    sides = SIDES if len(batch["input_ids"]) > len(indices) else [""]  # pairs: chosen rows before the rejected ones
    for row, (scored, masked) in enumerate(zip(view.scored, view.masked, strict=True)):
        ids = batch["input_ids"][row].tolist()
        kinds = ["masked" if m else "scored" if s else "context" for m, s in zip(masked, scored, strict=True)]
        kinds = ["padding" if id == tokenizer.pad_token_id else kind for id, kind in zip(ids, kinds, strict=True)]
        pieces = []
        for begin, end in _runs(kinds, documents[row].tolist()):
            boundary = "|" if begin and documents[row, begin] != documents[row, begin - 1] else ""
            text = decode(tokenizer, ids[begin:end], skip_special=False).replace("\n", "\\n")
            pieces.append(f"{boundary}{marks[kinds[begin]][0]}{text}{marks[kinds[begin]][1]}")
        counts = f"{int(scored.sum())} scored tokens"
        if view.masked.any():
            counts = f"{int(masked.sum())} masked of {int(scored.sum())} maskable"
        side = f"{sides[row // len(indices)]} ".lstrip()
        print(f"row {indices[row % len(indices)] % len(rows)}: {side}{counts}\n{''.join(pieces)}\n")


def _runs(kinds: list[str], documents: list[int]) -> Iterator[tuple[int, int]]:
    """(begin, end) of what is shown as one piece: a run of context in a document, or any other token."""
    begin = 0
    for i in range(1, len(kinds) + 1):
        if i == len(kinds) or kinds[i - 1 : i + 1] != ["context"] * 2 or documents[i] != documents[i - 1]:
            yield begin, i
            begin = i
