"""Preference losses: what they are at the reference, which way they move, and how noisy their estimates are."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from model import preference
from model.block_diffusion import Blocks
from model.forward_process import StepNoise, k_of_n_by_block
from model.likelihood import row_nats
from model.objective import NextToken
from model.preference import DiffusionDPO, ExactDPO, bound, prepare_mask
from tests.conftest import TINY
from tests.model.bounds import enumerated_bound

KINDS = {
    "causal": (ExactDPO, {"attention": "causal"}),
    "full": (DiffusionDPO, {"attention": "full"}),
    "blocks of 4": (DiffusionDPO, {"attention": "block", "block_size": 4}),
}
MASK, WIDTH = 3, 16


def pairs(replies, prompt=3, width=WIDTH, causal=False, block_size=0):
    """A batch of pairs from [(chosen, rejected)] lengths: random tokens, the end of the last block [MASK]."""
    rows = []
    for number, lengths in enumerate(replies):
        generator = torch.Generator().manual_seed(number)
        asked = torch.randint(4, 24, (prompt,), generator=generator)
        rows.append([torch.cat([asked, torch.randint(4, 24, (n,), generator=generator)]) for n in lengths])
    rows = [side[place] for place in (0, 1) for side in rows]
    ends = torch.tensor([len(row) for row in rows])
    canvas = (ends + (-ends % block_size if block_size else 0)).clamp(max=width)
    place = torch.arange(width)
    ids = torch.stack([F.pad(row, (0, width - len(row))) for row in rows])
    ids = torch.where((place >= ends[:, None]) & (place < canvas[:, None]), MASK, ids)
    batch = {"input_ids": ids, "loss_mask": (place >= prompt) & (place < ends[:, None])}
    return batch if causal else batch | {"document_ids": (place < canvas[:, None]).long() - 1}


def some(batch, chosen, width=WIDTH):
    """Only the pairs `chosen`, cut to `width`."""
    number = len(batch["input_ids"]) // 2
    rows = torch.tensor([*chosen, *(number + i for i in chosen)])
    return {name: tensor[rows, :width] for name, tensor in batch.items()}


@pytest.fixture(params=KINDS)
def kind(request, tiny_model):
    """(objective with its reference, a policy somewhat off it, batch of four pairs)."""
    made, changes = KINDS[request.param]
    reference = tiny_model(**changes)
    batch = pairs(
        [(5, 8), (9, 2), (1, 13), (7, 7)],
        causal=made is ExactDPO,
        block_size=reference.config.block_size,
    )
    return made(reference=reference), perturbed(reference), batch


def perturbed(model, size=0.05):
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + size * torch.randn(parameter.shape, generator=generator))
    return model


def test_a_policy_that_is_its_reference_loses_ln_2(kind):
    objective, policy, batch = kind
    loss = objective(copy.deepcopy(objective.reference), batch, StepNoise(0, 0, 4, width=WIDTH))
    assert torch.equal(loss.nats, -F.logsigmoid(torch.zeros(4))) and math.log(2) == pytest.approx(
        float(loss.nats[0].detach())
    )
    assert [float(loss.averages[name][0]) for name in ("margin", "accuracy")] == [0.0, 2.0]
    moved = objective(policy, batch, StepNoise(0, 0, 4, width=WIDTH))
    assert not torch.isclose(moved.nats, loss.nats).any(), "nor would another policy"


def test_a_step_down_the_gradient_prefers_the_chosen_replies_and_leaves_the_reference_alone(kind):
    objective, _, batch = kind
    policy, noise = copy.deepcopy(objective.reference), StepNoise(0, 0, 4, width=WIDTH)
    before = copy.deepcopy(objective.reference.state_dict())
    objective(policy, batch, noise).nats.sum().backward()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter -= 1e-4 * parameter.grad
    loss = objective(policy, batch, noise)
    gained = {name: float(total) for name, (total, _) in loss.averages.items()}
    assert float(loss.nats.mean().detach()) < math.log(2) and gained["margin"] > 0
    assert gained["chosen_gain"] > gained["rejected_gain"]
    assert all(p.grad is None for p in objective.reference.parameters())
    assert all(torch.equal(before[name], value) for name, value in objective.reference.state_dict().items())


@pytest.mark.parametrize("side, sign", [("chosen", -1), ("rejected", 1)])
def test_what_raises_the_chosen_replys_likelihood_lowers_the_loss(side, sign, kind):
    """And the rejected one's raises it: the gradient of the loss against that of a reply's own likelihood."""
    objective, policy, batch = kind
    half = slice(0, 4) if side == "chosen" else slice(4, 8)
    nats = torch.full((8,), 20.0, requires_grad=True)
    objective.compare(nats, torch.full((8,), 21.0), batch).nats.sum().backward()
    assert (nats.grad[half].sign() == -sign).all()


def test_the_loss_is_equation_7_of_the_exact_likelihoods(tiny_model):
    policy, reference = tiny_model(), perturbed(tiny_model())
    batch = pairs([(5, 8), (9, 2)], causal=True)
    with torch.no_grad():
        loss = ExactDPO(dpo_beta=0.3, reference=reference)(policy, batch, StepNoise(0, 0, 2))
    likelihood, other = (-row_nats(model, batch, 1).nats for model in (policy, reference))
    for pair in range(2):
        margin = 0.3 * ((likelihood - other)[pair] - (likelihood - other)[2 + pair])
        assert float(loss.nats[pair]) == pytest.approx(-math.log(1 / (1 + math.exp(-margin))), rel=1e-4)


def test_a_pair_of_equal_replies_has_no_margin(tiny_model):
    """Exactly where nothing is drawn: autoregressively, and in blocks of one token."""
    for made, changes in ((ExactDPO, {}), (DiffusionDPO, {"attention": "block", "block_size": 1})):
        reference = tiny_model(**changes)
        batch = pairs([(6, 6)], causal=made is ExactDPO)
        batch["input_ids"][1] = batch["input_ids"][0]
        loss = made(reference=reference)(perturbed(reference), batch, StepNoise(0, 0, 1, width=WIDTH))
        assert float(loss.averages["margin"][0]) == pytest.approx(0, abs=1e-5)


def test_a_pair_costs_the_same_in_any_batch_and_with_any_padding(kind):
    objective, policy, batch = kind
    with torch.no_grad():
        whole = objective(policy, batch, StepNoise(3, 1, 4, width=WIDTH))
        for pair, width in enumerate((12, 12, 16, 12)):
            alone = objective(policy, some(batch, [pair], width), StepNoise(3, 1, 4, pair, width=WIDTH))
            torch.testing.assert_close(alone.nats, whole.nats[pair : pair + 1], rtol=1e-4, atol=1e-5)


def test_the_fine_tuning_term_is_the_chosen_replys_own_cost_per_token(tiny_model):
    policy, reference, batch = tiny_model(), perturbed(tiny_model()), pairs([(5, 8), (9, 2)], causal=True)
    plain, more = (ExactDPO(dpo_sft_weight=w, reference=reference) for w in (0.0, 0.05))
    added = more(policy, batch, StepNoise(0, 0, 2)).nats - plain(policy, batch, StepNoise(0, 0, 2)).nats
    own = NextToken(sequence_mean=True)(policy, some(batch, [0, 1]), StepNoise(0, 0, 4)).nats[:2]
    torch.testing.assert_close(added, 0.05 * own, rtol=1e-4, atol=1e-5)
    assert more.for_validation() == plain


def test_computing_activations_twice_leaves_the_gradient_as_it_is(tiny_model, monkeypatch):
    reference, batch = tiny_model(attention="block", block_size=4, dropout=0.2), pairs([(5, 8)], block_size=4)
    gradients = []
    for direct in (False, True):
        policy = perturbed(reference).train()
        torch.manual_seed(7)
        if direct:
            monkeypatch.setattr(preference, "checkpoint", lambda call, *given, use_reentrant: call(*given))
        DiffusionDPO(reference=reference)(policy, batch, StepNoise(0, 0, 1)).nats.sum().backward()
        gradients.append([p.grad for p in policy.parameters()])
    assert all(torch.equal(*both) for both in zip(*gradients, strict=True))


# -- the bound -----------------------------------------------------------------------------------------------------


def estimates(objective, model, batch, copies, step=0):
    """(copies, 2) nats of the replies of one pair, each copy with masks of its own."""
    batch = some(batch, [0] * copies)
    noise, total = StepNoise(0, step, copies, width=WIDTH), 0
    with torch.no_grad():
        for sample in range(objective.dpo_num_masks):
            total = total + bound(
                model, batch, prepare_mask(batch["input_ids"], objective.corrupt(batch, MASK, noise, sample))
            )
    return (total / objective.dpo_num_masks).view(2, copies).T


@pytest.mark.parametrize("changes", [{"attention": "full"}, {"attention": "block", "block_size": 2}])
@pytest.mark.parametrize("num_masks", [1, 3])
def test_the_mean_of_the_estimates_is_the_bound_by_enumeration(changes, num_masks, tiny_model):
    """A prompt of three tokens, so that it ends within a block, as one of the replies does; and no bound is above 0."""
    model = tiny_model(**changes)
    batch = pairs([(4, 5)], block_size=model.config.block_size)
    with torch.no_grad():
        if model.config.attention == "full":
            ends = batch["document_ids"].eq(0).sum(dim=1).tolist()
            rows = zip(batch["input_ids"], ends, strict=True)
            exact = torch.tensor([enumerated_bound(model, row[:end], 3) for row, end in rows])
        else:
            exact = row_nats(model, batch, 1).nats.float()
    found = estimates(DiffusionDPO(dpo_num_masks=num_masks, reference=model), model, batch, 400)
    error = found.std(dim=0) / 400**0.5
    assert ((found.mean(dim=0) - exact).abs() < 4.5 * error).all() and (error < 0.07 * exact).all()
    assert (found >= 0).all()


def test_the_masks_of_a_block_take_every_count_once_and_never_the_prompt():
    """As many masks as a block has maskable tokens; the first block holds one of the prompt's, the last is short."""
    maskable = (torch.arange(11) >= 1).expand(5, 11)
    strata = torch.rand(5, 1)
    for size, expected in ((4, [3, 4, 3]), (0, [10])):
        for block, total in enumerate(expected):
            counts = []
            for sample in range(total):
                blocks = Blocks(maskable, None, size)
                share = strata + sample / total + blocks.golden_steps
                scored, weight = k_of_n_by_block(maskable, blocks, share, torch.rand(5, 11))
                weight = weight * scored
                own = weight[:, block * size : (block + 1) * size] if size else weight
                counts.append((own > 0).sum(dim=1))
                torch.testing.assert_close(own.sum(dim=1), torch.full((5,), float(total)))
                assert not scored[:, 0].any()
            assert torch.stack(counts).sort(dim=0).values.T.tolist() == [[*range(1, total + 1)]] * 5


