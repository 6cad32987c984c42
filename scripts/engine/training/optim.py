"""Optimizers, learning-rate schedules and the moving average of the weights; all functions of the step."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from scripts.engine.training.distributed import is_sharded, shards_like


@dataclass(frozen=True)
class OptimConfig:
    """Optimisation."""

    title = "Optimisation"

    learning_rate: Annotated[float, "peak learning rate", "--lr", "above 0"] = 1e-3
    weight_decay: Annotated[
        float, "decay of the matrices; norms and the embedding, tied or not, have none", "at least 0"
    ] = 0.1
    lr_schedule: Annotated[
        Literal["wsd", "cosine"], "after the warm-up: stay, then fall linearly; or fall along a cosine"
    ] = "wsd"
    warmup_steps: Annotated[int, "steps of linear warm-up (left out: at most a tenth of the run)", "at least 0"] = 200
    lr_stable_ratio: Annotated[
        float, "share of the steps after the warm-up spent at the peak", "in [0, 1]", "with --lr-schedule wsd"
    ] = 0.8
    min_lr_ratio: Annotated[float, "last learning rate as a share of the peak", "in [0, 1]"] = 0.1
    grad_clip: Annotated[float, "largest gradient norm (0 = no clipping)", "at least 0"] = 1.0
    optimizer: Annotated[
        Literal["adamw", "muon"], "muon: torch.optim.Muon for the layers' matrices, AdamW for the rest"
    ] = "adamw"
    ema_decay: Annotated[
        float, "moving average of the weights, used for validation and in the weights written (0 = off)", "in [0, 1)"
    ] = 0.0


@dataclass(frozen=True)
class SFTOptimConfig(OptimConfig):
    """Optimisation of fine-tuning, with two more names for its schedule."""

    min_lr_ratio: Annotated[float, "last learning rate as a share of the peak", "--final-lr-ratio", "in [0, 1]"] = 0.1
    final_decay_ratio: Annotated[
        float | None,
        "share of the steps after the warm-up in which the rate falls (none: 1 - --lr-stable-ratio)",
        "in [0, 1]",
        "with --lr-schedule wsd",
    ] = None

    def __post_init__(self):
        if self.final_decay_ratio is not None:
            object.__setattr__(self, "lr_stable_ratio", 1 - self.final_decay_ratio)


def lr_at(step: int, total_steps: int, config: OptimConfig) -> float:
    """Return the learning rate of a step, the first being 0; a pure function, so that resuming needs no state."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    after = total_steps - config.warmup_steps
    start = config.warmup_steps + (round(after * config.lr_stable_ratio) if config.lr_schedule == "wsd" else 0)
    progress = min(max(step + 1 - start, 0) / max(total_steps - start, 1), 1.0)
    share = 1 - progress if config.lr_schedule == "wsd" else (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)


def make_optimizers(model: torch.nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """Return AdamW for all parameters, or Muon for the matrices inside the layers and AdamW for the rest.

    Norms do not decay, nor does the embedding: rows that a stage never sees would shrink to nothing, [MASK] in
    autoregressive pretraining for one, which diffusion then starts from.
    """
    named = list(model.named_parameters())
    inner = [p for n, p in named if p.ndim == 2 and n.startswith("layers.")]
    head = [p for n, p in named if p.ndim == 2 and not n.startswith(("layers.", "embed_tokens."))]
    rest = [p for n, p in named if p.ndim < 2 or n.startswith("embed_tokens.")]
    muon = config.optimizer == "muon"
    groups = [
        {"params": head if muon else inner + head, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
    if not muon:
        return [adamw]
    # match_rms_adamw: updates as large as AdamW's, so that one learning rate serves both.
    return [
        torch.optim.Muon(
            inner, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        adamw,
    ]


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load a state_dict of whole tensors, of which a sharded parameter keeps its shard."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: shards_like(values, dict.fromkeys(values, parameters[number])) if number < len(parameters) else values
        for number, values in saved["state"].items()
    }
    optimizer.load_state_dict(saved | {"state": state})


class MovingAverage:
    """shadow = d * shadow + (1 - d) * weights, with d = min(decay, (1 + n) / (10 + n)) at the n-th update."""

    def __init__(self, model: torch.nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.shadow.values()), [p.detach() for p in model.parameters()], 1 - decay)

    @torch.no_grad()
    def swap(self, model: torch.nn.Module) -> None:
        """Exchange the weights and their average; a second call exchanges them back."""
        for name, parameter in model.named_parameters():
            weights = parameter.detach().clone()
            parameter.copy_(self.shadow[name])
            self.shadow[name].copy_(weights)


def scale_and_clip(parameters: list[Tensor], scale: Tensor, max_norm: float) -> Tensor:
    """Multiply the gradients by `scale`, clip their norm to `max_norm` (0 = not at all), and return the unclipped norm.

    One pass over the gradients and no wait for the device.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = total_norm(gradients) * scale
    factor = scale * (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm else scale
    torch._foreach_mul_(gradients, factor)
    return norm


def total_norm(tensors: list[Tensor]) -> Tensor:
    """Return the norm of all tensors together, (), also of sharded ones."""
    norm = torch.nn.utils.get_total_norm(tensors)
    return norm.full_tensor() if is_sharded(norm) else norm


def step_if(optimizer: torch.optim.Optimizer, sound: Tensor) -> None:
    """Take the step if `sound`, () bool; else change neither weights nor moments.

    A fused optimizer reads the flag on the device, as it reads a GradScaler's; for others the host waits for it.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = (~sound).float()
        optimizer.step()
        del optimizer.found_inf
    elif sound:
        optimizer.step()
