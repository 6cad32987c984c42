"""One set of weights that writes in blocks and autoregressively: attention by halves, and both terms of the loss."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from model import block_diffusion
from model.block_diffusion import block_diffusion_mask, block_diffusion_parts, denoising_inputs
from model.config import ModelConfig
from model.forward_process import StepNoise
from model.likelihood import row_nats
from model.masked_diffusion import MaskedDiffusion, without_fill
from model.objective import NextToken
from model.preference import DiffusionDPO, ExactDPO
from tests.model.bounds import batch_of, subsets
from tests.model.precision import require_same_in_bfloat16

MASK = 3
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, -1], [0] * 12, [0] * 5 + [1] * 7])


def joint(size, weight=0.5, **changes):
    return MaskedDiffusion(block_size=size, variable_length_prob=0.0, next_token_weight=weight, **changes)


def weights_as(model, kind):
    """The model itself, declared to be of one kind."""
    model.config = model.config.as_kind(kind)
    return model


# -- attention by halves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 4, 12])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("causal", [False, True])
def test_parts_give_the_logits_and_gradients_of_the_dense_mask(size, documents, causal, tiny_model, monkeypatch):
    """Of any size; with grouped queries, norms on queries and keys, and documents in a row."""
    model = tiny_model(num_key_value_heads=2, qk_norm=True).double().train()
    ids = torch.randint(4, 24, (3, 12))
    both, places = torch.cat([torch.where(torch.rand(3, 12) < 0.5, MASK, ids), ids], dim=1), torch.arange(12).repeat(2)
    of = torch.zeros(1, 12, dtype=torch.long) if documents is None else documents
    results = []
    for per_part in (5, 7, 128, None):
        monkeypatch.setattr(block_diffusion, "QUERIES_OF_A_PART", per_part)
        mask = block_diffusion_parts(of, size, causal) if per_part else block_diffusion_mask(of, size, causal)
        logits = model(both, attn_mask=mask, position_ids=places[None])
        results.append((logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))))
    for found in results[:-1]:
        for made, right in zip(found, results[-1], strict=True):
            torch.testing.assert_close(made, right)


@pytest.mark.parametrize("causal", [False, True])
def test_parts_in_bfloat16_are_those_of_float32_within_its_precision(causal, tiny_model, monkeypatch):
    monkeypatch.setattr(block_diffusion, "QUERIES_OF_A_PART", 5)
    model, ids = tiny_model().train(), torch.randint(4, 24, (3, 24))
    require_same_in_bfloat16(model, ids, attn_mask=block_diffusion_parts(DOCUMENTS, 4, causal))


def test_the_clean_half_is_causal_and_the_noisy_one_sees_what_it_sees_in_blocks():
    for size in (1, 3, 4):
        found, blocks = (block_diffusion_mask(DOCUMENTS, size, causal)[:, 0] for causal in (True, False))
        assert torch.equal(found[:, :12], blocks[:, :12]) and not found[:, 12:, :12].any()
        for row, of in enumerate(DOCUMENTS.tolist()):
            for i, j in itertools.product(range(12), repeat=2):
                assert bool(found[row, 12 + i, 12 + j]) == (of[i] == of[j] and j <= i)
    assert torch.equal(*(block_diffusion_mask(DOCUMENTS, 1, causal) for causal in (True, False)))


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 3, 4, 20])
def test_nothing_sees_what_it_predicts_bit_for_bit(size, tiny_model, monkeypatch):
    """A change of x_0 at position i moves no clean logit before i, and no noisy one of blocks up to its own."""
    monkeypatch.setattr(block_diffusion, "QUERIES_OF_A_PART", 5)
    model, ids = tiny_model(), torch.randint(4, 24, (3, 12))
    noisy = torch.where(torch.rand(3, 12) < 0.5, MASK, ids)

    def logits(clean):
        both, attention = denoising_inputs(noisy, clean, DOCUMENTS, size, torch.arange(36), causal=True)
        return model(both, **attention | {"select": None}).unflatten(1, (2, 12))

    before, column = logits(ids), torch.arange(12)
    for i in range(12):
        changed = torch.where(column == i, (ids - 4 + 7) % 20 + 4, ids)
        seen = (logits(changed) != before).any(dim=-1)
        for row, of in enumerate(DOCUMENTS):
            begin = (of == of[i]).nonzero()[0, 0]
            end = begin + ((i - begin) // size + 1) * size
            assert torch.equal(seen[row, 1], (of == of[i]) & (column >= i))
            assert torch.equal(seen[row, 0], (of == of[i]) & (column >= end))


# -- the loss ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def exact_terms(model, ids, size):
    """The bound of the blocks of ids (L,) by all sets of masks, and the chain rule, one pass each: clean tokens see
    those before them, and a noisy block sees itself as well."""
    bound = chain = 0.0
    for begin in range(0, len(ids), size):
        text = ids[: begin + size]
        sees = torch.ones(len(text), len(text)).tril().bool()
        sees[begin:] = True
        for masked in subsets(range(begin, len(text))):
            noised = text.clone()
            noised[masked] = MASK
            logits = model(noised[None], attn_mask=sees[None, None])[0].double()
            logits[:, MASK] = -math.inf
            nats = -logits.log_softmax(-1)[masked, text[masked]].sum().item()
            bound += nats / len(masked) / math.comb(len(text) - begin, len(masked))
    for i in range(1, len(ids)):
        chain -= model(ids[None, :i], is_causal=True)[0, -1].double().log_softmax(-1)[ids[i]].item()
    return bound, chain


@pytest.mark.parametrize("size", [1, 3])
def test_both_terms_are_what_they_are_by_definition(size, tiny_model):
    """Of 6,000 rows, the bound within 4 standard errors, and the chain rule; the loss is their weighted sum."""
    model, ids = tiny_model(vocab_size=5, num_hidden_layers=1), torch.tensor([0, 2, 1, 0, 1, 4, 2])
    bound, chain = exact_terms(model, ids, size)
    with torch.no_grad():
        loss = joint(size)(model, batch_of(ids.repeat(6_000, 1)), StepNoise(5, 0, 6_000))
        single = joint(size, weight=0)(model, batch_of(ids.repeat(6_000, 1)), StepNoise(5, 0, 6_000))
    (nats, count), (next_nats, next_count) = (loss.averages[name] for name in ("diffusion", "next_token"))
    error = single.nats.std().item() / math.sqrt(6_000)
    assert nats.item() / 6_000 == pytest.approx(bound, abs=4 * error + 2e-3)
    assert next_nats.item() / 6_000 == pytest.approx(chain, rel=1e-4)
    assert (count.item(), next_count.item()) == (7 * 6_000, 6 * 6_000)
    whole = loss.nats.sum() / loss.count.sum()
    assert whole.item() == pytest.approx(
        nats.item() / count.item() + 0.5 * next_nats.item() / next_count.item(), rel=1e-5
    )


def test_without_weight_it_is_block_diffusion_bit_for_bit(tiny_model):
    """And in blocks of one token a causal half is a block-causal one: then the first term is."""
    model, batch = tiny_model(), batch_of(torch.randint(4, 24, (3, 12)), DOCUMENTS)
    for size in (1, 4):
        plain, off, on = (joint(size, weight)(model, batch, StepNoise(1, 2, 3)) for weight in (None, 0.0, 0.5))
        assert torch.equal(plain.nats, off.nats) and plain.averages.keys() == off.averages.keys()
        assert torch.equal(on.averages["diffusion"][0], plain.nats.sum()) == (size == 1)


ROWS = {
    "packed": batch_of(torch.randint(4, 24, (3, 12)), DOCUMENTS, DOCUMENTS >= 0),
    "replies and their fill": batch_of(
        torch.randint(4, 24, (3, 12)),
        torch.where(torch.arange(12) < 11, 0, -1).expand(3, 12),
        (torch.arange(12) >= torch.tensor([[3], [5], [6]])) & (torch.arange(12) < 11),
    )
    | {"fill": (torch.arange(12) >= torch.tensor([[7], [11], [8]])) & (torch.arange(12) < 11)},
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("changes", [{}, {"complementary_masks": True}, {"cap_weight": 0.5}, {"sequence_mean": True}])
def test_the_next_token_term_is_the_loss_of_the_weights_declared_causal(rows, changes, tiny_model):
    """Nats and gradients, of the same rows, the fill left out; however the first term is made, and at any block size
    that a curriculum comes to."""
    model, batch = tiny_model(attention="joint", block_size=4), ROWS[rows]
    causal = NextToken(sequence_mean=changes.get("sequence_mean", False))
    right = causal(model, without_fill(batch), StepNoise(0, 0, 3))
    wanted = torch.autograd.grad(right.nats.sum(), list(model.parameters()))
    for size in (2, 4, 0):
        parts = [joint(size, weight, **changes)(model, batch, StepNoise(0, 0, 3)) for weight in (1.0, 2.0)]
        nats, count = parts[0].averages["next_token"]
        torch.testing.assert_close((nats, count), (right.nats.sum().detach(), right.count.sum()))
        share = parts[0].count / right.count
        torch.testing.assert_close(parts[1].nats - parts[0].nats, share * right.nats, rtol=1e-4, atol=1e-4)
        found = torch.autograd.grad(((parts[1].nats - parts[0].nats) / share).sum(), list(model.parameters()))
        for made, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)


def test_a_fill_is_learnt_by_diffusion_alone():
    batch = ROWS["replies and their fill"]
    left = without_fill(batch)["loss_mask"]
    assert left.sum(dim=1).tolist() == [4, 6, 2] and left[0].nonzero()[0, 0] == 3
    assert torch.equal(left, left & batch["loss_mask"])


def test_validation_is_of_both_terms_at_the_weight_of_the_training():
    trained = replace(joint(None), block_size=None, use_block_curriculum=True, mask_rate_min=0.3)
    validated = trained.for_validation()
    assert (validated.next_token_weight, validated.block_size, validated.mask_rate_min) == (0.5, 32, 0.0)
    assert validated.terms == ("diffusion", "next_token") and not MaskedDiffusion().terms


# -- what the weights are ----------------------------------------------------------------------------------------------


def test_a_joint_config_is_either_kind_and_others_are_one():
    config = ModelConfig(attention="joint", block_size=4)
    assert config.kinds == ("autoregressive", "diffusion") and config.as_kind("diffusion") is config
    assert config.as_kind("autoregressive") == ModelConfig() and not config.autoregressive
    for other in (ModelConfig(), ModelConfig(attention="full"), ModelConfig(attention="block", block_size=4)):
        (kind,) = other.kinds
        assert other.as_kind(kind) == other and (kind == "autoregressive") == other.autoregressive
        with pytest.raises(ValueError, match="is not"):
            other.as_kind("diffusion" if other.autoregressive else "autoregressive")
    with pytest.raises(ValueError, match="block_size 0 does not go with"):
        ModelConfig(attention="joint")


def test_what_a_training_makes_of_its_start_is_typed_and_not_guessed():
    start = ModelConfig(attention="joint", block_size=4)
    made = {weight: MaskedDiffusion(next_token_weight=weight).settle(start)[1] for weight in (0.0, 0.5)}
    assert [(c.attention, c.block_size) for c in made.values()] == [("block", 4), ("joint", 4)]
    with pytest.raises(ValueError, match="--next-token-weight"):
        MaskedDiffusion().settle(start)
    for other in (ModelConfig(), ModelConfig(attention="full")):
        assert MaskedDiffusion(block_size=4, next_token_weight=0.5).settle(other)[1].attention == "joint"
        with pytest.raises(ValueError, match="--block-size"):
            MaskedDiffusion(next_token_weight=0.5).settle(other)
    assert NextToken().settle(start)[1] == ModelConfig()


def test_preferences_tune_either_kind(tiny_model):
    """Autoregressive ones make causal weights; in blocks they stay joint, since their clean half is causal."""
    start = tiny_model(attention="joint", block_size=4).config
    for objective, expected in ((ExactDPO, "causal"), (DiffusionDPO, "joint")):
        kind = "autoregressive" if objective.autoregressive else "diffusion"
        reference = tiny_model(attention="joint", block_size=4)
        settled = objective(reference=weights_as(reference, kind)).settle(start)[1]
        assert settled.attention == expected


@pytest.mark.parametrize("size", [1, 3])
def test_a_likelihood_is_the_chain_rule_or_the_bound_of_the_same_weights(size, tiny_model):
    model, ids = tiny_model(attention="joint", block_size=size, vocab_size=5), torch.tensor([0, 2, 1, 0, 1, 4, 2])
    bound, chain = exact_terms(model, ids, size)
    assert row_nats(model, batch_of(ids[None]), 1).nats.item() == pytest.approx(bound, rel=1e-5)
    assert row_nats(weights_as(model, "autoregressive"), batch_of(ids[None]), 1).nats.item() == pytest.approx(
        chain, rel=1e-5
    )