def test_the_replies_of_a_pair_draw_their_masks_apart_and_a_mask_unlike_the_next(tiny_model):
    objective, batch = DiffusionDPO(reference=tiny_model(attention="full")), pairs([(12, 12)] * 6)
    first, second = (objective.corrupt(batch, MASK, StepNoise(0, 0, 6), sample).scored for sample in (0, 1))
    chosen, rejected = first.chunk(2)
    assert (chosen != rejected).any(dim=1).all() and (first != second).any(dim=1).all()


@pytest.fixture
def margins(tiny_model):
    """margins(**fields) -> (250,) margins of one pair, each with masks of its own; the policy is near its reference."""
    reference = tiny_model(attention="full")
    policy, batch = perturbed(reference, 0.02), some(pairs([(12, 9)]), [0] * 250)

    def draw(**more):
        objective = DiffusionDPO(dpo_beta=1.0, reference=reference, **more)
        with torch.no_grad():
            nats = objective(policy, batch, StepNoise(0, 0, 250, width=WIDTH)).nats
        return -torch.expm1(nats.double()).log()  # the inverse of -log sigmoid

    return draw


def test_shared_masks_cut_the_variance_of_the_margin_tenfold_or_more(margins):
    assert 10 * margins(dpo_num_masks=1).var() < margins(dpo_num_masks=1, shared_masks=False).var()


