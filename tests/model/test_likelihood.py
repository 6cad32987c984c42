import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from model import likelihood
from model.likelihood import diffusion_bound, masked_nats, row_nats
from tests.model.bounds import batch_of, block_bound, enumerated_bound

KINDS = {
    "causal": {"attention": "causal"},
    "full": {"attention": "full"},
    **{f"blocks of {size}": {"attention": "block", "block_size": size} for size in (1, 3, 5)},
}


def test_the_bound_of_one_token_is_exact_with_one_sample(tiny_model):
    """With a single scored token there is one mask; the bound is its conditional cross-entropy."""
    model = tiny_model(attention="full")
    ids = torch.randint(4, 24, (1, 6))
    scored = torch.zeros(1, 6, dtype=torch.bool)
    scored[0, 5] = True
    noised = ids.clone()
    noised[0, 5] = 3
    logits = model(noised)[0, 5].index_fill(0, torch.tensor([3]), -math.inf)
    result = row_nats(model, batch_of(ids, loss_mask=scored), num_samples=1)
    assert result.nats.item() == pytest.approx(F.cross_entropy(logits, ids[0, 5]).item(), rel=1e-6)
    assert result.count.tolist() == [1]


@pytest.mark.parametrize("ids", [[0, 2, 1, 0], [1, 2]])
def test_the_estimate_falls_within_its_stated_error_of_the_enumeration(ids, tiny_model):
    model, ids = tiny_model(vocab_size=4, attention="full"), torch.tensor(ids)
    with torch.no_grad():
        exact = enumerated_bound(model, ids)
    batch = batch_of(ids.repeat(64, 1))
    result = diffusion_bound(model, batch, num_samples=32)
    errors = (result.nats - exact) / result.variance.sqrt().clamp(min=1e-9)
    assert errors.abs().max() < 4.5
    assert result.nats.mean().item() == pytest.approx(exact, abs=4 * (result.variance.mean().sqrt() / 8).item())


def test_as_many_samples_as_tokens_visit_every_count_once(tiny_model):
    """Systematic k: for n samples of n tokens each k in 1..n occurs exactly once, so the constant-cost model is
    exact."""
    model = tiny_model(attention="full")
    torch.nn.init.zeros_(model.lm_head.weight)
    result = diffusion_bound(model, batch_of(torch.randint(4, 24, (5, 8))), num_samples=8)
    torch.testing.assert_close(result.nats, torch.full((5,), 8 * math.log(23), dtype=torch.float64))
    assert result.variance.max() < 1e-9


def test_the_sequence_probability_of_random_order_sampling_is_bounded(tiny_model):
    """-log p(x) <= bound, with p(x) the exact probability that one-by-one sampling in random order makes x (Jensen)."""
    model = tiny_model(vocab_size=4, attention="full")
    for ids in itertools.product(range(3), repeat=2):
        ids = torch.tensor(ids)
        with torch.no_grad():
            probability = 0.0
            for order in ((0, 1), (1, 0)):
                canvas, chance = torch.full_like(ids, 3), 0.5
                for position in order:
                    logits = model(canvas[None])[0, position].double()
                    logits[3] = -math.inf
                    chance *= logits.softmax(-1)[ids[position]].item()
                    canvas[position] = ids[position]
                probability += chance
            assert -math.log(probability) <= enumerated_bound(model, ids) + 1e-9


def test_autoregressive_nats_are_the_chain_rule(tiny_model):
    """Token by token: -sum of log p(x_i | x_<i), each from a pass over the prefix alone."""
    model, ids = tiny_model(), torch.randint(4, 24, (2, 7))
    expected = []
    for row in ids:
        logits = [model(row[None, :i], is_causal=True)[0, -1] for i in range(1, 7)]
        expected.append(sum(F.cross_entropy(x, row[i + 1]).item() for i, x in enumerate(logits)))
    result = row_nats(model, batch_of(ids), num_samples=1)
    torch.testing.assert_close(result.nats, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert result.variance.sum() == 0


def test_conditioning_tokens_are_never_masked(tiny_model):
    model, seen = tiny_model(attention="full"), []
    model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
    ids = torch.randint(4, 24, (2, 8))
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, 5:] = True
    diffusion_bound(model, batch_of(ids, loss_mask=mask), 8)
    assert len(seen) == 8 and all(torch.equal(x[:, :5], ids[:, :5]) for x in seen)
    assert all((x[:, 5:] == 3).any(dim=1).all() for x in seen)


def test_masked_nats_mask_the_share_asked_for(tiny_model):
    result = masked_nats(tiny_model(attention="full"), batch_of(torch.randint(4, 24, (3, 10))), ratio=0.3)
    assert result.count.tolist() == [3, 3, 3]


