import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model.attention import block_causal_mask, document_mask
from model.forward_process import MASK_SCHEDULES, StepNoise, mask_tokens
from model.losses import repetition_penalty, run_lengths, unlikelihood
from model.masked_diffusion import MaskedDiffusion
from model.objective import NextToken
from model.preference import DiffusionDPO, ExactDPO
from model.transformer import Transformer
from tests.conftest import TINY
from tests.model.bounds import batch_of, cost, enumerated_bound, subsets

DIFFUSION = MaskedDiffusion(variable_length_prob=0.0)


def uniform(model):
    torch.nn.init.zeros_(model.lm_head.weight)
    return model


@pytest.mark.parametrize("schedule", MASK_SCHEDULES)
@pytest.mark.parametrize("step", range(3))
def test_uniform_logits_cost_ln_v_under_every_schedule(schedule, step, tiny_model):
    """V counts the 23 tokens that can be predicted: [MASK] cannot. Holds for every row alone, whatever its mask
    rate."""
    batch = batch_of(torch.randint(4, 24, (6, 9)))
    loss = replace(DIFFUSION, mask_schedule=schedule)(uniform(tiny_model()), batch, StepNoise(0, step, 6))
    if schedule == "iid_t":  # unbiased over masks only: weight / n times the number of masks is 1 on average
        ratio = loss.averages["loss_by_rate"][0].sum() / loss.averages["loss_by_rate"][1].sum()
        assert float(ratio) == pytest.approx(math.log(23), rel=1e-6)
    else:
        torch.testing.assert_close(loss.nats / loss.count, torch.full((6,), math.log(23)))


def test_uniform_logits_cost_ln_v_autoregressively(tiny_model):
    loss = NextToken()(uniform(tiny_model()), batch_of(torch.randint(4, 24, (2, 9))), StepNoise(0, 0, 2))
    torch.testing.assert_close(loss.nats / loss.count, torch.full((2,), math.log(24)))
    assert loss.count.tolist() == [8, 8]


def any_order_chain_rule(model, ids):
    """Mean over all orders of the sum of -log p(token | tokens revealed before) (LLaDA Eq. 14-15)."""
    n, mask_id, total = len(ids), model.config.mask_token_id, 0.0
    for order in itertools.permutations(range(n)):
        canvas = torch.full_like(ids, mask_id)
        for position in order:
            logits = model(canvas[None])[0, position].double()
            logits[mask_id] = -math.inf
            total -= logits.log_softmax(-1)[ids[position]].item()
            canvas[position] = ids[position]
    return total / math.factorial(n)


@pytest.mark.parametrize("ids", [[0, 2, 1, 0], [1, 1, 2], [2]])
def test_eq3_eq6_and_the_average_over_all_orders_agree(ids, tiny_model):
    model, ids, n = tiny_model(vocab_size=4), torch.tensor(ids), len(ids)
    with torch.no_grad():
        # Eq. 3 with t integrated out: Beta(k, n - k + 1) = 1 / (k C(n, k)).
        weights = {k: math.exp(math.lgamma(k) + math.lgamma(n - k + 1) - math.lgamma(n + 1)) for k in range(1, n + 1)}
        eq3, eq6 = sum(cost(model, ids, s) * weights[len(s)] for s in subsets(range(n))), enumerated_bound(model, ids)
        assert eq3 == pytest.approx(eq6, rel=1e-12)
        assert any_order_chain_rule(model, ids) == pytest.approx(eq6, rel=1e-6)