def test_eight_masks_have_an_eighth_of_the_variance_of_one_or_less(margins):
    one, eight = margins(dpo_num_masks=1), margins(dpo_num_masks=8)
    assert eight.var() < 1.25 * one.var() / 8
    assert float(eight.mean()) == pytest.approx(float(one.mean()), abs=4.5 * float(one.std()) / 250**0.5)


class LikelierWithContext:
    """Stands for a model whose every token is 5, and costs the more the more of its row is masked."""

    config = TINY
    lm_head = torch.nn.Linear(24, 24, bias=False)
    torch.nn.init.eye_(lm_head.weight)

    def __call__(self, ids, attn_mask, select, head):
        masked = (ids == MASK).sum(dim=1)[select // ids.shape[1]]
        return F.one_hot(torch.full_like(select, 5), 24) * (8.0 - masked[:, None])


def test_masks_of_many_counts_tell_more_than_as_many_of_one_count(tiny_model):
    """VRPO's allocation, n_t = n and n_y = 1, against n_y = n: where only the count matters, the latter gains nothing
    over a single mask, and the former more than a fourth."""
    batch = pairs([(12, 9)])
    batch["input_ids"].fill_(5)
    reference = tiny_model(attention="full")
    one, four = (
        estimates(DiffusionDPO(dpo_num_masks=n, reference=reference), LikelierWithContext(), batch, 400).var(dim=0)
        for n in (1, 4)
    )
    assert (4 * four < 0.5 * one).all()


def test_validation_draws_as_many_masks_in_every_run():
    runs = [DiffusionDPO(dpo_num_masks=n, dpo_sft_weight=w).for_validation() for n, w in ((1, 0.0), (5, 0.1))]
    assert runs[0] == runs[1] and runs[0].dpo_num_masks > 1 and not runs[0].dpo_sft_weight
