"""Learning to edit: what x_t shows, what its loss estimates, and what a model learns from it."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from model.attention import document_mask
from model.editing import drafts, edit_loss, other_tokens, sampled
from model.forward_process import StepNoise
from model.masked_diffusion import MaskedDiffusion
from tests.model.bounds import batch_of, subsets

MASK = 3
PLAIN = MaskedDiffusion(variable_length_prob=0.0)
RANDOM = replace(PLAIN, edit_weight=0.7)
SELF = replace(RANDOM, edit_source="self")
KINDS = {
    "random": RANDOM,
    "self": SELF,
    "in rounds": replace(SELF, edit_rounds=2),
    "blocks": replace(SELF, block_size=4, sequence_mean=True),
    "joint": replace(SELF, block_size=4, next_token_weight=0.5),
    "complementary": replace(SELF, complementary_masks=True),
    "random, complementary": replace(RANDOM, complementary_masks=True, block_size=4),
}
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, -1], [0] * 12, [0] * 5 + [1] * 7])


def rows(loss_mask=DOCUMENTS >= 0):
    return batch_of(torch.randint(4, 24, (3, 12)), DOCUMENTS, loss_mask)


def shown(objective, model, prepared):
    """x_t as each round learns from it, (R, L)."""
    turns = drafts(model, prepared) if objective.edit_source == "self" else [prepared]
    return [turn["noised_ids"] for turn in turns]


# -- what x_t shows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_only_visible_scored_tokens_are_replaced_and_the_masks_are_those_without_edits(kind, tiny_model):
    objective, model = replace(KINDS[kind], edit_rate=1.0), tiny_model()
    batch, noise = rows((DOCUMENTS >= 0) & (torch.arange(12) > 1)), StepNoise(0, 1, 3)
    edited = objective.prepare(batch, model.config, noise)
    plain = replace(objective, edit_weight=0.0).prepare(batch, model.config, noise)
    for name in ("positions", "targets", "weight", "count", "rate"):
        assert torch.equal(edited[name], plain[name])
    clean, maskable = (batch[name].repeat(objective.num_copies, 1) for name in ("input_ids", "loss_mask"))
    masked = plain["noised_ids"] == MASK
    assert torch.equal(edited["visible"], (maskable & ~masked).flatten().nonzero()[:, 0])
    assert torch.equal(edited["visible_targets"], clean.flatten()[edited["visible"]])
    for noised in shown(objective, model, edited):
        wrong = noised != plain["noised_ids"]
        assert wrong.any() and not (wrong & ~(maskable & ~masked)).any()
        assert not (noised[wrong] == MASK).any()
        if objective.complementary_masks:  # every token is asked for twice, and replaced at most once
            assert not (wrong[:3] & wrong[3:]).any()
            assert torch.equal((masked[:3] | masked[3:]) & batch["loss_mask"], masked[:3] | masked[3:])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_shown_depends_on_seed_step_and_row_alone(kind, tiny_model):
    """Whatever the micro-batch, and so the process, that a row falls into."""
    objective, model, batch = KINDS[kind], tiny_model(), rows()
    noise = StepNoise(4, 1, 3, width=20)

    def of(first, last, noise):
        part = {name: tensor[first:last] for name, tensor in batch.items()}
        prepared = objective.prepare(part, model.config, replace(noise, first_row=first))
        views = [view.view(objective.num_copies, last - first, 12) for view in shown(objective, model, prepared)]
        return torch.stack(views).transpose(0, 2), objective.loss(model, prepared).nats

    whole, nats = of(0, 3, noise)
    for first, last in ((0, 1), (1, 3)):
        part, part_nats = of(first, last, noise)
        assert torch.equal(part, whole[first:last])
        torch.testing.assert_close(part_nats, nats[first:last])
    for other in (replace(noise, seed=5), replace(noise, step=2)):
        assert not torch.equal(of(0, 3, other)[0], whole)


def test_a_round_goes_on_from_the_drafts_before(tiny_model):
    model, objective = tiny_model(), replace(SELF, edit_rounds=3)
    prepared = objective.prepare(rows(), model.config, StepNoise(0, 1, 3))
    turns = list(drafts(model, prepared))
    before, attn_mask = prepared["noised_ids"], document_mask(DOCUMENTS)
    for draft, turn in zip(prepared["drafts"], turns, strict=True):
        # What is written is drawn where it was masked, and not seen; all else stays.
        places = draft["positions"]
        asked = before.flatten().index_fill(0, places, MASK).view(3, 12)
        hidden = model(asked, attn_mask=attn_mask, head=False).flatten(0, 1)[places]
        written = sampled(hidden, model.lm_head.weight, draft["draw"], MASK)
        assert torch.equal(turn["noised_ids"].flatten(), asked.flatten().index_copy(0, places, written))
        before = turn["noised_ids"]
    losses = [objective.loss_of(model, turn) for turn in turns]
    loss = objective.loss(model, prepared)
    torch.testing.assert_close(loss.nats, sum(part.nats for part in losses) / 3)
    assert torch.equal(loss.count, losses[0].count)
    assert loss.averages["repair_rate_self"][1] == sum(part.averages["repair_rate_self"][1] for part in losses)


def test_a_random_token_is_any_other_ordinary_one(tiny_model):
    """Numbers spread evenly over [0, 1) hit all equally often; PAD, BOS, EOS and [MASK], 0 to 3, never."""
    for token, others in ((2, 20), (4, 19), (11, 19), (23, 19)):
        found = other_tokens(torch.full((1, 1900), token), torch.arange(1900)[None] / 1900, tiny_model().config)
        counts = found.flatten().bincount(minlength=24)
        assert not counts[:4].any() and not counts[token]
        assert (counts > 0).sum() == others and counts[counts > 0].max() - counts[counts > 0].min() <= 1


def test_each_row_has_a_rate_of_its_own_uniform_up_to_the_largest(tiny_model):
    """Of v visible tokens a are replaced: a / v is on average half of the largest rate, and a (a - 1) / v (v - 1), the
    square of the row's rate, a third of its square."""
    batch = batch_of(torch.randint(4, 24, (20_000, 12)))
    for rate in (0.3, 0.9):
        prepared = replace(RANDOM, edit_rate=rate).prepare(batch, tiny_model().config, StepNoise(0, 0, 20_000))
        masked = prepared["noised_ids"] == MASK
        a, v = ((prepared["noised_ids"] != batch["input_ids"]) & ~masked).sum(1).double(), (~masked).sum(1)
        a, v = a[v > 1], v[v > 1]
        assert (a / v).mean().item() == pytest.approx(rate / 2, rel=0.03)
        assert (a * (a - 1) / (v * (v - 1))).mean().item() == pytest.approx(rate**2 / 3, rel=0.08)