def test_the_bound_of_a_reply_is_the_enumeration_over_its_masks(tiny_model):
    """Given a prompt of two tokens; the reply ends in EOS (2) and one more that fills the canvas."""
    model, ids = tiny_model(vocab_size=4, attention="full"), torch.tensor([1, 0, 0, 1, 2, 2])
    with torch.no_grad():
        exact = enumerated_bound(model, ids, 2)
    reply = (torch.arange(6) >= 2).expand(64, 6)
    result = diffusion_bound(model, batch_of(ids.repeat(64, 1), loss_mask=reply), num_samples=32)
    assert ((result.nats - exact) / result.variance.sqrt()).abs().max() < 4.5
    assert result.nats.mean().item() == pytest.approx(exact, abs=4 * (result.variance.mean().sqrt() / 8).item())


@pytest.mark.parametrize("together", [2, 3, 7, 100])
def test_how_many_masks_share_a_pass_changes_nothing(together, tiny_model):
    """Rows of unlike lengths, one of them with a single scored token."""
    model, ids, passes = tiny_model(attention="full"), torch.randint(4, 24, (3, 9)), []
    place, lengths = torch.arange(9), torch.tensor([[9], [6], [4]])
    batch = batch_of(ids, (place < lengths).long() - 1, (place < lengths) & (place >= 3))
    apart = row_nats(model, batch, 7, seed=5)
    model.register_forward_pre_hook(lambda _, arguments: passes.append(len(arguments[0])))
    found = row_nats(model, batch, 7, seed=5, samples_per_pass=together)
    torch.testing.assert_close(found.nats, apart.nats, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.variance, apart.variance, rtol=1e-5, atol=1e-9)
    assert sum(passes) == 3 * 7 and len(passes) == math.ceil(7 / together)


def test_rows_of_one_scored_token_take_one_pass_and_have_no_error(tiny_model):
    model, ids, passes = tiny_model(attention="full"), torch.randint(4, 24, (2, 5)), []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    last = (torch.arange(5) == 4).expand(2, 5)
    many, one = (row_nats(model, batch_of(ids, loss_mask=last), samples) for samples in (9, 1))
    assert len(passes) == 2 and torch.equal(many.nats, one.nats) and many.variance.tolist() == [0, 0]
    mixed = row_nats(model, batch_of(ids, loss_mask=torch.stack([last[0], ids[1] > 0])), 1)
    assert mixed.variance[0] == 0 and mixed.variance[1].isnan()


@pytest.mark.parametrize("kind", KINDS)
def test_uniform_logits_cost_ln_v_per_token_whatever_the_kind(kind, tiny_model):
    """Only diffusion knows that [MASK] is never the next token."""
    model, place = tiny_model(**KINDS[kind]), torch.arange(11)
    torch.nn.init.zeros_(model.lm_head.weight)
    lengths = torch.tensor([[11], [7], [2]])
    batch = batch_of(torch.randint(4, 24, (3, 11)), (place < lengths).long() - 1, (place < lengths) & (place >= 1))
    found = row_nats(model, batch, 6)
    assert found.count.tolist() == [10, 6, 1]
    expected = found.count * math.log(24 if kind == "causal" else 23)
    torch.testing.assert_close(found.nats, expected.double(), rtol=1e-6, atol=1e-6)


# -- blocks ------------------------------------------------------------------------------------------------------------


def ragged_rows():
    """Two documents, one given in part, and padding; three documents; one. And by hand what block_bound makes of it."""
    documents = [[(7, 3), (4, 0)], [(1, 0), (2, 1), (8, 0)], [(9, 1)]]  # of each its length and how much is given
    ids, owner = torch.randint(4, 24, (3, 12)), torch.full((3, 12), -1)
    scored, pieces = torch.zeros(3, 12, dtype=torch.bool), []
    for row, some in enumerate(documents):
        begin = 0
        for number, (length, given) in enumerate(some):
            owner[row, begin : begin + length] = number
            scored[row, begin + given : begin + length] = True
            pieces.append((row, slice(begin, begin + length)))
            begin += length
    return batch_of(ids, owner, scored), pieces


