"""The forward process q(x_t | x_0): which tokens of a batch are masked, and the weight of each in the loss.

To add a mask schedule, write a function (maskable, noise, config) -> (scored (B, L) bool, weight (B,) or (B, L),
count (B,)) and list it in MASK_SCHEDULES. In block diffusion the rows that it is given are the blocks.

Shapes: B rows of this micro-batch, L tokens, n_b maskable tokens in row b; G blocks in a row, W tokens in a block.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
from torch import Tensor

from model.block_diffusion import Blocks
from model.ranges import check_ranges

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class NoiseSchedule:
    """How the mask rate r = 1 - alpha(t) grows with time t in (0, 1]."""

    rate: Callable[[Tensor], Tensor]
    time: Callable[[float], float]  # its inverse
    slope: Callable[[Tensor], Tensor]  # -alpha'(t) = dr / dt


NOISE_SCHEDULES = {
    "linear": NoiseSchedule(lambda t: t, lambda rate: rate, torch.ones_like),
    "cosine": NoiseSchedule(
        lambda t: torch.cos(math.pi / 2 * (1 - t)),
        lambda rate: 1 - 2 / math.pi * math.acos(rate),
        lambda t: math.pi / 2 * torch.sin(math.pi / 2 * (1 - t)),
    ),
}
EPS_IN_BAND = "a band of mask rates that reaches to within eps of 0 or 1"


@dataclass(frozen=True)
class MaskSettings:
    """The forward process; every field is a flag. ValueError on impossible values."""

    iid_mask_eps: Annotated[
        float,
        "least mask rate; that of iid_t is at most 1 less it",
        "in (0, 0.5)",
        "with --mask-schedule iid_t or wsd",
        "without --block-size 1",
        f"with {EPS_IN_BAND}",
    ] = 1e-3
    mask_rate_min: Annotated[
        float,
        "least mask rate in training, of each row or block (LLaDA 2.0's released code: of a row, in blocks, too); with "
        "a narrower band than 0 to 1 the training loss is no bound",
        "in [0, 1)",
        "--llada2-alpha-min",
        "without --mask-schedule wsd",
        "without --block-size 1",
    ] = 0.0
    mask_rate_max: Annotated[
        float,
        "largest mask rate in training, of each row or block; validation is over the full range",
        "in (0, 1]",
        "--llada2-alpha-max",
        "without --mask-schedule wsd",
        "without --block-size 1",
    ] = 1.0
    noise_schedule: Annotated[
        Literal[*NOISE_SCHEDULES],
        "the mask rate at time t: t, or the cosine of (1 - t) pi / 2",
        "with --mask-schedule iid_t or wsd",
        "without --block-size 1",
    ] = "linear"
    time_weighted_loss: Annotated[
        bool,
        "weight each token by -alpha'(t) / (1 - alpha(t)), 1/t if linear; without it all count the same",
        "with --mask-schedule wsd",
    ] = False
    time_weight_eps: Annotated[
        float, "least denominator of that weight", "in (0, 1)", "with --mask-schedule iid_t or --time-weighted-loss"
    ] = 1e-3
    wsd_min_mask_ratio: Annotated[
        float, "ceiling of the mask rate at the first and last step", "in (0, 1]", "with --mask-schedule wsd"
    ] = 0.15
    wsd_max_mask_ratio: Annotated[
        float, "ceiling of the mask rate between warm-up and decay", "in (0, 1]", "with --mask-schedule wsd"
    ] = 1.0
    wsd_warmup_ratio: Annotated[
        float, "share of the steps in which the ceiling rises", "in [0, 1]", "with --mask-schedule wsd"
    ] = 0.2
    wsd_stable_ratio: Annotated[
        float, "share of the steps in which it stays; in the rest it falls", "in [0, 1]", "with --mask-schedule wsd"
    ] = 0.6

    def __post_init__(self):
        check_ranges(type(self), vars(self))
        if self.mask_rate_min >= self.mask_rate_max:
            raise ValueError(f"--mask-rate-min {self.mask_rate_min} must be below --mask-rate-max {self.mask_rate_max}")
        if self.wsd_warmup_ratio + self.wsd_stable_ratio > 1:
            raise ValueError(
                f"--wsd-warmup-ratio {self.wsd_warmup_ratio} and --wsd-stable-ratio {self.wsd_stable_ratio} must be "
                "together at most 1"
            )


@dataclass(frozen=True)
class Noised:
    """One corrupted batch and all that its loss needs to know.

    The loss of row b is the sum of weight * cross-entropy over its scored positions, in nats per `count_b` tokens.
    """

    input_ids: Tensor  # (B, L) x_t
    scored: Tensor  # (B, L) bool, masked positions, whose clean token is to be predicted
    weight: Tensor  # (B, L) float32
    count: Tensor  # (B,) float32, tokens that the row's loss stands for


class Noise(Protocol):
    """The random numbers of a step as a mask schedule asks for them, by rows or by blocks; U[0, 1) float32."""

    progress: float  # share of the run's steps that are done, 0 to 1

    def uniform(self, purpose: str, rows: int, length: int = 1) -> Tensor:
        """Return independent numbers (rows, length)."""

    def stratified(self, purpose: str, rows: int) -> Tensor:
        """Return numbers (rows,), each uniform, and all together spread evenly."""


def lowest(keys: Tensor, maskable: Tensor, k: Tensor) -> Tensor:
    """Return the k (B,) maskable positions of each row with the smallest keys (B, L) in [0, 1), as bool (B, L)."""
    rank = keys.masked_fill(~maskable, 2.0).argsort(dim=1).argsort(dim=1)
    return (rank < k[:, None]) & maskable


def k_of_n(
    maskable: Tensor, share: Tensor, keys: Tensor, band: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Mask k of the n maskable tokens of each row (LLaDA Eq. 6): in training, for preferences and for likelihoods.

    maskable (B, L) bool, a row being a block in block diffusion. share (B,), of which the fractional part counts,
    chooses k from {1..n}, or from the band {first..last} (B,) each, in which every count has an equal part of [0, 1).
    keys (B, L) in [0, 1): the k smallest are masked.
    Returns scored (B, L) bool and the weight n / k (B,). If share is uniform and the keys are independent, the weighted
    cross-entropies of the scored tokens are an unbiased estimate of the bound.
    """
    # 1. n_b and the counts to choose from; a row without maskable tokens has only k = 0.
    total = maskable.sum(dim=1)
    first, last = band if band is not None else (total.clamp(max=1), total)
    # 2. k: the part of [0, 1) that `share` falls into. Rounding may give last + 1.
    k = (first + (share % 1.0 * (last - first + 1)).long()).minimum(last)
    # 3. A random set of k tokens, and the inverse of its rate.
    return lowest(keys, maskable, k), total / k.clamp(min=1)