def test_tokens_are_drawn_from_the_prediction(tiny_model):
    """Numbers spread evenly over [0, 1) hit every token in proportion to its probability, [MASK] never."""
    model, hidden = tiny_model(), torch.randn(32)
    tokens = sampled(hidden.expand(20_000, -1), model.lm_head.weight, torch.arange(20_000) / 20_000, MASK)
    p = (model.lm_head.weight @ hidden).index_fill(0, torch.tensor(MASK), -math.inf).softmax(0)
    torch.testing.assert_close(tokens.bincount(minlength=24) / 20_000, p, rtol=0, atol=2e-4)
    ends = sampled(hidden.expand(2, -1), model.lm_head.weight, torch.tensor([0.0, 1 - 2**-24]), MASK)
    assert ends.tolist() == [0, 23]


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_clean_half_stays_clean(weight, tiny_model):
    """No key or value of x_0 changes with what stands in x_t."""
    objective, model = replace(RANDOM, block_size=4, next_token_weight=weight), tiny_model()
    seen = []
    for layer in model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.register_forward_hook(lambda module, inputs, output: seen.append(output))
    batch, results = rows(), []
    for rate in (1e-6, 1.0):
        prepared = replace(objective, edit_rate=rate).prepare(batch, model.config, StepNoise(0, 1, 3))
        loss = objective.loss(model, prepared)
        results.append(([output[:, 12:] for output in seen], [output[:, :12] for output in seen], loss.averages))
        seen.clear()
    (clean, noisy, averages), (same, other, after) = results
    assert all(map(torch.equal, clean, same)) and not any(map(torch.equal, noisy, other))
    assert not weight or averages["next_token"] == after["next_token"]


# -- what the loss is --------------------------------------------------------------------------------------------------


def proposals(source, model, canvas, places, ids):
    """(tokens, probability) of all that a source may write at some places of x_t."""
    if source == "random":
        options = [[token for token in (4, 5, 6) if token != ids[place]] for place in places]
        return [(tokens, math.prod(1 / len(o) for o in options)) for tokens in itertools.product(*options)]
    asked = canvas.clone()
    asked[places] = MASK
    p = log_p(model, asked).exp()[places]
    return [
        (tokens, math.prod(float(p[i, token]) for i, token in enumerate(tokens)))
        for tokens in itertools.product(range(7), repeat=len(places))
    ]


def log_p(model, canvas):
    return model(canvas[None])[0].double().index_fill(-1, torch.tensor(MASK), -math.inf).log_softmax(-1)


