"""Exact likelihoods of a diffusion model that writes one token after the other, against enumerations."""

import itertools
import math

import pytest
import torch

from model.block_diffusion import block_diffusion_mask
from model.likelihood import chain_rule, confidence_chain_rule, diffusion_bound, next_token_nats, row_nats
from tests.model.bounds import batch_of, cost, enumerated_bound

KINDS = {
    "full": {"attention": "full"},
    **{f"{kind} {size}": {"attention": kind, "block_size": size} for kind in ("block", "joint") for size in (1, 2, 3)},
}
BOS, EOS, MASK = 1, 2, 3
WORDS = list(itertools.product(range(3), repeat=4))  # all rows of four tokens of a vocabulary of three and [MASK]


@pytest.fixture
def small_model(tiny_model):
    """A model of `WORDS`, EOS among their tokens."""
    return lambda kind: tiny_model(vocab_size=4, **KINDS[kind])


def after_bos(rows):
    """Rows given BOS."""
    ids = torch.cat([torch.full((len(rows), 1), BOS), torch.tensor(rows)], dim=1)
    scored = (torch.arange(ids.shape[1]) > 0).expand(ids.shape)
    return batch_of(ids, torch.zeros_like(ids), scored)


def nats(model, ids, masked, place):
    """-log p of ids[place] (L,), [MASK] at all of `masked`, in one pass over [x_t, x_0]."""
    config = model.config
    size = config.block_size or len(ids)
    noised = ids.clone()
    noised[masked] = MASK
    mask = block_diffusion_mask(torch.zeros(1, len(ids), dtype=torch.long), size, config.attention == "joint")
    logits = model(torch.cat([noised, ids])[None], attn_mask=mask, position_ids=torch.arange(len(ids)).repeat(2)[None])
    logits = logits[0, place].double()
    logits[MASK] = -math.inf
    return -logits.log_softmax(-1)[ids[place]].item(), logits.softmax(-1).max().item()


@torch.no_grad()
def by_hand(model, ids, begin, next_of):
    """Block after block and token after token; next_of(places left, their confidences) -> the next place."""
    total, size = 0.0, model.config.block_size or len(ids)
    for first in range(0, len(ids), size):
        left = [place for place in range(first, min(first + size, len(ids))) if place >= begin]
        while left:
            found = {place: nats(model, ids, left, place) for place in left}
            chosen = next_of(left, [found[place][1] for place in left])
            total += found[chosen][0]
            left.remove(chosen)
    return total


def surest(left, confidences):
    return left[confidences.index(max(confidences))]


@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_both_orders_are_a_loop_over_tokens(kind, documents, tiny_model):
    model, ids = tiny_model(**KINDS[kind]), torch.randint(4, 24, (3, 8))
    batch = batch_of(ids, torch.zeros_like(ids) if documents else None, (torch.arange(8) >= 2).expand(3, 8))
    for found, next_of in (
        (chain_rule(model, batch), lambda left, _: left[0]),
        (confidence_chain_rule(model, batch), surest),
    ):
        expected = torch.tensor([by_hand(model, row, 2, next_of) for row in ids], dtype=torch.float64)
        torch.testing.assert_close(found.nats, expected, rtol=1e-5, atol=1e-5)
        assert found.count.tolist() == [6, 6, 6] and found.variance.tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_over_all_orders_is_the_bound(kind, small_model):
    """In blocks the same order in each; a block that is short, or given in part, has that of the tokens that it has."""
    model, row = small_model(kind), [0, 2, 1, 0]
    size = model.config.block_size or 5
    rank = torch.tensor([[order[place % size] for place in range(5)] for order in itertools.permutations(range(size))])
    batch = after_bos([row] * len(rank))
    found = chain_rule(model, batch, rank).nats
    if kind == "full":
        expected = enumerated_bound(model, batch["input_ids"][0], begin=1)
    else:
        expected = row_nats(model, batch, 1).nats[0].item()
    assert found.mean().item() == pytest.approx(expected, rel=1e-6)
    assert kind.endswith("1") or found.std() > 0.01  # the orders differ


@pytest.mark.parametrize("kind", KINDS)
def test_the_chances_of_all_rows_add_up_to_one(kind, small_model):
    """An order that looks at the true token would give some rows more than their share. So no chain rule is on average
    below the entropy of a source, nor is the bound, nor what joint weights pay autoregressively."""
    model, batch = small_model(kind), after_bos(WORDS)
    source = torch.distributions.Dirichlet(torch.full((len(WORDS),), 0.3, dtype=torch.float64)).sample()
    found = [chain_rule(model, batch), confidence_chain_rule(model, batch)]
    found.append(chain_rule(model, batch, torch.tensor([0, 3, 1, 0, 2]).expand(len(WORDS), 5)))
    for value in found:
        assert value.nats.neg().exp().sum().item() == pytest.approx(1, abs=1e-5)
    entropy = torch.special.entr(source).sum()
    others = [diffusion_bound(model, batch, 40)] + [next_token_nats(model, batch)] * (kind.startswith("joint"))
    assert all((source * value.nats).sum() >= entropy for value in found + others)


