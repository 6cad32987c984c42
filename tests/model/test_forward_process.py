import math

import pytest
import torch

from model.forward_process import MASK_SCHEDULES, MaskSettings, StepNoise, mask_tokens


def masked(schedule, maskable, step=0, seed=0, total=None, first=0, **settings):
    ids = torch.arange(maskable.numel()).view(maskable.shape) + 10
    noise = StepNoise(seed, step, total or len(maskable), first)
    return ids, mask_tokens({"input_ids": ids, "loss_mask": maskable}, 3, schedule, noise, MaskSettings(**settings))


@pytest.mark.parametrize("schedule", MASK_SCHEDULES)
def test_only_maskable_tokens_are_masked_and_all_others_are_kept(schedule):
    maskable = torch.rand(64, 12) < 0.6
    maskable[0] = False
    maskable[1] = True
    ids, noised = masked(schedule, maskable)
    assert not (noised.scored & ~maskable).any()
    assert torch.equal(noised.input_ids == 3, noised.scored)
    assert torch.equal(noised.input_ids[~noised.scored], ids[~noised.scored])
    has_any = maskable.any(dim=1)
    assert torch.equal(noised.scored.any(dim=1), has_any)  # never a row without a target
    assert (noised.weight[~maskable] == 0).all() and torch.isfinite(noised.weight).all()


@pytest.mark.parametrize("schedule", MASK_SCHEDULES)
def test_every_real_token_can_be_masked(schedule):
    """BOS and EOS, the first and the last of a document, included."""
    hits = sum(masked(schedule, torch.ones(32, 6, dtype=torch.bool), step)[1].scored.sum(dim=0) for step in range(8))
    assert (hits > 0).all()


def test_fixed_count_hits_every_stratum_of_the_global_batch_once():
    """k = 1 + floor(s n): with as many rows as tokens, every count from 1 to n appears exactly once."""
    for step in range(5):
        _, noised = masked("fixed_count", torch.ones(16, 16, dtype=torch.bool), step)
        assert sorted(noised.scored.sum(dim=1).tolist()) == list(range(1, 17))
        assert torch.allclose(noised.weight[:, 0] * noised.scored.sum(dim=1), torch.tensor(16.0))


def test_stratified_numbers_are_uniform_and_one_in_each_stratum():
    draws = torch.stack([StepNoise(1, step, 20).stratified("rate", 20) for step in range(300)])
    strata = ((draws - draws.min(dim=1, keepdim=True).values) * 20).round()  # offsets differ, spacing does not
    assert (strata.sort(dim=1).values == torch.arange(20)).all()
    deviation = (draws.flatten().sort().values - torch.linspace(0, 1, draws.numel())).abs().max()
    assert deviation < 1.63 / math.sqrt(300)  # Kolmogorov-Smirnov, 1 %, of the 300 independent offsets
    correlation = torch.corrcoef(torch.stack([draws.mean(dim=0), torch.arange(20.0)]))[0, 1]
    assert abs(correlation) < 0.7  # the stratum does not follow the row


@pytest.mark.parametrize("schedule", MASK_SCHEDULES)
def test_noise_of_a_row_depends_neither_on_micro_batch_nor_on_process(schedule):
    maskable = torch.ones(12, 8, dtype=torch.bool)
    _, whole = masked(schedule, maskable, step=7)
    parts = [masked(schedule, maskable[first : first + 4], 7, total=12, first=first)[1] for first in (0, 4, 8)]
    assert torch.equal(whole.scored, torch.cat([p.scored for p in parts]))
    assert torch.equal(whole.weight, torch.cat([p.weight for p in parts]))


def test_noise_is_a_function_of_seed_and_step():
    maskable = torch.ones(8, 8, dtype=torch.bool)
    again, other_step, other_seed = (
        masked("iid_t", maskable, s, seed)[1].scored for s, seed in ((3, 0), (4, 0), (3, 1))
    )
    reference = masked("iid_t", maskable, 3, 0)[1].scored
    assert torch.equal(reference, again)
    assert not torch.equal(reference, other_step) and not torch.equal(reference, other_seed)


def test_iid_t_masks_at_the_rate_that_its_weight_says():
    """Weight 1/t: over many rows of one t the masked share is t within four standard errors."""
    maskable = torch.ones(512, 400, dtype=torch.bool)
    _, noised = masked("iid_t", maskable)
    t = 1 / noised.weight[:, 0]
    error = (t * (1 - t) / 400).sqrt()
    assert ((noised.scored.float().mean(dim=1) - t).abs() < 4.5 * error + 1 / 400).all()