@pytest.mark.parametrize("source", ["random", "self"])
@torch.no_grad()
def test_the_loss_estimates_the_mean_over_masks_rates_places_and_tokens(source, tiny_model):
    """By definition: k ~ U{1..n} masks S, rho ~ U[0, rate], D of the visible V replaced; n / |S| times the nats of S,
    and n / |V| times those of all of V, right or wrong."""
    model, ids, rate, n = tiny_model(vocab_size=7), torch.tensor([4, 2, 5]), 0.8, 3
    rho = rate * (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    expected, edits = 0.0, 0.0
    for masked in subsets(range(n)):
        visible = [place for place in range(n) if place not in masked]
        canvas = ids.clone()
        canvas[masked] = MASK
        for chosen in [[], *subsets(visible)]:
            share = (rho ** len(chosen) * (1 - rho) ** (len(visible) - len(chosen))).mean().item()
            share /= n * math.comb(n, len(masked))
            for tokens, p in proposals(source, model, canvas, chosen, ids):
                noised = canvas.clone()
                noised[chosen] = torch.tensor(tokens, dtype=torch.long)
                nats = -log_p(model, noised)[torch.arange(n), ids]
                expected += share * p * n * nats[masked].mean().item()
                edits += share * p * n * nats[visible].mean().item() if visible else 0.0
    objective = replace(RANDOM, edit_source=source, edit_rate=rate)
    nats = objective(model, batch_of(ids.repeat(6_000, 1)), StepNoise(5, 0, 6_000)).nats
    error = nats.std().item() / math.sqrt(6_000)
    assert nats.mean().item() == pytest.approx(expected + 0.7 * edits, abs=4 * error)
    assert edits > 10 * error


def test_a_draft_leaves_no_trace_in_the_gradient(tiny_model):
    """In bfloat16, too, where autocast keeps the weights that it has cast."""
    model = tiny_model(tie_embeddings=True).train()
    prepared = SELF.prepare(rows(), model.config, StepNoise(0, 1, 3))
    gradients = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drafted = next(drafts(model, prepared))
    for given in (prepared, {name: value for name, value in drafted.items() if name != "drafts"}):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = SELF.loss(model, given).nats.sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(map(torch.equal, *gradients))


def test_the_rates_are_what_they_say(tiny_model):
    """Five visible tokens: right and kept; right, and another surely; right, and another by a little; wrong and
    repaired; wrong and not."""
    model = tiny_model(hidden_size=24)
    torch.nn.init.eye_(model.lm_head.weight)
    hidden = torch.zeros(5, 24)
    hidden[range(5), [4, 9, 9, 4, 9]] = torch.tensor([20.0, 20.0, 0.1, 0.1, 20.0])
    text = torch.full((1, 6), 4)
    prepared = {
        "input_ids": text,
        "noised_ids": torch.tensor([[MASK, 4, 4, 4, 8, 8]]),
        "visible": torch.arange(1, 6),
        "visible_targets": text[0, 1:],
    }
    loss = edit_loss(hidden, model, prepared, "random")
    values = {name: (int(total), int(number)) for name, (total, number) in loss.averages.items() if "loss" not in name}
    assert values == {
        "wrong_random": (2, 5),
        "repair_rate_random": (1, 2),
        "false_edit_rate_random": (2, 3),
        "sure_false_edit_rate_random": (1, 3),
    }
    logits = hidden.index_fill(1, torch.tensor(MASK), -math.inf)
    torch.testing.assert_close(loss.nats[0], -logits.log_softmax(1)[:, 4].sum())
    assert loss.count.tolist() == [5]


def test_validation_is_the_plain_bound_with_the_rates_of_both_sources_beside_it(tiny_model):
    model, batch, noise = tiny_model(), rows(), StepNoise(0, 0, 3)
    for changes in ({}, {"block_size": 4, "next_token_weight": 0.5}):
        plain = replace(PLAIN, **changes).for_validation()(model, batch, noise)
        edited = replace(RANDOM, edit_rate=0.9, mask_rate_min=0.5, **changes).for_validation()(model, batch, noise)
        assert torch.equal(edited.nats, plain.nats) and torch.equal(edited.count, plain.count)
        assert all(edited.averages[name][0].equal(plain.averages[name][0]) for name in plain.averages)
        beside = edited.averages.keys() - plain.averages.keys()
        assert {"repair_rate_random", "repair_rate_self", "false_edit_rate_self"} < beside
        assert "edit" not in beside and "diffusion" not in beside


# -- what a model learns -----------------------------------------------------------------------------------------------


class WrongOnes(MaskedDiffusion):
    """The loss without the visible tokens that are right."""

    def prepare(self, batch, config, noise):
        prepared = super().prepare(batch, config, noise)
        wrong = prepared["noised_ids"].flatten()[prepared["visible"]] != prepared["visible_targets"]
        return prepared | {name: prepared[name][wrong] for name in ("visible", "visible_targets")}


def test_learning_from_wrong_tokens_alone_makes_a_model_edit_right_ones(tiny_model):
    """In text of independent tokens, a visible one is known from itself alone."""
    batch, rates = batch_of(torch.randint(4, 24, (32, 6))), []
    for kind in (MaskedDiffusion, WrongOnes):
        model = tiny_model(num_hidden_layers=1).train()
        objective = kind(variable_length_prob=0.0, edit_weight=1.0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(60):
            loss = objective(model, batch, StepNoise(0, step, 32))
            optimizer.zero_grad()
            (loss.nats.sum() / loss.count.sum()).backward()
            optimizer.step()
        wrong, right = RANDOM(model, batch, StepNoise(1, 0, 32)).averages["false_edit_rate_random"]
        rates.append(float(wrong / right))
    assert rates[0] < 0.1 < 0.9 < rates[1], rates