@pytest.mark.parametrize("kind", ["block", "joint"])
def test_in_blocks_of_one_token_all_are_the_chain_rule_of_the_net(kind, tiny_model):
    """[MASK] behind the tokens so far, under a causal mask."""
    model, batch = tiny_model(attention=kind, block_size=1), batch_of(torch.randint(4, 24, (2, 7)))
    expected = [sum(cost(model, row[: i + 1], [i], 1) for i in range(7)) for row in batch["input_ids"]]
    values = (row_nats(model, batch, 1), chain_rule(model, batch), confidence_chain_rule(model, batch))
    for value in values:
        torch.testing.assert_close(value.nats, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_joint_weights_pay_autoregressively_what_they_do_as_a_causal_model(tiny_model):
    model, batch = tiny_model(attention="joint", block_size=3), after_bos(WORDS[:9])
    found = next_token_nats(model, batch)
    model.config = model.config.as_kind("autoregressive")
    assert torch.equal(found.nats, row_nats(model, batch, 1).nats) and found.count.tolist() == [4] * 9


@pytest.mark.parametrize("kind", ["full", "block 3", "joint 3"])
def test_what_follows_the_end_costs_nothing_from_left_to_right_alone(kind, small_model):
    """Reply 0, 1, EOS and two more EOS that fill the canvas. They are [MASK] until the others are written."""
    model, ids = small_model(kind), torch.tensor([BOS, 0, 1, EOS, EOS, EOS])
    batch = batch_of(ids[None], torch.zeros(1, 6, dtype=torch.long), (torch.arange(6) >= 1)[None])
    filled = batch | {"fill": (torch.arange(6) >= 4)[None]}
    found, whole = chain_rule(model, filled), chain_rule(model, batch)
    size = model.config.block_size or 6
    steps = [(place, range(place, min((place // size + 1) * size, 6))) for place in (1, 2, 3)]
    with torch.no_grad():
        expected = sum(nats(model, ids, list(masked), place)[0] for place, masked in steps)
    assert found.nats.item() == pytest.approx(expected, rel=1e-5) and found.count.tolist() == [3]
    assert whole.nats > found.nats
    assert confidence_chain_rule(model, filled).nats == confidence_chain_rule(model, batch).nats


@pytest.mark.parametrize("kind", ["full", "block 3", "joint 3"])
def test_neither_padding_nor_the_passes_change_a_row(kind, tiny_model):
    model, place = tiny_model(**KINDS[kind]), torch.arange(9)
    ids, lengths, begins = torch.randint(4, 24, (3, 9)), torch.tensor([[9], [6], [2]]), torch.tensor([[1], [3], [1]])
    real = place < lengths
    batch = batch_of(ids, real.long() - 1, real & (place >= begins))
    passes = []
    model.register_forward_pre_hook(lambda _, arguments: passes.append(len(arguments[0])))
    together = [chain_rule(model, batch, steps_per_pass=steps) for steps in (1, 2, 100)] + [
        confidence_chain_rule(model, batch)
    ]
    number, x_0 = (8, []) if kind == "full" else (3, [3])  # a pass over x_0, and in each block one for each token
    for steps in (1, 2, 100, 1):
        expected = x_0 + [3 * min(steps, number - done) for done in range(0, number, steps)]
        assert [passes.pop(0) for _ in expected] == expected
    for row, length in enumerate(lengths[:, 0].tolist()):
        alone = {name: values[row : row + 1, :length] for name, values in batch.items()}
        for found in together[:3]:
            torch.testing.assert_close(found.nats[row : row + 1], chain_rule(model, alone).nats, rtol=1e-5, atol=1e-5)
        expected = confidence_chain_rule(model, alone).nats
        torch.testing.assert_close(together[3].nats[row : row + 1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["full", "block 2", "joint 2"])
def test_mask_is_no_prediction_and_uniform_logits_cost_the_logarithm_of_all_others(kind, small_model):
    model, batch = small_model(kind), after_bos(WORDS[:5])
    torch.nn.init.zeros_(model.lm_head.weight)
    for value in (chain_rule(model, batch), confidence_chain_rule(model, batch)):
        torch.testing.assert_close(value.nats, torch.full((5,), 4 * math.log(3), dtype=torch.float64))