def test_a_row_given_its_one_mask_takes_its_realised_rate_as_weight():
    """Rows of two tokens are often left empty at small t; their weight must be n = 2, never 1/eps."""
    _, noised = masked("iid_t", torch.ones(4096, 2, dtype=torch.bool))
    single = noised.scored.sum(dim=1) == 1
    weight = noised.weight[:, 0]
    forced = single & (weight == 2.0)
    assert forced.float().mean() == pytest.approx(1 / 3, abs=0.05)  # P(no mask) = integral of (1 - t)^2
    assert weight[~forced].max() < 200  # small t without a mask would have weighed up to 1000


def test_noise_of_a_row_depends_not_on_the_length_of_its_micro_batch():
    """Micro-batches of one step may be cut to different lengths; a row's draws are the first ones of the longest."""
    noise = StepNoise(0, 4, total_rows=6, first_row=2, width=16)
    assert torch.equal(noise.uniform("mask", 4, 9), noise.uniform("mask", 4, 16)[:, :9])
    rows = torch.cat([StepNoise(0, 4, 6, first, width=16).uniform("mask", 1, 5 + first)[:, :5] for first in range(6)])
    assert len(rows.unique(dim=0)) == 6


@pytest.mark.parametrize("eps", [1e-3, 0.01, 0.07, 0.3])
def test_the_band_from_0_to_1_leaves_every_draw_as_it_is_without_a_band(eps):
    """Bit for bit t = eps + (1 - 2 eps) u and k = 1 + floor(u n), rows without maskable tokens included."""
    maskable = torch.rand(512, 12) < 0.4
    maskable[:4] = False
    noise, total = StepNoise(3, 5, 512), maskable.sum(dim=1)
    _, noised = masked("iid_t", maskable, 5, 3, iid_mask_eps=eps)
    t = eps + (1 - 2 * eps) * noise.uniform("rate", 512)[:, 0]
    chosen = (noise.uniform("mask", 512, 12) < t[:, None]) & maskable
    drawn = chosen.any(dim=1)
    assert torch.equal(noised.scored[drawn], chosen[drawn])
    assert torch.equal(noised.weight[drawn], (1 / t)[drawn, None] * maskable[drawn])
    _, noised = masked("fixed_count", maskable, 5, 3, iid_mask_eps=eps)
    assert torch.equal(noised.scored.sum(dim=1), (1 + (noise.stratified("rate", 512) * total).long()).minimum(total))


@pytest.mark.parametrize("schedule", ["fixed_count", "random"])
@pytest.mark.parametrize(
    "length, low, high, counts", [(10, 0.0, 0.25, (1, 2)), (10, 0.55, 1.0, (6, 10)), (75, 0.36, 0.84, (27, 63))]
)
def test_in_a_band_every_count_whose_rate_lies_in_it_is_drawn_equally_often(schedule, length, low, high, counts):
    """As many rows as counts, so one in each stratum. The edges belong to the band, though in float32 75 x 0.36 is more
    than 27 and 75 x 0.84 less than 63."""
    expected = list(range(counts[0], counts[1] + 1))
    maskable = torch.ones(len(expected), length, dtype=torch.bool)
    for step in range(5):
        _, noised = masked(schedule, maskable, step, mask_rate_min=low, mask_rate_max=high)
        assert sorted(noised.scored.sum(dim=1).tolist()) == expected


@pytest.mark.parametrize("schedule", ["fixed_count", "random"])
def test_a_row_too_short_for_the_band_masks_the_least_count_above_it(schedule):
    """The band holds 2 of 4 and 3 of 5 to 6, but no whole number of 1 to 3 tokens; a row of none masks none."""
    lengths = torch.arange(7)
    maskable = torch.arange(6) < lengths[:, None]
    _, noised = masked(schedule, maskable, mask_rate_min=0.49, mask_rate_max=0.6)
    assert noised.scored.sum(dim=1).tolist() == [0, 1, 1, 2, 2, 3, 3]


def test_iid_t_draws_its_rate_uniformly_from_the_band():
    _, noised = masked("iid_t", torch.ones(4096, 64, dtype=torch.bool), mask_rate_min=0.3, mask_rate_max=0.8)
    t = 1 / noised.weight[:, 0].double()
    deviation = (t.sort().values - torch.linspace(0.3, 0.8, 4096, dtype=torch.float64)).abs().max() / 0.5
    assert deviation < 1.63 / math.sqrt(4096)  # Kolmogorov-Smirnov, 1 %
