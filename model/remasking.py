"""Remasking policies: which predictions of a denoising step are kept, the rest staying [MASK].

A policy ranks the masked positions of a Step, and the best `quota` of each row are committed. To add one: write a
function (Step) -> rank keys (B, L), larger is kept sooner, and list it in POLICIES.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    confidence: Tensor  # (B, L) the model's probability of what it would write
    masked: Tensor  # (B, L) bool, still [MASK]
    quota: int  # tokens to commit in each row
    generator: torch.Generator | None


def low_confidence(step: Step) -> Tensor:
    """LLaDA Alg. 5: the most confident predictions stay."""
    return step.confidence


def random_order(step: Step) -> Tensor:
    """LLaDA Alg. 4: any-order ancestral sampling."""
    device = step.confidence.device if step.generator is None else step.generator.device
    return torch.rand(step.confidence.shape, generator=step.generator, device=device).to(step.confidence.device)


POLICIES: dict[str, Callable[[Step], Tensor]] = {"low_confidence": low_confidence, "random": random_order}


def commit(policy: str, step: Step) -> Tensor:
    """bool (B, L): the `quota` best masked positions of every row; ties go to the left."""
    rank = (
        POLICIES[policy](step)
        .masked_fill(~step.masked, -torch.inf)
        .argsort(dim=1, descending=True, stable=True)
        .argsort(dim=1)
    )
    return step.masked & (rank < step.quota)


def transfer_schedule(num_masked: int, num_steps: int) -> list[int]:
    """Tokens to commit at each step: num_masked spread over num_steps evenly, larger shares first.

    The released LLaDA sampler's split of the s/t schedule; with more steps than tokens, the idle steps are left out.
    """
    num_steps = min(num_steps, num_masked)
    if num_steps == 0:
        return []
    share, rest = divmod(num_masked, num_steps)
    return [share + (step < rest) for step in range(num_steps)]
