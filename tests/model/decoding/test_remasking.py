import random
from fractions import Fraction
from math import ceil

import pytest
import torch

from model.decoding.denoiser import DenoisingConfig
from model.decoding.remasking import POLICIES, Step, choose, transfer_schedule


def step_of(rows, quota=1, budget=100, threshold=0.9, factor=1.0, held=None, logits=None, bound=0.1):
    """A Step from lists of confidences, one per row, of any lengths."""
    width, numbers = max(map(len, rows)), torch.tensor([len(row) for row in rows])
    masked = torch.arange(width) < numbers[:, None]
    held_back = torch.zeros_like(masked)
    for row, column in held or ():
        held_back[row, column] = True
    return Step(
        confidence=torch.tensor([row + [0.0] * (width - len(row)) for row in rows]),
        masked=masked,
        held_back=held_back,
        quota=torch.full((len(rows),), quota),
        budget=torch.full((len(rows),), budget),
        threshold=threshold,
        factor=factor,
        entropy_bound=bound,
        logits=torch.zeros(int(numbers.sum()), 5) if logits is None else logits,
        noise=lambda: torch.rand(int(numbers.sum())),
    )


def kept(policy, step):
    return [set(row.nonzero()[:, 0].tolist()) for row in choose(policy, step)]


def some_rows(draw, digits=2):
    return [[round(draw.random() ** 0.3, digits) for _ in range(draw.randint(1, 9))] for _ in range(4)]


@pytest.mark.parametrize("n", range(0, 12))
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 20])
def test_the_transfer_schedule_spreads_all_tokens_evenly(n, steps):
    schedule = transfer_schedule(n, steps)
    assert sum(schedule) == n and schedule == sorted(schedule, reverse=True)
    assert not schedule or max(schedule) - min(schedule) <= 1 and min(schedule) >= 1
    assert len(schedule) == min(n, steps)


@pytest.mark.parametrize(
    "policy", ["low_confidence", "margin", "entropy", "left_to_right", "threshold", "factor", "hybrid"]
)
def test_ties_are_kept_from_the_left(policy):
    bound = 0.6 if policy == "hybrid" else 0.5
    step = step_of([[0.5] * 500, [0.5] * 2], quota=2, budget=2, threshold=bound, factor=2.0)
    assert kept(policy, step) == [{0, 1}, {0, 1}]


@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - {"entropy_bound"}))  # which has a test of its own
@pytest.mark.parametrize("number", [1, 2, 3])
def test_padding_is_never_kept_and_what_is_held_back_comes_last(policy, number):
    draw = random.Random(number)
    for _ in range(50):
        rows = some_rows(draw)
        held = [(r, c) for r, row in enumerate(rows) for c in range(len(row)) if draw.random() < 0.4]
        bound = 2.0 if policy == "hybrid" else 0.01  # all by the schedule, or all by the budget
        step = step_of(rows, number, number, bound, 100.0, held, torch.randn(sum(map(len, rows)), 5))
        for r, (row, choice) in enumerate(zip(rows, kept(policy, step), strict=True)):
            assert len(choice) == min(number, len(row)) and choice <= set(range(len(row)))
            free = set(range(len(row))) - {c for i, c in held if i == r}
            assert choice <= free or free <= choice


def kept_by_definition(policy, row, number, bound, f):
    """The policies of confidence, from the definitions; `number` is both quota and budget."""
    best = sorted(range(len(row)), key=lambda i: (-row[i], i))
    confident = [i for i in best if row[i] >= bound]
    if policy == "low_confidence":
        return set(best[:number])
    if policy == "threshold":  # what reaches it within the budget, and always something
        return set((confident or best[:1])[:number])
    if (
        policy == "hybrid"
    ):  # LLaDA 2.0: A = {i: confidence >= bound}; A if |A| >= quota, else the quota's best; no budget
        return set(confident if len(confident) >= number else best[:number])
    # factor: the largest n whose n-th best is confident enough, over every n
    n = max([n for n in range(1, len(row) + 1) if row[best[n - 1]] >= 1 - f / (n + 1)], default=1)
    return set(best[: min(n, number)])


