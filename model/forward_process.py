"""The forward process q(x_t | x_0): which tokens of a batch are masked, and what the loss owes each of them.

To add a mask schedule, write a function (maskable, noise, config) -> (scored (B, L) bool, weight (B,) or (B, L),
count (B,)) and list it in MASK_SCHEDULES.
Shapes: B rows of this micro-batch, L tokens, n_b maskable tokens in row b.
"""

import random
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepNoise:
    """The randomness of one optimiser step, a function of (seed, step) alone.

    Every draw is made for the whole global batch of `total_rows` rows and cut to the rows that start at `first_row`, so
    the noise of a row depends neither on the micro-batch nor on the process it falls into.
    """

    seed: int
    step: int
    total_rows: int
    first_row: int = 0
    device: torch.device | str = "cpu"
    width: int = 0  # tokens of the longest row of the step, where micro-batches differ in length

    def choices(self, purpose: str) -> random.Random:
        """A host-side generator for decisions that all rows of the step share."""
        return random.Random(f"{self.seed}/{self.step}/{purpose}")

    def _draw(self, purpose: str, *shape: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(self.choices(purpose).getrandbits(63))
        return torch.rand(self.total_rows, *shape, generator=generator, device=self.device)

    def _rows(self, draw: Tensor, rows: int) -> Tensor:
        if self.first_row + rows > self.total_rows:
            raise ValueError(f"rows {self.first_row}..{self.first_row + rows} of a global batch of {self.total_rows}")
        return draw[self.first_row : self.first_row + rows]

    def uniform(self, purpose: str, rows: int, length: int = 1) -> Tensor:
        """(rows, length) independent U[0, 1) float32."""
        return self._rows(self._draw(purpose, max(self.width, length)), rows)[:, :length]

    def stratified(self, purpose: str, rows: int) -> Tensor:
        """(rows,) each U[0, 1), exactly one in every stratum of width 1 / total_rows of the global batch.

        The strata are dealt out in random order: otherwise the rate would follow the order of the rows.
        """
        offset = self.choices(purpose + "/offset").random()
        strata = self._draw(purpose).argsort()
        return self._rows((strata / self.total_rows + offset) % 1.0, rows)


@dataclass(frozen=True)
class Noised:
    """One corrupted batch and all that its loss needs to know.

    The loss of row b is the sum of weight * cross-entropy over its scored positions, in nats per `count_b` tokens.
    """

    input_ids: Tensor  # (B, L) x_t
    scored: Tensor  # (B, L) bool, masked positions, whose clean token is to be predicted
    weight: Tensor  # (B, L) float32
    count: Tensor  # (B,) float32, tokens that the row's loss stands for


class MaskSettings(Protocol):
    iid_mask_eps: float
    mask_rate_min: float
    mask_rate_max: float


def lowest(keys: Tensor, maskable: Tensor, k: Tensor) -> Tensor:
    """bool (B, L): the k (B,) maskable positions with the smallest keys (B, L) in [0, 1)."""
    rank = keys.masked_fill(~maskable, 2.0).argsort(dim=1).argsort(dim=1)
    return (rank < k[:, None]) & maskable


def rate_range(config: MaskSettings) -> tuple[float, float]:
    """What `iid_t` draws its rates from: the band, less eps at either end of [0, 1]."""
    return max(config.mask_rate_min, config.iid_mask_eps), min(config.mask_rate_max, 1 - config.iid_mask_eps)


def counts_in_band(total: Tensor, config: MaskSettings) -> tuple[Tensor, Tensor]:
    """First and last (B,) int64 of the counts k of masks whose rate k / n_b is in the band, n_b = total (B,) int64.

    At least one count, except in a row without tokens: where none lies in the band, the least above it.
    """
    slack = 1e-3  # of a token: in float32 50 x 0.3 is more than 15
    first = (total * config.mask_rate_min - slack).ceil().long().clamp(min=1).minimum(total)
    last = (total * config.mask_rate_max + slack).floor().long().minimum(total)
    return first, last.maximum(first)


def iid_t(maskable: Tensor, noise: StepNoise, config: MaskSettings) -> tuple[Tensor, Tensor, Tensor]:
    """LLaDA Eq. 3: t ~ U(eps, 1 - eps) per row, each token masked with probability t, weight 1/t.

    A row left without a mask is given one and takes the inverse of its realised rate, n_b, as weight, never 1/eps. Of
    (eps, 1 - eps) only what lies in the band [mask_rate_min, mask_rate_max] is drawn.
    """
    total = maskable.sum(dim=1)
    low, high = rate_range(config)
    t = low + (high - low) * noise.uniform("rate", len(maskable))[:, 0]
    keys = noise.uniform("mask", *maskable.shape)
    scored = (keys < t[:, None]) & maskable
    empty = ~scored.any(dim=1)
    scored = torch.where(empty[:, None], lowest(keys, maskable, torch.ones_like(total)), scored)
    return scored, torch.where(empty, total.float(), 1 / t), total.float()


def fixed_count(maskable: Tensor, noise: StepNoise, config: MaskSettings) -> tuple[Tensor, Tensor, Tensor]:
    """LLaDA Eq. 6 as a training loss: exactly k of n_b tokens masked, k ~ U{1..n_b} stratified, weight n_b / k.

    The expectation that `iid_t` has but for its eps and its empty rows, at less variance; the weight is at most n_b.
    In a band, k is uniform over `counts_in_band`.
    """
    total = maskable.sum(dim=1)
    first, last = counts_in_band(total, config)
    k = (first + (noise.stratified("rate", len(maskable)) * (last - first + 1)).long()).minimum(last)
    scored = lowest(noise.uniform("mask", *maskable.shape), maskable, k)
    return scored, total / k.clamp(min=1), total.float()


def random_rate(maskable: Tensor, noise: StepNoise, config: MaskSettings) -> tuple[Tensor, Tensor, Tensor]:
    """A uniform mask rate per row and the plain mean over all masked tokens of the batch, as many small codes train.

    Heavy masks count more (integral of 2 t g(t) instead of g(t)), so this is not a likelihood bound.
    """
    scored, _, _ = fixed_count(maskable, noise, config)
    return scored, torch.ones(len(maskable), device=maskable.device), scored.sum(dim=1).float()


MASK_SCHEDULES = {"iid_t": iid_t, "fixed_count": fixed_count, "random": random_rate}


def mask_tokens(
    input_ids: Tensor, maskable: Tensor, mask_id: int, schedule: str, noise: StepNoise, config: MaskSettings
) -> Noised:
    """Mask input_ids (B, L) at positions drawn from maskable (B, L) bool; elsewhere the weight is 0."""
    scored, weight, count = MASK_SCHEDULES[schedule](maskable, noise, config)
    weight = (weight if weight.ndim == 2 else weight[:, None]).expand(maskable.shape) * maskable
    return Noised(torch.where(scored, mask_id, input_ids), scored, weight, count)