@torch.no_grad()
def by_hand(model, batch, pieces):
    found = torch.zeros(3, dtype=torch.float64)
    for row, piece in pieces:
        found[row] += block_bound(model, batch["input_ids"][row, piece], batch["loss_mask"][row, piece])
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_small_blocks_are_enumerated(size, tiny_model):
    """Packed documents cost what each does alone, to the last digit, with 2^size - 1 passes over x_t and one over
    x_0, whatever the number of samples."""
    model, passes = tiny_model(attention="block", block_size=size), []
    batch, pieces = ragged_rows()
    expected = by_hand(model, batch, pieces)
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    for samples in (1, 50):
        found = row_nats(model, batch, samples)
        torch.testing.assert_close(found.nats, expected, rtol=1e-5, atol=1e-5)
        assert found.variance.tolist() == [0, 0, 0] and found.count.tolist() == batch["loss_mask"].sum(1).tolist()
    assert len(passes) == 2 * 2**size


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_drawn_masks_of_blocks_estimate_the_enumeration(size, tiny_model, monkeypatch):
    monkeypatch.setattr(likelihood, "ENUMERATED", 0)
    model, (batch, pieces) = tiny_model(attention="block", block_size=size), ragged_rows()
    expected, estimates = by_hand(model, batch, pieces), []
    for seed in range(6):
        found = row_nats(model, batch, 40, seed, samples_per_pass=40)
        assert ((found.nats - expected) / found.variance.sqrt()).abs().max() < 4
        estimates.append(found)
    mean = torch.stack([found.nats for found in estimates]).mean(0)
    error = torch.stack([found.variance for found in estimates]).mean(0).div(6).sqrt()
    assert ((mean - expected).abs() < 4 * error).all() and (error < 0.03 * expected).all()


def test_blocks_of_one_token_are_the_chain_rule_of_the_net(tiny_model):
    """[MASK] behind the tokens so far, under a causal mask: one token after the other."""
    model, ids = tiny_model(attention="block", block_size=1), torch.randint(4, 24, (2, 7))
    expected = torch.zeros(2, dtype=torch.float64)
    for row in range(2):
        for i in range(2, 7):
            logits = model(torch.cat([ids[row, :i], torch.tensor([3])])[None], is_causal=True)[0, -1]
            expected[row] += F.cross_entropy(logits.index_fill(0, torch.tensor([3]), -math.inf), ids[row, i]).item()
    found = row_nats(model, batch_of(ids, loss_mask=(torch.arange(7) >= 2).expand(2, 7)), 1)
    torch.testing.assert_close(found.nats, expected, rtol=1e-5, atol=1e-5)
    assert found.variance.tolist() == [0, 0]


@pytest.mark.parametrize("size", [9, 50])
def test_a_block_that_holds_the_row_is_full_diffusion_on_the_same_masks(size, tiny_model):
    torch.manual_seed(1)
    full = tiny_model(attention="full")
    block = tiny_model(attention="block", block_size=size)
    block.load_state_dict(full.state_dict())
    lengths = torch.tensor([[9], [6]])
    real = torch.arange(9) < lengths
    batch = batch_of(torch.randint(4, 24, (2, 9)), real.long() - 1, real & (torch.arange(9) >= 2))
    (a, b), (c, d) = ((row_nats(m, batch, 7, 5), masked_nats(m, batch, 0.4, 5)) for m in (full, block))
    assert torch.equal(a.nats, c.nats) and torch.equal(a.variance, c.variance) and torch.equal(b.nats, d.nats)


@pytest.mark.parametrize("size", [3, 6])
def test_how_many_masks_of_blocks_share_a_pass_changes_nothing(size, tiny_model):
    model, (batch, _) = tiny_model(attention="block", block_size=size), ragged_rows()
    apart, *others = (row_nats(model, batch, 7, 5, together) for together in (1, 2, 100))
    for found in others:
        torch.testing.assert_close(found.nats, apart.nats, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.variance, apart.variance, rtol=1e-5, atol=1e-9)


def test_every_block_meets_every_count_and_every_pass_is_of_middling_weight(tiny_model):
    model, seen = tiny_model(attention="block", block_size=8), []
    model.register_forward_pre_hook(lambda _, arguments: seen.append((arguments[0] == 3).view(2, 7, 8).sum(-1)))
    row_nats(model, batch_of(torch.randint(4, 24, (2, 56))), 8)
    counts = torch.stack(seen[1:])  # (8 passes, 2 rows, 7 blocks)
    assert (counts.sort(dim=0).values == torch.arange(1, 9)[:, None, None]).all()
    assert (counts.double().mean(dim=2) - 4.5).abs().max() < 1


def test_one_mask_ratio_meets_the_same_masks_in_models_of_any_block_size(tiny_model):
    ids, seen = torch.randint(4, 24, (2, 10)), []
    for more in ({"attention": "full"}, {"attention": "block", "block_size": 4}):
        model = tiny_model(**more)
        model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        assert masked_nats(model, batch_of(ids), ratio=0.3).count.tolist() == [3, 3]
    full, clean, blocks = seen
    assert torch.equal(full, blocks) and torch.equal(clean, ids)