@pytest.mark.parametrize("number", [1, 2, 3, 5, 20, 100])
@pytest.mark.parametrize("bound, f", [(0.3, 1e-6), (0.8, 0.5), (0.97, 1.0), (1.0, 2.5)])
@pytest.mark.parametrize("policy", ["low_confidence", "threshold", "hybrid", "factor"])
def test_policies_of_confidence_keep_what_their_definitions_say(policy, bound, f, number):
    for seed in range(20):
        rows = some_rows(random.Random(seed), digits=4 if policy == "factor" else 2)
        other = {"quota": 3} if policy in ("threshold", "factor") else {"budget": 1}  # the one without effect
        step = step_of(rows, **{"quota": number, "budget": number, "threshold": bound, "factor": f} | other)
        assert kept(policy, step) == [kept_by_definition(policy, row, number, bound, f) for row in rows]


def test_margin_and_entropy_look_at_the_whole_distribution():
    """Three distributions whose most confident, clearest and least spread are three different ones."""
    p = torch.tensor(
        [
            [0.52, 0.47, 0.01, 0.00, 0.00],  # least entropy
            [0.50, 0.125, 0.125, 0.125, 0.125],  # largest margin
            [0.53, 0.44, 0.01, 0.01, 0.01],  # most confident
        ]
    )
    step = step_of([[0.52, 0.50, 0.53]], logits=p.clamp(min=1e-9).log())
    assert [kept(name, step) for name in ("entropy", "margin", "low_confidence")] == [[{0}], [{1}], [{2}]]


@pytest.mark.parametrize("bound", [0.0, 0.1, 1.0, 2.5, 100.0])
def test_the_entropy_bound_keeps_the_surest_while_the_entropies_before_add_up_to_no_more(bound):
    """By brute force, of all numbers of tokens the largest that is allowed; an EOS held back comes after all others."""
    draw, sizes = random.Random(1), set()
    for _ in range(60):
        rows = some_rows(draw)
        held = [(r, c) for r, row in enumerate(rows) for c in range(len(row)) if draw.random() < 0.2]
        logits = torch.randn(sum(map(len, rows)), 5) * draw.choice([1, 3, 9])
        p = logits.softmax(dim=-1)
        spread, first = (-(p * p.log()).sum(dim=-1)).tolist(), 0
        for r, choice in enumerate(kept("entropy_bound", step_of(rows, held=held, logits=logits, bound=bound))):
            own = spread[first : first + len(rows[r])]
            order = sorted(range(len(own)), key=lambda c: (((r, c) in held), 0 if (r, c) in held else own[c], c))
            most = max(n for n in range(1, len(own) + 1) if n == 1 or sum(own[c] for c in order[: n - 1]) <= bound)
            assert choice == set(order[:most])
            sizes.add(len(choice) / len(own))
            first += len(own)
    assert len(sizes) > 5 or bound in (0.0, 100.0)


def test_random_order_is_uniform():
    """Chi-squared of which two of four positions are kept, six pairs."""
    counts, draws = {}, 6000
    for choice in kept("random", step_of([[0.9, 0.1, 0.2, 0.3]] * draws, quota=2)):
        counts[tuple(sorted(choice))] = counts.get(tuple(sorted(choice)), 0) + 1
    assert len(counts) == 6 and sum((n - 1000) ** 2 / 1000 for n in counts.values()) < 20.5  # 5 degrees, 0.1 %


@pytest.mark.parametrize("most", [3, 32])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 64])
@pytest.mark.parametrize("start, end", [("0.08", "0.5"), ("1", "0.25"), ("0.3", "0.3")])
def test_the_budget_is_a_share_of_the_masked_that_goes_linearly_from_start_to_end(start, end, num_steps, most):
    """In exact fractions, where 25 x 0.08 is 2; behind the last step the share stays."""
    config = DenoisingConfig(
        gen_cap_start_ratio=float(start), gen_cap_end_ratio=float(end), gen_max_decode_per_step=most
    )
    for step in range(num_steps + 5):
        for masked in range(1, 80):
            share = Fraction(start)
            if step >= num_steps - 1 and step > 0:
                share = Fraction(end)
            elif num_steps > 1:
                share += (Fraction(end) - Fraction(start)) * Fraction(step, num_steps - 1)
            assert config.budget(masked, step, num_steps) == min(ceil(masked * share), most)