@pytest.mark.parametrize("schedule", ["iid_t", "fixed_count"])
def test_training_losses_estimate_the_enumerated_bound(schedule, tiny_model):
    """20,000 rows of one sequence: the mean is the exact bound, within four of its own standard errors.

    iid_t draws t from (eps, 1 - eps) and gives an empty row one mask of weight n; its expectation, worked out from
    that, differs from the bound by the empty rows' share, which the test adds.
    """
    model, ids = tiny_model(vocab_size=4), torch.tensor([0, 2, 1, 0])
    with torch.no_grad():
        exact = enumerated_bound(model, ids)
        loss = replace(DIFFUSION, mask_schedule=schedule, iid_mask_eps=1e-4)(
            model, batch_of(ids.repeat(20_000, 1)), StepNoise(5, 0, 20_000)
        )
        one_mask = sum(cost(model, ids, [position]) for position in range(4))
    expected = exact + (one_mask / 5 if schedule == "iid_t" else 0.0)  # P(no mask of 4) = integral of (1 - t)^4 = 1/5
    error = loss.nats.std().item() / math.sqrt(20_000)
    assert loss.nats.mean().item() == pytest.approx(expected, abs=4 * error + 2e-3)


@pytest.mark.parametrize("schedule", ["iid_t", "fixed_count"])
def test_in_a_band_the_training_loss_estimates_the_mean_over_the_band(schedule, tiny_model):
    """(1 / (b - a)) integral from a to b of n g(t) dt, n t g(t) the expected nats at rate t; for fixed_count the mean
    over the counts 2, 3, 4 of 5 of (n / k) nats, and iid_t gives a row left empty one mask of weight n."""
    model, ids, n, (a, b) = tiny_model(vocab_size=4), torch.tensor([0, 2, 1, 0, 1]), 5, (0.3, 0.8)
    band = replace(DIFFUSION, mask_schedule=schedule, mask_rate_min=a, mask_rate_max=b)
    with torch.no_grad():
        # The mean over the sets of k tokens of their cost.
        costs = {k: [cost(model, ids, s) for s in subsets(range(n)) if len(s) == k] for k in range(1, n + 1)}
        means = {k: sum(nats) / len(nats) for k, nats in costs.items()}
        loss = band(model, batch_of(ids.repeat(20_000, 1)), StepNoise(5, 0, 20_000))
    if schedule == "fixed_count":
        expected = sum(n / k * means[k] for k in (2, 3, 4)) / 3
    else:
        t = a + (b - a) * (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
        expected = sum(math.comb(n, k) * t ** (k - 1) * (1 - t) ** (n - k) * means[k] for k in means).mean().item()
        expected += ((1 - t) ** n).mean().item() * n * means[1]
    error = loss.nats.std().item() / math.sqrt(20_000)
    assert loss.nats.mean().item() == pytest.approx(expected, abs=4 * error)
    assert abs(expected - enumerated_bound(model, ids)) > 8 * error  # and this is not the bound


@pytest.mark.parametrize("low, high", [(-0.1, 1.0), (0.0, 1.1), (0.5, 0.5), (0.8, 0.3)])
def test_a_band_that_is_empty_or_leaves_0_to_1_is_refused(low, high):
    with pytest.raises(ValueError, match="--mask-rate-m.. .*must be"):
        MaskedDiffusion(mask_rate_min=low, mask_rate_max=high)


def test_a_band_within_eps_of_0_holds_no_rate_for_iid_t():
    MaskedDiffusion(mask_rate_max=0.01, iid_mask_eps=0.02)
    with pytest.raises(ValueError, match="--iid-mask-eps 0.02"):
        MaskedDiffusion(mask_schedule="iid_t", mask_rate_max=0.01, iid_mask_eps=0.02)


def test_random_rate_is_the_plain_mean_over_masked_tokens_and_not_the_bound(tiny_model):
    model, batch = tiny_model(), batch_of(torch.randint(4, 24, (8, 12)))
    noise = StepNoise(0, 0, 8)
    loss = replace(DIFFUSION, mask_schedule="random")(model, batch, noise)
    noised = mask_tokens(batch, 3, "random", noise, DIFFUSION)
    logits = model(noised.input_ids)
    logits[..., 3] = -math.inf
    plain = F.cross_entropy(logits[noised.scored], batch["input_ids"][noised.scored])
    torch.testing.assert_close(loss.nats.sum() / loss.count.sum(), plain)
    bound = DIFFUSION(model, batch, noise)
    assert not torch.isclose(bound.nats.sum() / bound.count.sum(), plain, rtol=1e-3)


@pytest.mark.parametrize("objective", [NextToken(), DIFFUSION, replace(DIFFUSION, mask_schedule="iid_t")])
def test_loss_and_gradient_with_the_scored_only_head_equal_the_dense_ones(objective, tiny_model):
    model = tiny_model()
    documents = torch.tensor([[0] * 4 + [1] * 6, [0] * 7 + [-1] * 3])
    ids = torch.randint(4, 24, (2, 10))
    batch = batch_of(ids, documents, documents >= 0)
    noise = StepNoise(0, 0, 2)

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    ours = objective(model, batch, noise)
    sparse = gradients(ours.nats.sum())
    attn_mask = document_mask(documents)
    if isinstance(objective, NextToken):
        logits = model(ids, attn_mask=attn_mask & block_causal_mask(10, 1))[:, :-1]
        scored = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
        nats = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") * scored
        dense = nats.sum()
    else:
        noised = mask_tokens(batch, 3, objective.mask_schedule, noise, objective)
        logits = model(noised.input_ids, attn_mask=attn_mask).index_fill(-1, torch.tensor([3]), -math.inf)
        nats = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
        dense = (noised.weight * torch.where(noised.scored, nats, 0.0)).sum()
    torch.testing.assert_close(ours.nats.sum(), dense)
    for a, b in zip(sparse, gradients(dense), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", [NextToken(), DIFFUSION])
def test_losses_of_rows_do_not_depend_on_batch_or_padding(objective, tiny_model):
    """A row's nats are the same alone and in a batch, short and padded: sums over rows then mean the same
    everywhere."""
    model, ids = tiny_model(), torch.randint(4, 24, (3, 8))
    documents = torch.zeros_like(ids)
    whole = objective(model, batch_of(ids, documents), StepNoise(0, 0, 3))
    for row in range(3):
        alone = objective(model, batch_of(ids[row : row + 1], documents[:1]), StepNoise(0, 0, 3, first_row=row))
        torch.testing.assert_close(alone.nats[0], whole.nats[row])
    if isinstance(objective, NextToken):
        padded, owners = F.pad(ids, (0, 4)), F.pad(documents, (0, 4), value=-1)
        longer = objective(model, batch_of(padded, owners, owners >= 0), StepNoise(0, 0, 3))
        torch.testing.assert_close(longer.nats, whole.nats)
        assert torch.equal(longer.count, whole.count)


def test_variable_length_cuts_whole_steps_and_counts_only_what_is_left(tiny_model):
    batch, objective = batch_of(torch.randint(4, 24, (4, 16))), replace(DIFFUSION, variable_length_prob=0.5)
    lengths = [int(objective(tiny_model(), batch, StepNoise(0, step, 4)).count[0]) for step in range(60)]
    cut = [n for n in lengths if n < 16]
    assert 15 < len(cut) < 45 and min(cut) <= 4 and max(cut) >= 12


@torch.no_grad()
def test_the_variance_of_the_schedules_is_as_derived(tiny_model):
    """With equal cost c for every token: fixed_count has none; iid_t has c^2 / n (ln(1/eps) - 1) per sequence."""
    model, n = uniform(tiny_model()), 64
    batch, rows = batch_of(torch.randint(4, 24, (2000, n))), 2000
    per_token = {
        name: replace(DIFFUSION, mask_schedule=name)(model, batch, StepNoise(0, 0, rows)).nats / n
        for name in ("iid_t", "fixed_count")
    }
    assert per_token["fixed_count"].std() < 1e-5
    predicted = math.log(23) * math.sqrt((math.log(1 / 1e-3) - 1) / n)
    assert per_token["iid_t"].std().item() == pytest.approx(predicted, rel=0.35)  # heavy-tailed, and empty rows differ


def test_run_lengths_and_unlikelihood_are_what_they_say():
    assert run_lengths(torch.tensor([[5, 5, 5, 7, 7, 5]])).tolist() == [[1, 2, 3, 1, 2, 1]]
    logits = torch.randn(4, 9)
    unwanted = torch.tensor([0, 3, 8, 8])
    expected = -torch.log(1 - logits.softmax(-1)[torch.arange(4), unwanted])
    torch.testing.assert_close(unlikelihood(logits, unwanted), expected)


def test_the_repetition_penalty_waits_warms_up_and_acts_on_wrong_repetitions_only(tiny_model):
    objective = replace(
        DIFFUSION, repeat_penalty_weight=0.4, repeat_penalty_delay_steps=10, repeat_penalty_warmup_steps=20
    )
    assert [objective.penalty_weight_at(s) for s in (0, 10, 20, 30, 99)] == [0.0, 0.0, pytest.approx(0.2), 0.4, 0.4]
    assert replace(objective, repeat_penalty_warmup_steps=0).penalty_weight_at(10) == 0.4
    logits = torch.full((5, 24), -4.0)
    logits[:, 7] = 4.0
    text = torch.tensor([[9, 7, 9, 9, 7]])
    penalty = repetition_penalty(logits, torch.full_like(text, 3), text, torch.arange(5), min_run=2)
    # Two 7s stand before positions 2, 3 and 4; at 4 the text itself goes on with 7.
    assert (penalty > 0).tolist() == [False, False, True, True, False]


def test_validation_is_the_same_full_range_bound_whatever_the_training_schedule():
    a = MaskedDiffusion(mask_schedule="random", variable_length_prob=0.3, repeat_penalty_weight=1.0).for_validation()
    b = MaskedDiffusion(mask_schedule="iid_t", mask_rate_min=0.3, mask_rate_max=0.8, block_size=0).for_validation()
    assert a == b == MaskedDiffusion(mask_schedule="fixed_count", variable_length_prob=0.0, block_size=0)


class Waits(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: numbers read from tensors, and shapes that depend on them."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        boolean = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if name in self.REFUSED or boolean:
            raise AssertionError(f"{name} waits for the device")
        return function(*args, **(kwargs or {}))


OBJECTIVES = {
    "next token": NextToken(),
    "full": DIFFUSION,
    "complementary, CAP, penalty, noise": replace(
        DIFFUSION, complementary_masks=True, cap_weight=1.0, repeat_penalty_weight=0.5, mask_embedding_noise=1.0
    ),
    "edits": replace(DIFFUSION, edit_weight=0.5, cap_weight=1.0),
    "edits of drafts, joint": replace(
        DIFFUSION, edit_weight=0.5, edit_source="self", edit_rounds=2, block_size=4, next_token_weight=0.5
    ),
    "blocks": replace(DIFFUSION, block_size=4, mask_schedule="iid_t", sequence_mean=True),
    "preferences": ExactDPO(reference=Transformer(TINY), dpo_sft_weight=0.1),
    "preferences by a bound": DiffusionDPO(reference=Transformer(replace(TINY, attention="full")), dpo_num_masks=2),
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_loss_and_its_gradient_never_wait_for_the_device(kind, tiny_model):
    model, documents = tiny_model().train(), torch.arange(12).expand(4, -1) // 5
    objective = OBJECTIVES[kind]
    prepared = objective.prepare(batch_of(torch.randint(4, 24, (4, 12)), documents), model.config, StepNoise(0, 1, 4))
    with Waits():
        objective.loss(model, prepared).nats.sum().backward()


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_preparing_needs_no_weights_and_the_loss_nothing_random(kind, tiny_model):
    model, documents = tiny_model(), torch.arange(12).expand(4, -1) // 5
    objective, batch = OBJECTIVES[kind], batch_of(torch.randint(4, 24, (4, 12)), documents)
    prepared = objective.prepare(batch, model.config, StepNoise(0, 1, 4))
    torch.manual_seed(1)
    first = objective.loss(model, prepared).nats
    torch.manual_seed(2)
    assert torch.equal(first, objective.loss(model, prepared).nats)
    assert torch.equal(first, objective(model, batch, StepNoise(0, 1, 4)).nats)
