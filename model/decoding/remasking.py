"""Remasking policies: which predictions of a denoising step are kept; the rest stays [MASK].

None of them takes back a token that was written. A policy looks at a Step and returns rank keys (R, W), larger is
kept sooner, and how many to keep in each row (R,); at least one is kept, whatever it says. To add one: write a
function (Step) -> (keys, numbers) and list it in POLICIES; flags, decoder and tests take it from there.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """Predictions at the masked positions of the active blocks of R rows, from left to right, padded to W."""

    confidence: Tensor  # (R, W) float32, of what would be written; see DecodingStep; 0 for an EOS held back
    masked: Tensor  # (R, W) bool, False on padding; N are True
    held_back: Tensor  # (R, W) bool, an EOS that comes after every other candidate of its row
    quota: Tensor  # (R,) int64, tokens to keep by the transfer schedule
    budget: Tensor  # (R,) int64, the most that a policy without a schedule may keep
    threshold: float  # of `threshold` and `hybrid`
    factor: float  # of `factor`
    entropy_bound: float  # of `entropy_bound`
    logits: Tensor  # (N, V) at the masked positions, row by row
    noise: Callable[[], Tensor]  # () -> (N,) uniform in [0, 1), each row's from its own generator

    def padded(self, values: Tensor) -> Tensor:
        """values (N,) at the masked positions -> (R, W)."""
        return padded(values, self.masked)


def padded(values: Tensor, masked: Tensor) -> Tensor:
    """values (N,) where masked (R, W) is True, row by row -> (R, W), 0 elsewhere, on the device of `masked`."""
    values = values.to(masked.device)
    if len(values) == masked.numel():
        return values.view(masked.shape)
    return torch.zeros(masked.shape, dtype=values.dtype, device=masked.device).masked_scatter_(masked, values)


Choice = tuple[Tensor, Tensor]


def low_confidence(step: Step) -> Choice:
    """LLaDA Alg. 5: the most confident predictions stay."""
    return step.confidence, step.quota


def random_order(step: Step) -> Choice:
    """LLaDA Alg. 4: any-order ancestral sampling."""
    return step.padded(step.noise()), step.quota


def margin(step: Step) -> Choice:
    """The largest lead of the likeliest token over the second stays."""
    first, second = step.logits.float().softmax(dim=-1).topk(2, dim=-1).values.unbind(dim=-1)
    return step.padded(first - second), step.quota


def entropy(step: Step) -> Choice:
    """The distributions of least entropy stay."""
    return -_entropies(step), step.quota


def entropy_bound(step: Step) -> Choice:
    """DiffusionGemma: from the least entropy up, a prediction stays while the entropies of those before it add up to no
    more than the bound, which limits what is lost by drawing them independently."""
    spread = _entropies(step)
    before = F.pad(spread.gather(1, ranking(-spread, step)).cumsum(dim=1)[:, :-1], (1, 0))
    return -spread, (before <= step.entropy_bound).sum(dim=1)


def _entropies(step: Step) -> Tensor:
    """(R, W), in nats."""
    return step.padded(torch.special.entr(step.logits.float().softmax(dim=-1)).sum(dim=-1))


def left_to_right(step: Step) -> Choice:
    """The order of reading."""
    return -torch.arange(step.masked.shape[1], device=step.masked.device).expand(step.masked.shape).float(), step.quota


def threshold(step: Step) -> Choice:
    """Fast-dLLM: all predictions at least as confident as the threshold stay."""
    confident = (step.masked & (step.confidence >= step.threshold)).sum(dim=1)
    return step.confidence, confident.minimum(step.budget)


def factor(step: Step) -> Choice:
    """Fast-dLLM, Theorem 1: the n most confident stay, n the largest with c_(n) >= 1 - factor / (n + 1)."""
    ranked = step.confidence.masked_fill(~step.masked, -torch.inf).sort(dim=1, descending=True).values
    n = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
    confident = (ranked >= 1 - step.factor / (n + 1)).sum(dim=1)  # the bound rises while the ranked fall
    return step.confidence, confident.minimum(step.budget)


def hybrid(step: Step) -> Choice:
    """LLaDA 2.0, section 5.4: as `threshold`, but no fewer than the schedule says, so that it bounds the steps. The
    budget does not apply: there is a least number to keep and no greatest."""
    confident = (step.masked & (step.confidence >= step.threshold)).sum(dim=1)
    return step.confidence, confident.maximum(step.quota)


POLICIES: dict[str, Callable[[Step], Choice]] = {
    "low_confidence": low_confidence,
    "random": random_order,
    "threshold": threshold,
    "factor": factor,
    "hybrid": hybrid,
    "margin": margin,
    "entropy": entropy,
    "entropy_bound": entropy_bound,
    "left_to_right": left_to_right,
}
SELF_SPECULATIVE = "self_speculative"  # no policy of denoising: see speculation.py
REMASKING = (*POLICIES, SELF_SPECULATIVE)
DENOISING = f"without --gen-remasking {SELF_SPECULATIVE}"  # what flags need that have no effect there


def choose(policy: str, step: Step) -> Tensor:
    """bool (R, W): the masked positions of every row that are kept; ties go to the left."""
    keys, numbers = POLICIES[policy](step)
    few = torch.arange(keys.shape[1], device=keys.device) < numbers.clamp(min=1)[:, None]
    return torch.zeros_like(few).scatter_(1, ranking(keys, step), few) & step.masked


def ranking(keys: Tensor, step: Step) -> Tensor:
    """(R, W): the places of a row from the largest key down, what is held back after all others, padding last."""
    keys = keys.masked_fill(step.held_back, torch.finfo(keys.dtype).min).masked_fill(~step.masked, -torch.inf)
    return keys.argsort(dim=1, descending=True, stable=True)


def transfer_schedule(num_masked: int, num_steps: int) -> list[int]:
    """Tokens to write at each step: num_masked spread over num_steps evenly, larger shares first.

    The released LLaDA sampler's split of the s/t schedule; with more steps than tokens, the idle steps are left out.
    """
    num_steps = min(num_steps, num_masked)
    if num_steps == 0:
        return []
    share, rest = divmod(num_masked, num_steps)
    return [share + (step < rest) for step in range(num_steps)]
