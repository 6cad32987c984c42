"""How noisy each mask schedule's loss and gradient are, for one model and one batch: only the masks are drawn anew.

    uv run python -m scripts.eval.schedule_variance --checkpoint weights/diffusion_state_dict.pt \\
        --data dataset/pretrain_hq.jsonl --batch-size 16 --num-draws 64

Prints, per schedule: the mean loss with its standard error, the standard deviation of a batch's loss, and the variance
of its gradient relative to the squared norm of the mean gradient.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch

from dataset.pretrain import PretrainData, PretrainDataset
from model.forward_process import MASK_SCHEDULES, StepNoise
from model.masked_diffusion import MaskedDiffusion
from model.transformer import Transformer
from scripts.engine.cli import parse_args, run
from scripts.engine.files import require_output, write_json
from scripts.engine.loaded import CheckpointConfig, circumstances
from scripts.engine.runtime import RuntimeConfig, command_line, to_device


@dataclass(frozen=True)
class VarianceConfig:
    """The measurement."""

    checkpoint: Annotated[Path | None, "diffusion checkpoint"] = None
    batch_size: Annotated[int, "rows in the batch", "at least 1"] = 16
    num_draws: Annotated[int, "masks drawn per schedule", "at least 2"] = 64
    json: Annotated[Path | None, "also write the result to this file"] = None


@dataclass(frozen=True)
class Spread:
    mean: float  # nats per token
    standard_error: float
    standard_deviation: float  # of one batch's loss over the masks
    gradient_noise: float  # E |g - E g|^2 / |E g|^2 over the masks


def measure(model: Transformer, batch: dict, schedule: str, draws: int, runtime: RuntimeConfig) -> Spread:
    """Sums of g and |g|^2 over the draws give the gradient's variance, without the bias of its estimated mean."""
    objective = MaskedDiffusion(mask_schedule=schedule, variable_length_prob=0.0)
    losses, squares, rows = [], 0.0, len(batch["input_ids"])
    total = [torch.zeros_like(p) for p in model.parameters()]
    for draw in range(draws):
        model.zero_grad()
        with runtime.autocast():
            prepared = objective.prepare(batch, model.config, StepNoise(runtime.seed, draw, rows))
            loss = objective.loss(model, to_device(prepared, runtime.torch_device))
        value = loss.nats.sum() / loss.count.sum()
        value.backward()
        losses.append(float(value.detach()))
        gradients = [p.grad for p in model.parameters()]
        squares += sum(float(g.square().sum()) for g in gradients)
        torch._foreach_add_(total, gradients)
    of_mean = sum(float(g.square().sum()) for g in total) / draws**2
    variance = (squares / draws - of_mean) * draws / (draws - 1)
    values = torch.tensor(losses, dtype=torch.float64)
    return Spread(
        float(values.mean()),
        float(values.std()) / math.sqrt(draws),
        float(values.std()),
        variance / (of_mean - variance / draws),
    )


def main(argv: list[str] | None = None) -> None:
    config, data, runtime, given = parse_args(__doc__, VarianceConfig, PretrainData, RuntimeConfig, argv=argv)
    given.refuse_without({"character mode": False})
    require_output(config.json, "--json", config.checkpoint, data.data, data.tokenizer_dir)
    checkpoint = CheckpointConfig(config.checkpoint, data.tokenizer_dir, data.max_seq_len)
    loaded = checkpoint.load(runtime)
    model, tokenizer = loaded.model, loaded.tokenizer
    if model.config.attention != "full":
        raise ValueError(
            f"{config.checkpoint} is {loaded.described}; schedules are compared on a diffusion model without blocks, "
            "such as: uv run python -m scripts.train.diffusion --train makes"
        )
    rows = PretrainDataset(data, tokenizer).train
    batch = rows.batch(rows.order(runtime.seed, config.batch_size)(0, config.batch_size))
    result = {name: measure(model, batch, name, config.num_draws, runtime) for name in MASK_SCHEDULES}
    print(f"{'schedule':<12} {'mean loss':>20} {'std of a batch':>15} {'gradient noise':>15}")
    for name, spread in result.items():
        mean = f"{spread.mean:.4f} +- {spread.standard_error:.4f}"
        print(f"{name:<12} {mean:>20} {spread.standard_deviation:>15.4f} {spread.gradient_noise:>15.3f}")
    if config.json:
        written = {
            "spread": {k: asdict(v) for k, v in result.items()},
            **circumstances(command_line(__spec__.name, argv), runtime, tokenizer, data.files, [loaded], config, data),
        }
        write_json(config.json, written)


if __name__ == "__main__":
    run(main)
