"""Block diffusion: one pass over [x_t, x_0] against one pass per block, and the objective built on it."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from model import block_diffusion
from model.attention import block_causal_mask, document_mask
from model.block_diffusion import (
    block_diffusion_attention,
    block_diffusion_flex_mask,
    block_diffusion_mask,
    block_starts,
    denoising_inputs,
)
from model.config import ModelConfig
from model.forward_process import StepNoise, complement, mask_tokens
from model.masked_diffusion import MaskedDiffusion, confidence_loss, embedding_noise
from tests.model.bounds import batch_of, block_bound

MASK = 3
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, -1], [0] * 12, [0] * 5 + [1] * 7])


def noised(ids, rate=0.5):
    return torch.where(torch.rand(ids.shape) < rate, MASK, ids)


def number_blocks(documents, size):
    """0, 1, 2, ... along each row."""
    return (block_starts(documents, size) == torch.arange(documents.shape[1])).long().cumsum(dim=1) - 1


def all_logits(model, noisy, clean, documents, size, causal=False):
    ids, attention = denoising_inputs(noisy, clean, documents, size, torch.arange(clean.numel()), causal)
    return model(ids, **attention).view(*clean.shape, -1)


@pytest.mark.parametrize("size", [1, 2, 4, 5])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_one_pass_over_both_halves_equals_one_pass_per_block(size, documents, tiny_model):
    """The released form: blocks one after the other, the clean ones before them as their prefix, documents apart."""
    model, ids = tiny_model(), torch.randint(4, 24, (3, 12))
    noisy = noised(ids)
    found = all_logits(model, noisy, ids, documents, size)
    compared = 0
    for row, of in enumerate(documents if documents is not None else torch.zeros(3, 12, dtype=torch.long)):
        for document in of.unique():
            place = (of == document).nonzero()[:, 0]
            for first in range(0, len(place), size):
                block = place[first : first + size]
                text = torch.cat([ids[row, place[:first]], noisy[row, block]])[None]
                mask = block_causal_mask(text.shape[1], size)
                alone = model(text, attn_mask=mask, position_ids=place[None, : text.shape[1]])[0, first:]
                torch.testing.assert_close(found[row, block], alone, atol=1e-5, rtol=1e-5)
                compared += len(block)
    assert compared == 36


@pytest.mark.parametrize("size", [1, 3, 4])
def test_no_block_sees_its_own_clean_tokens_nor_later_ones_bit_for_bit(size, tiny_model):
    model, ids = tiny_model(), torch.randint(4, 24, (3, 12))
    noisy, blocks = noised(ids), number_blocks(DOCUMENTS, size)
    before = all_logits(model, noisy, ids, DOCUMENTS, size)
    for b in range(int(blocks.max()) + 1):
        changed = torch.where(blocks == b, (ids - 4 + 7) % 20 + 4, ids)
        after = all_logits(model, noisy, changed, DOCUMENTS, size)
        assert torch.equal(after[blocks <= b], before[blocks <= b])
        seen = (after != before).any(dim=-1)
        # Later blocks of the same document do see it.
        same = torch.stack(
            [
                (of == of[row == b][0]) if (row == b).any() else of < -1
                for of, row in zip(DOCUMENTS, blocks, strict=True)
            ]
        )
        assert torch.equal(seen, same & (blocks > b))


def test_what_is_masked_in_a_block_shows_in_that_block_alone(tiny_model):
    model, ids = tiny_model(), torch.randint(4, 24, (3, 12))
    noisy, blocks = noised(ids), number_blocks(DOCUMENTS, 4)
    other = torch.where((blocks == 1) & (noisy != MASK), MASK, noisy)
    changed = (all_logits(model, other, ids, DOCUMENTS, 4) != all_logits(model, noisy, ids, DOCUMENTS, 4)).any(dim=-1)
    touched = (other != noisy).any(dim=1)
    assert torch.equal(changed, (blocks == 1) & touched[:, None]) and touched.any()


@pytest.mark.parametrize("size", [1, 2, 4, 5, 12, 40])
def test_the_mask_is_the_three_part_rule_and_composes_with_documents(size):
    """Element by element against LLaDA 2.0 Eq. 3 and 4 written out, the grid beginning with each document."""
    mask = block_diffusion_mask(DOCUMENTS, size)[:, 0]
    for row, of in enumerate(DOCUMENTS.tolist()):
        block = [(i - of.index(of[i])) // size for i in range(12)]
        for i, j in itertools.product(range(24), repeat=2):
            b, c, clean_i, clean_j = block[i % 12], block[j % 12], i >= 12, j >= 12
            allowed = (b == c) if not (clean_i or clean_j) else c < b if not clean_i else clean_j and c <= b
            assert bool(mask[row, i, j]) == (allowed and of[i % 12] == of[j % 12])
    together = block_diffusion_mask(torch.zeros_like(DOCUMENTS), size)[:, 0]
    aligned = torch.tensor([[0] * 4 + [1] * 8])
    if size in (1, 2, 4):  # documents that begin where a block does: the grids agree, and the two masks are ANDed
        expected = together[:1] & document_mask(aligned.repeat(1, 2))[:, 0]
        assert torch.equal(block_diffusion_mask(aligned, size)[:, 0], expected)


@torch.no_grad()
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("causal", [False, True])
def test_flex_attention_gives_the_logits_of_the_dense_mask(documents, causal, tiny_model, monkeypatch):
    model, ids = tiny_model(num_key_value_heads=2), torch.randint(4, 24, (3, 12))
    noisy = noised(ids)
    dense = all_logits(model, noisy, ids, documents, 4, causal)
    one_document = torch.zeros(1, 12, dtype=torch.long)
    monkeypatch.setattr(
        block_diffusion,
        "block_diffusion_attention",
        lambda of, length, size, causal, device: block_diffusion_flex_mask(
            one_document if of is None else of, size, causal
        ),
    )
    torch.testing.assert_close(all_logits(model, noisy, ids, documents, 4, causal), dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [1, 4, 60, 200])
def test_flex_attention_computes_the_pairs_of_the_dense_mask_and_skips_no_tile_that_has_one(size, causal):
    """Of rows of several documents, and of one, whose mask serves any number of rows; each with 4 x 4 tiles."""
    rows, length, tile = 3, 200, 128
    for documents in (torch.nn.functional.pad(DOCUMENTS, (0, 28), value=-1).repeat_interleave(5, dim=1), None):
        alone = torch.zeros(1, length, dtype=torch.long)
        flex = block_diffusion_flex_mask(alone if documents is None else documents, size, causal)
        dense = block_diffusion_mask(alone.expand(rows, length) if documents is None else documents, size, causal)
        assert torch.equal(create_mask(flex.mask_mod, rows, 1, 2 * length, 2 * length, "cpu"), dense)
        whole = torch.nn.functional.pad(dense, (0, 112, 0, 112)).unflatten(-1, (4, tile)).unflatten(2, (4, tile))
        computed = flex.to_dense().bool().expand(rows, 1, 4, 4)
        assert torch.equal(computed, whole.any(dim=-1).any(dim=3)) and not computed.all()


def test_the_mask_of_rows_that_are_one_document_is_made_once():
    first = block_diffusion_attention(None, 12, 4, False, torch.device("cpu"))
    assert block_diffusion_attention(None, 12, 4, False, torch.device("cpu")) is first
    assert block_diffusion_attention(None, 12, 4, True, torch.device("cpu")) is not first


def test_a_packed_document_is_predicted_as_alone(tiny_model):
    model, ids = tiny_model(), torch.randint(4, 24, (1, 11))
    noisy, of = noised(ids), torch.tensor([[0] * 3 + [1] * 8])
    packed = all_logits(model, noisy, ids, of, 4)[:, 3:]
    torch.testing.assert_close(packed, all_logits(model, noisy[:, 3:], ids[:, 3:], None, 4), atol=1e-5, rtol=1e-5)


def test_blocks_of_one_token_all_masked_cost_the_chain_rule_of_the_same_net(tiny_model):
    model, ids = tiny_model(), torch.randint(4, 24, (2, 7))
    chain = torch.zeros(2)
    for i in range(7):
        text = torch.cat([ids[:, :i], torch.full((2, 1), MASK)], dim=1)
        logits = model(text, is_causal=True)[:, -1]
        logits[:, MASK] = -math.inf
        chain -= logits.log_softmax(-1).gather(1, ids[:, i : i + 1])[:, 0]
    for schedule in ("iid_t", "fixed_count", "random"):
        objective = MaskedDiffusion(block_size=1, mask_schedule=schedule, variable_length_prob=0.0)
        loss = objective(model, batch_of(ids), StepNoise(0, 0, 2))
        torch.testing.assert_close(loss.nats, chain)
        assert loss.count.tolist() == [7, 7]


@pytest.mark.parametrize("size", [9, 20])
def test_a_block_that_holds_the_row_is_full_diffusion(size, tiny_model):
    model, batch = tiny_model(), batch_of(torch.randint(4, 24, (3, 9)), torch.zeros(3, 9, dtype=torch.long))
    calls = []
    model.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
    whole, block = (
        MaskedDiffusion(block_size=s, variable_length_prob=0.0)(model, batch, StepNoise(0, 0, 3)) for s in (0, size)
    )
    assert torch.equal(whole.nats, block.nats) and calls == [(3, 9), (3, 9)]  # and x_0 is not computed


SCHEDULES = {
    "fixed_count": {},
    "iid_t": {"iid_mask_eps": 1e-4},
    "cosine": {"mask_schedule": "iid_t", "noise_schedule": "cosine", "iid_mask_eps": 1e-4, "time_weight_eps": 1e-4},
    "wsd": {"time_weighted_loss": True, "iid_mask_eps": 1e-4},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_training_loss_of_blocks_estimates_their_bound(name, tiny_model):
    """Blocks of 3, 3 and 2, with tokens that are given among them; the mean over 6,000 rows within 4 standard errors.

    A row left without any mask is given one, which the schedules with independent masks do once in 2 x 3 x 2 x ...
    rows: its share is taken out."""
    model, ids = tiny_model(vocab_size=4, num_hidden_layers=1), torch.tensor([0, 2, 1, 0, 1, 2, 2, 0])
    scorable = torch.tensor([False, True, True, True, False, True, True, True])
    settings = {"mask_schedule": name, "variable_length_prob": 0.0, "block_size": 3} | SCHEDULES[name]
    batch = batch_of(ids.repeat(6_000, 1), None, scorable.repeat(6_000, 1))
    noise = StepNoise(5, 0, 6_000, progress=0.5)
    with torch.no_grad():
        exact = block_bound(model, ids, scorable, 3)
        objective = MaskedDiffusion(**settings)
        loss = objective(model, batch, noise)
        masks = objective.corrupt(batch, MASK, noise)
        forced = (masks.scored.sum(dim=1) == 1) & ((masks.weight * masks.scored).sum(dim=1) == 6.0)
    nats = torch.where(forced & (name != "fixed_count"), 0.0, loss.nats)
    assert nats.mean().item() == pytest.approx(exact, abs=4 * nats.std().item() / math.sqrt(6_000) + 2e-3)
    assert set(loss.count.tolist()) == {6.0}


def test_every_stratum_of_every_blocks_rate_is_drawn_once():
    """12 rows of 4 blocks of 6: each count 1..6 stands 8 times."""
    ids = torch.randint(4, 24, (12, 24))
    counts = (
        mask_tokens(batch_of(ids), MASK, "fixed_count", StepNoise(3, 0, 12), MaskedDiffusion(), 6)
        .scored.view(12, 4, 6)
        .sum(dim=2)
    )
    assert torch.bincount(counts.flatten(), minlength=7)[1:].tolist() == [8] * 6
    for row in counts:  # and a row has one block of each quarter of the range: it is neither light nor heavy
        assert all(k in quarter for k, quarter in zip(row.sort().values, ((1, 2), (2, 3), (4, 5), (5, 6)), strict=True))
    half = MaskedDiffusion()
    parts = [
        mask_tokens(batch_of(ids[a:b]), MASK, "fixed_count", StepNoise(3, 0, 12, a), half, 6)
        for a, b in ((0, 5), (5, 12))
    ]
    whole = mask_tokens(batch_of(ids), MASK, "fixed_count", StepNoise(3, 0, 12), half, 6)
    assert torch.equal(torch.cat([p.input_ids for p in parts]), whole.input_ids)


@pytest.mark.parametrize("size", [0, 4])
def test_complementary_masks_partition_what_may_be_masked(size):
    ids, maskable = torch.randint(4, 24, (40, 12)), torch.rand(40, 12) < 0.7
    batch = batch_of(ids, None, maskable)
    one = mask_tokens(batch, MASK, "fixed_count", StepNoise(0, 0, 40), MaskedDiffusion(), size)
    blocks = number_blocks(torch.zeros_like(ids), size or 12)
    other = complement(one, batch, MASK, size)
    assert torch.equal(one.scored ^ other.scored, maskable) and not (one.scored & other.scored).any()
    assert torch.equal(other.input_ids, torch.where(other.scored, MASK, ids))
    for row in range(40):  # each half weighs its masks by its own rates: every block that has masks counts its tokens
        for half in (one, other):
            weighed = (half.weight * half.scored)[row].sum().item()
            alive = [b for b in blocks[row].unique() if half.scored[row][blocks[row] == b].any()]
            expected = sum(maskable[row][blocks[row] == b].sum().item() for b in alive)
            assert weighed == pytest.approx(expected, rel=1e-5) and half.count[row].item() == expected


@pytest.mark.parametrize("size", [0, 12, 40])
def test_a_row_that_is_one_block_has_one_rate_in_either_half_of_a_pair(size):
    """However many documents it holds."""
    batch = batch_of(torch.randint(4, 24, (3, 12)), DOCUMENTS.clamp(min=0))
    found = MaskedDiffusion(complementary_masks=True, block_size=size).corrupt(batch, MASK, StepNoise(0, 0, 3))
    for row in range(6):
        weights = found.weight[row][found.scored[row]].unique()
        assert len(weights) <= 1 and (weights * found.scored[row].sum() - 12).abs().max() < 1e-4


def test_both_halves_of_a_complementary_pair_are_learnt(tiny_model):
    """With uniform logits each half costs ln V per token that it counts; and every maskable token has a gradient."""
    model, batch = tiny_model(), batch_of(torch.randint(4, 24, (6, 9)))
    objective = MaskedDiffusion(complementary_masks=True, variable_length_prob=0.0, block_size=4)
    seen = objective.corrupt(batch, MASK, StepNoise(0, 0, 6)).scored
    assert seen.shape == (12, 9) and bool((seen[:6] ^ seen[6:]).all())
    torch.nn.init.zeros_(model.lm_head.weight)
    loss = objective(model, batch, StepNoise(0, 0, 6))
    torch.testing.assert_close(loss.nats / loss.count, torch.full((6,), math.log(23)))
    with pytest.raises(ValueError, match="--complementary-masks needs --mask-schedule fixed_count"):
        MaskedDiffusion(complementary_masks=True, mask_schedule="iid_t")


def test_cap_touches_only_predictions_that_are_right(tiny_model):
    """LLaDA 2.0 Eq. 6: the mean entropy over right predictions; it moves their logits alone, and sharpens them."""
    model, ids = tiny_model(), torch.randint(4, 24, (4, 12))
    noise, objective = StepNoise(0, 0, 4), MaskedDiffusion(variable_length_prob=0.0, block_size=4)
    scored = objective.corrupt(batch_of(ids), MASK, noise)
    logits = all_logits(model, scored.input_ids, ids, None, 4).detach()
    logits[..., MASK] = -math.inf
    guess = torch.where(torch.rand(4, 12) < 0.5, logits.argmax(-1), ids)  # about half of the targets are made right
    logits = logits[scored.scored].requires_grad_()
    targets = torch.where(scored.scored, guess, ids)[scored.scored]
    right = logits.argmax(-1) == targets
    positions = scored.scored.flatten().nonzero()[:, 0]
    by_row, _ = confidence_loss(logits, targets, positions, ids.shape)
    entropy = torch.distributions.Categorical(logits=logits.detach()).entropy()
    for row in range(4):
        mine = right & (positions // 12 == row)
        assert by_row[row].item() == pytest.approx(entropy[mine].mean().item() if mine.any() else 0.0, abs=1e-5)
    by_row.sum().backward()
    assert right.any() and (~right).any() and not logits.grad.isnan().any()
    assert not logits.grad[~right].any() and logits.grad[right].abs().sum(dim=1).min() > 0
    sharper = torch.distributions.Categorical(logits=(logits - 0.1 * logits.grad).detach()).entropy()
    assert (sharper[right] < entropy[right]).all()


def test_without_a_right_prediction_cap_is_nothing_and_its_gradient_is_defined(tiny_model):
    model, ids = tiny_model(), torch.randint(4, 24, (2, 6))
    model.lm_head.register_forward_hook(
        lambda module, args, logits: logits.index_add(-1, torch.tensor([5]), torch.full((*logits.shape[:-1], 1), 1e3))
    )
    batch = batch_of(ids.clamp(min=6))  # 5 is always predicted and never right
    losses = [
        MaskedDiffusion(variable_length_prob=0.0, cap_weight=w)(model, batch, StepNoise(0, 0, 2)) for w in (1.0, 2.0)
    ]
    assert torch.equal(losses[0].nats, losses[1].nats)
    losses[1].nats.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_noise_on_the_mask_embedding_touches_masked_positions_and_fades(tiny_model):
    model, masked = tiny_model(), torch.rand(3, 8) < 0.5
    objective = MaskedDiffusion(mask_embedding_noise=2.0, mask_embedding_noise_steps=100)
    for step, left in ((0, 2.0), (50, 1.0), (99, 0.02)):
        assert objective.embedding_noise_at(step) == pytest.approx(left)
    assert objective.embedding_noise_at(100) == objective.embedding_noise_at(200) == 0
    whole = embedding_noise(masked, 1, 16, StepNoise(0, 0, 3))
    assert torch.equal(whole.abs().sum(dim=-1) > 0, masked)
    assert whole[masked].std().item() == pytest.approx(1, rel=0.15)
    parts = [embedding_noise(masked[a:b], 1, 16, StepNoise(0, 0, 3, a)) for a, b in ((0, 1), (1, 3))]
    assert torch.equal(torch.cat(parts), whole)
    batch = batch_of(torch.randint(4, 24, (3, 8)))
    assert "perturbation" not in objective.prepare(batch, model.config, StepNoise(0, 100, 3))
    for block_size in (0, 4):
        quiet, noisy = (
            MaskedDiffusion(block_size=block_size, mask_embedding_noise=s, variable_length_prob=0.0)(
                model, batch, StepNoise(0, 0, 3)
            ).nats
            for s in (0.0, 1.0)
        )
        assert not torch.allclose(quiet, noisy)


def test_the_block_curriculum_goes_up_stays_and_comes_down():
    objective = MaskedDiffusion(
        use_block_curriculum=True,
        wsd_phase_ratios=(0.3, 0.5, 0.2),
        wsd_block_sizes_up=(1, 4, 16),
        wsd_block_sizes_down=(64, 32),
    )
    steps = [objective.block_size_at(step / 100) for step in range(100)]
    assert steps == [1] * 10 + [4] * 10 + [16] * 10 + [0] * 50 + [64] * 10 + [32] * 10
    assert objective.block_size_at(1.0) == objective.last_block_size == 32
    _, config = objective.settle(ModelConfig())
    assert (config.attention, config.block_size) == ("block", 32)
    assert objective.for_validation().block_size_at(0.0) == 32
    settled = [objective.schedules_done(step / 100) for step in range(101)]
    assert settled == [False] * 90 + [True] * 11  # before, a validation at blocks of 32 says little of the run
    assert replace(objective, use_block_curriculum=False, mask_schedule="wsd").schedules_done(0.79) is False
    assert replace(objective, use_block_curriculum=False, mask_schedule="wsd").schedules_done(0.81) is True
    for edge in (0.3, 0.8, 1.0):  # a hair before a phase ends is still its last size
        before = objective.block_size_at(math.nextafter(edge, 0.0))
        assert before == {0.3: 16, 0.8: 0, 1.0: 32}[edge]
    only_down = replace(objective, wsd_phase_ratios=(0.0, 0.0, 1.0))
    assert [only_down.block_size_at(p) for p in (0.0, 0.49, 0.5, 1.0)] == [64, 64, 32, 32]


def test_the_ceiling_of_the_mask_rate_warms_up_stays_and_decays():
    objective = MaskedDiffusion(mask_schedule="wsd", wsd_min_mask_ratio=0.2, wsd_max_mask_ratio=0.8)
    ids = torch.randint(4, 24, (300, 400))
    highest = []
    for progress in (0.0, 0.1, 0.5, 0.9, 1.0):
        noise = StepNoise(0, 1, 300, progress=progress)
        rates = mask_tokens(batch_of(ids), MASK, "wsd", noise, objective).scored.float().mean(dim=1)
        assert rates.min() < 0.1  # whatever the ceiling, light masks are drawn, too
        highest.append(rates.max().item())
    assert highest == pytest.approx([0.2, 0.5, 0.8, 0.5, 0.2], abs=0.06)


def test_without_time_weights_every_masked_token_counts_the_same():
    ids = torch.randint(4, 24, (50, 12))
    objective = MaskedDiffusion(mask_schedule="wsd", wsd_min_mask_ratio=0.05)
    found = mask_tokens(batch_of(ids), MASK, "wsd", StepNoise(0, 0, 50), objective)
    assert torch.equal(found.weight, torch.ones(50, 12)) and torch.equal(found.count, found.scored.sum(dim=1).float())
    assert found.count.min() == 1  # at a ceiling of 0.05 most rows would have none


def test_the_cosine_schedule_masks_more_than_the_linear_one_and_owes_it_less():
    ids = torch.randint(4, 24, (2000, 50))
    for schedule, mean in (("linear", 0.5), ("cosine", 2 / math.pi)):
        settings = MaskedDiffusion(noise_schedule=schedule)
        found = mask_tokens(batch_of(ids), MASK, "iid_t", StepNoise(0, 0, 2000), settings)
        assert found.scored.float().mean().item() == pytest.approx(mean, abs=0.02)
        # Either way the expected weight of a token is 1: the bound does not depend on the schedule.
        assert (found.weight * found.scored).mean().item() == pytest.approx(1.0, abs=0.03)