def k_of_n_by_block(maskable: Tensor, blocks: Blocks, share: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return scored and weight (B, L) of `k_of_n` in each block; maskable and keys (B, L), share (B, G)."""
    scored, weight = k_of_n(blocks.split(maskable), share.flatten(), blocks.split(keys))
    return blocks.join(scored), blocks.join(_wide(weight, scored.shape))


def fixed_count(maskable: Tensor, noise: Noise, config: MaskSettings) -> tuple[Tensor, Tensor, Tensor]:
    """LLaDA Eq. 6 as a training loss: exactly k of n_b tokens masked, k ~ U{1..n_b} stratified, weight n_b / k.

    Its expectation is that of `iid_t` without eps and empty rows, its variance less; the weight is at most n_b. In a
    band, k is uniform over `counts_in_band`.
    """
    total = maskable.sum(dim=1)
    share = noise.stratified("rate", len(maskable))
    keys = noise.uniform("mask", *maskable.shape)
    scored, weight = k_of_n(maskable, share, keys, counts_in_band(total, config))
    return scored, weight, total.float()


def counts_in_band(total: Tensor, config: MaskSettings) -> tuple[Tensor, Tensor]:
    """Return the first and last (B,) int64 of the counts k of masks whose rate k / n_b is in the band [mask_rate_min,
    mask_rate_max]; n_b = total (B,) int64.

    At least one count, except in a row without tokens: if none lies in the band, the least above it.
    """
    slack = 1e-3  # of a token, for float32 rounding: 50 * 0.3 > 15
    first = (total * config.mask_rate_min - slack).ceil().long().clamp(min=1).minimum(total)
    last = (total * config.mask_rate_max + slack).floor().long().minimum(total)
    return first, last.maximum(first)


def random_rate(maskable: Tensor, noise: Noise, config: MaskSettings) -> tuple[Tensor, Tensor, Tensor]:
    """A uniform mask rate per row and the plain mean over all masked tokens of the batch, as many small codes train.

    Heavy masks count more (integral of 2 t g(t) instead of g(t)), so this is not a likelihood bound.
    """
    scored, _, _ = fixed_count(maskable, noise, config)
    return scored, torch.ones(len(maskable), device=maskable.device), scored.sum(dim=1).float()


def iid_t(maskable: Tensor, noise: Noise, config: MaskSettings) -> tuple[Tensor, Tensor, Tensor]:
    """LLaDA Eq. 3: t ~ U(eps, 1 - eps) per row, each token masked with probability t, weight 1/t.

    Of (eps, 1 - eps) only what lies in the band [mask_rate_min, mask_rate_max] is drawn.
    """
    # 1. A rate per row (B,), uniform in t, and its weight.
    rate, weight = draw_rates(maskable, noise, config, rate_range(config))
    # 2. Each token is masked independently.
    scored = (noise.uniform("mask", *maskable.shape) < rate[:, None]) & maskable
    # 3. The loss stands for all maskable tokens: the weight makes up for those that are not masked.
    return scored, weight, maskable.sum(dim=1).float()


def wsd(maskable: Tensor, noise: Noise, config: MaskSettings) -> tuple[Tensor, Tensor, Tensor]:
    """`iid_t` below a ceiling of the mask rate that warms up, stays and decays over the run (`ceiling_at`).

    With time_weighted_loss the weight is that of `iid_t`, and at a ceiling of 1 the loss is the bound; without it every
    masked token of the batch counts the same.
    """
    band = config.iid_mask_eps, ceiling_at(noise.progress, config)
    rate, weight = draw_rates(maskable, noise, config, band)
    scored = (noise.uniform("mask", *maskable.shape) < rate[:, None]) & maskable
    if config.time_weighted_loss:
        return scored, weight, maskable.sum(dim=1).float()
    return scored, torch.ones_like(weight), scored.sum(dim=1).float()


def draw_rates(
    maskable: Tensor, noise: Noise, config: MaskSettings, band: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Return mask rates (B,) in the band, with t uniform, and their weight -alpha'(t) / (1 - alpha(t)) (B,), which is
    1/t for the linear schedule."""
    # Rows of a single token are blocks of one: always masked, which costs no variance.
    if maskable.shape[1] == 1:
        ones = torch.ones(len(maskable), device=maskable.device)
        return ones, ones
    low, high = band
    schedule = NOISE_SCHEDULES[config.noise_schedule]
    # 1. t uniform over the times whose rates lie in the band.
    first, last = schedule.time(low), schedule.time(high)
    t = first + (last - first) * noise.uniform("rate", len(maskable))[:, 0]
    # 2. The rate at t, and the weight that the bound gives it.
    rate = schedule.rate(t)
    # 3. The mean over t uniform between first and last becomes the mean over rates between low and high.
    spread = (last - first) / (high - low)
    return rate, spread * schedule.slope(t) / rate.clamp(min=config.time_weight_eps)


def rate_range(config: MaskSettings) -> tuple[float, float]:
    """Return the least and the largest rate of `iid_t`: the band, less eps at either end of [0, 1]."""
    return max(config.mask_rate_min, config.iid_mask_eps), min(config.mask_rate_max, 1 - config.iid_mask_eps)


def ceiling_at(progress: float, config: MaskSettings) -> float:
    """Return the largest mask rate of `wsd` when a share `progress` of the run is done: linear up, level, down."""
    low, high = config.wsd_min_mask_ratio, config.wsd_max_mask_ratio
    decay = 1 - config.wsd_warmup_ratio - config.wsd_stable_ratio
    up = progress / config.wsd_warmup_ratio if config.wsd_warmup_ratio else 1.0
    down = (1 - progress) / decay if decay > 1e-9 else 1.0
    return low + (high - low) * max(0.0, min(up, down, 1.0))


MASK_SCHEDULES = {"iid_t": iid_t, "fixed_count": fixed_count, "random": random_rate, "wsd": wsd}


@dataclass(frozen=True)
class StepNoise:
    """The randomness of one optimiser step, a function of (seed, step) alone.

    Every draw is made for the whole global batch of `total_rows` rows and cut to the rows that start at `first_row`, so
    the noise of a row depends neither on the micro-batch nor on the process it falls into; and it is made on the host,
    so that it is the same for every device.
    """

    seed: int
    step: int
    total_rows: int
    first_row: int = 0
    width: int = 0  # tokens of the longest row of the step, if micro-batches differ in length
    progress: float = 0.0  # share of the run's steps that are done, 0 to 1

    def choices(self, purpose: str) -> random.Random:
        """Return a generator for decisions that all rows of the step share."""
        return random.Random(f"{self.seed}/{self.step}/{purpose}")

    def uniform(self, purpose: str, rows: int, length: int = 1) -> Tensor:
        """Return (rows, length) independent U[0, 1) float32."""
        return self._rows(self._draw(purpose, max(self.width, length)), rows)[:, :length]

    def stratified(self, purpose: str, rows: int) -> Tensor:
        """Return (rows,) each U[0, 1), exactly one in every stratum of width 1 / total_rows of the global batch.

        The strata are dealt out in random order: otherwise the rate would follow the order of the rows.
        """
        offset = self.choices(purpose + "/offset").random()
        strata = self._draw(purpose).argsort()
        return self._rows((strata / self.total_rows + offset) % 1.0, rows)

    def normal(self, purpose: str, rows: int, length: int, width: int) -> Tensor:
        """Return (rows, length, width) independent N(0, 1) float32."""
        draw = self._draw(purpose, max(self.width, length), width, sample=torch.randn)
        return self._rows(draw, rows)[:, :length]

    def _draw(self, purpose: str, *shape: int, sample: Callable[..., Tensor] = torch.rand) -> Tensor:
        generator = torch.Generator().manual_seed(self.choices(purpose).getrandbits(63))
        return sample(self.total_rows, *shape, generator=generator)

    def _rows(self, draw: Tensor, rows: int) -> Tensor:
        if self.first_row + rows > self.total_rows:
            raise ValueError(f"rows {self.first_row}..{self.first_row + rows} of a global batch of {self.total_rows}")
        return draw[self.first_row : self.first_row + rows]


@dataclass(frozen=True)
class BlockNoise:
    """The draws of a step with blocks as rows: block g of row b is row b * G + g, its tokens from column 0 on."""

    noise: StepNoise
    blocks: Blocks
    maskable: Tensor  # (B * G, W) bool

    @property
    def progress(self) -> float:
        return self.noise.progress

    def uniform(self, purpose: str, rows: int, length: int = 1) -> Tensor:
        draw = self.noise.uniform(purpose, *self.blocks.place.shape)  # a row has no more blocks than tokens
        if length == 1:
            return draw[:, : self.blocks.number].reshape(rows, 1)
        return self.blocks.split(draw)

    def stratified(self, purpose: str, rows: int) -> Tensor:
        """Return (B * G,) each U[0, 1): the blocks of a row that have maskable tokens take one stratum of the unit
        interval each, and the rows of the global batch one place each within the strata."""
        number = self.blocks.number
        # 1. The blocks to be spread (B, G), in random order; the others come last.
        live = self.maskable.any(dim=1).view(-1, number)
        keys = self.noise.uniform(purpose + "/blocks", *self.blocks.place.shape)[:, :number]
        order = keys.masked_fill(~live, 2.0).argsort(dim=1).argsort(dim=1)
        # 2. One place (B, 1) of each row within all of its strata.
        place = self.noise.stratified(purpose, len(live))[:, None]
        # 3. Stratum and place together, below 1.
        return ((order + place) / live.sum(dim=1, keepdim=True).clamp(min=1)).clamp(max=1 - 2**-24).flatten()


def mask_tokens(
    batch: Batch, mask_id: int, schedule: str, noise: StepNoise, config: MaskSettings, block_size: int = 0
) -> Noised:
    """Mask a batch at positions drawn from its loss_mask; elsewhere the weight is 0.

    block_size > 0: a rate for each block of each document (LLaDA 2.0 Eq. 1, BD3-LM Alg. 1), see `block_starts`.
    """
    maskable, draw = batch["loss_mask"], MASK_SCHEDULES[schedule]
    # 1. Scored positions and weights (B, L), count (B,), from a schedule whose rows are rows or blocks.
    if 0 < block_size < maskable.shape[1]:
        blocks = Blocks(maskable, batch.get("document_ids"), block_size)
        by_block = blocks.split(maskable)
        scored, weight, count = draw(by_block, BlockNoise(noise, blocks, by_block), config)
        scored, weight = blocks.join(scored), blocks.join(_wide(weight, scored.shape))
        count = count.view(len(maskable), -1).sum(dim=1)
    else:
        scored, weight, count = draw(maskable, noise, config)
        weight = _wide(weight, maskable.shape)
    # 2. A row in which nothing was masked is given one mask, where its key is lowest. The weight is the inverse of the
    #    realised rate, n_b, never 1/eps; or 1 if all masked tokens count the same.
    empty = ~scored.any(dim=1, keepdim=True)
    total = maskable.sum(dim=1)
    first = noise.uniform("mask", *maskable.shape).masked_fill(~maskable, 2.0).argmin(dim=1, keepdim=True)
    single = torch.zeros_like(maskable).scatter_(1, first, True) & maskable
    weight = torch.where(empty, torch.where(count > 0, total, 1)[:, None].to(weight.dtype), weight)
    scored = torch.where(empty, single, scored)
    count = torch.where(count > 0, count, scored.sum(dim=1).to(count.dtype))
    # 3. x_t.
    return Noised(torch.where(scored, mask_id, batch["input_ids"]), scored, weight * maskable, count)


def complement(noised: Noised, batch: Batch, mask_id: int, block_size: int) -> Noised:
    """Return the other half of a complementary pair (LLaDA 2.0, section 5.1): masked where `noised` is not.

    Every block takes the inverse of its own realised rate as weight; one that was masked throughout has no other half,
    and its tokens are not counted. A row that is one block has one rate, however many documents it holds.
    """
    maskable = batch["loss_mask"]
    scored = maskable & ~noised.scored
    documents = batch.get("document_ids") if 0 < block_size < maskable.shape[1] else None
    blocks = Blocks(maskable, documents, block_size)
    # Of every block (B * G,): maskable tokens and masks.
    total, masked = (blocks.split(values).sum(dim=1).float() for values in (maskable, scored))
    weight = blocks.join(_wide(total / masked.clamp(min=1), (len(total), blocks.width))) * maskable
    count = torch.where(masked > 0, total, 0.0).view(len(maskable), -1).sum(dim=1)
    return Noised(torch.where(scored, mask_id, batch["input_ids"]), scored, weight, count)


def _wide(weight: Tensor, shape: tuple[int, int]) -> Tensor:
    """(B,) or (B, L) -> (B, L)."""
    return (weight if weight.ndim == 2 else weight[:, None]).expand(shape)
