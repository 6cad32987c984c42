"""Which token a denoising step writes, and where: order, end of text, cap, guidance."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from model.decoding.canvas import Canvas
from model.decoding.decode import decode
from model.decoding.denoiser import Denoiser, DenoisingConfig
from model.decoding.remasking import POLICIES
from tests.model.decoding.canvases import (
    EOS,
    GREEDY,
    HOT,
    MASK,
    PROMPTS,
    continuing,
    infilling,
    scripted_config,
    spied,
)

# -- which token, in which order ---------------------------------------------------------------------------------------


class Conditionals:
    """A network that is right: the exact conditionals of a joint of three tokens, each 4 or 5."""

    config = scripted_config()

    def __init__(self, joint):
        self.joint = joint
        self.values = torch.tensor([[4 + (i >> k & 1) for k in range(3)] for i in range(8)])

    def __call__(self, ids, select, **unused):
        visible = ids[:, 1:, None] == self.values.T  # (B, 3, 8)
        weight = ((visible | (ids[:, 1:, None] == MASK)).all(dim=1) * self.joint)[:, None, :, None]
        one_hot = torch.nn.functional.one_hot(self.values.T, 6).double()  # (3, 8, 6)
        p = torch.zeros(len(ids), 4, 6, dtype=torch.double)
        p[:, 1:] = (weight * one_hot).sum(dim=2) / weight.sum(dim=2)
        return p.log().flatten(0, 1)[select]


@pytest.mark.parametrize("policy", ["random", "left_to_right", "margin", "entropy", "low_confidence"])
def test_one_by_one_sampling_reproduces_the_joint_unless_the_order_depends_on_what_is_drawn(policy):
    """Chi-squared of 4,000 samples. Keeping the most confident draw prefers likely tokens: it is another distribution
    though every conditional is exact. Orders that look at the distributions alone are not biased."""
    joint, draws = torch.tensor([0.30, 0.02, 0.08, 0.15, 0.05, 0.20, 0.02, 0.18], dtype=torch.double), 4000
    model = Conditionals(joint)
    config = DenoisingConfig(gen_temp=1.0, gen_top_k=0, gen_repeat_penalty=0.0, gen_remasking=policy)
    decoded = decode(model, Canvas.continuing([[1]] * draws, 3, model.config), config, range(draws))
    counts = Counter(tuple(new) for new in decoded.new)
    expected = {tuple(v): draws * p for v, p in zip(model.values.tolist(), joint.tolist(), strict=True)}
    assert set(counts) <= set(expected) and decoded.num_forward_passes == 3
    chi_squared = sum((counts[v] - n) ** 2 / n for v, n in expected.items())
    assert chi_squared > 100 if policy == "low_confidence" else chi_squared < 24.3  # 7 degrees of freedom, 0.1 %


def candidates_by_row(denoiser, candidates):
    """{row: [(column, token, confidence, kept)]}, from left to right."""
    groups = {row: [] for row in denoiser.state.active_rows}
    for row, *values in zip(*(getattr(candidates, n).tolist() for n in FIELDS), strict=True):
        groups[row].append(tuple(values))
    return groups


FIELDS = ("rows", "columns", "tokens", "confidence", "kept")


@pytest.mark.parametrize("eos", ["free", "confidence", "never"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_end_of_the_text_is_free_last_or_never(policy, eos, ending_model):
    """confidence: an EOS is kept only once, or together with, every other candidate of the block."""
    model, early = ending_model(3.0, attention="full"), 0
    config = replace(
        HOT,
        gen_remasking=policy,
        gen_eos=eos,
        gen_block_size=4,
        gen_steps=6,
        gen_confidence_threshold=0.3,
        gen_entropy_bound=3.0,
    )
    denoiser = Denoiser(model, continuing(model, PROMPTS * 3), config, range(15))
    while not denoiser.finished:
        candidates = denoiser.predict()
        for group in candidates_by_row(denoiser, candidates).values():
            ends = any(token == EOS and kept for _, token, _, kept in group)
            others = [(confidence, kept) for _, token, confidence, kept in group if token != EOS]
            early += ends and not all(kept for _, kept in others)
            if eos == "confidence" and policy == "threshold":
                confident = sum(confidence >= 0.3 for confidence, _ in others)
                assert sum(kept for *_, kept in group) == max(1, confident)
        denoiser.write(candidates)
    ended = denoiser.finish().ended
    assert any(ended) == (eos != "never")
    assert (early > 0) == (eos == "free")


@pytest.mark.parametrize("remasking", ["threshold", "factor"])
@pytest.mark.parametrize("steps, block", [(3, 0), (6, 4), (40, 5)])
@pytest.mark.parametrize("cap", [(0.08, 0.5, 32), (0.5, 1.0, 2), (1.0, 1.0, 32)])
def test_threshold_and_factor_keep_the_most_confident_within_the_cap(cap, steps, block, remasking, ending_model):
    """Against a plain reading: the share of a block's masked tokens grows over its share of the steps."""
    model, bound, f = ending_model(1.0, attention="full"), 0.35, 1.6
    config = replace(
        HOT,
        gen_remasking=remasking,
        gen_steps=steps,
        gen_block_size=block,
        gen_confidence_threshold=bound,
        gen_factor=f,
        gen_cap_start_ratio=cap[0],
        gen_cap_end_ratio=cap[1],
        gen_max_decode_per_step=cap[2],
    )
    canvas, new = continuing(model, num_new=12), 12
    denoiser = Denoiser(model, canvas, config, range(5))
    size, before, step = block or new, {}, {}
    while not denoiser.finished:
        candidates = denoiser.predict()
        for row, group in candidates_by_row(denoiser, candidates).items():
            b = (group[0][0] - len(PROMPTS[row])) // size
            step[row] = step[row] + 1 if before.get(row) == b else 0
            before[row] = b
            first, last = b * size, min((b + 1) * size, new)
            share = min(max(1, steps * last // new - steps * first // new), last - first)
            ratio = cap[0] + (cap[1] - cap[0]) * min(1, step[row] / max(1, share - 1))
            most = min(math.ceil(len(group) * ratio - 1e-9), cap[2])
            best = sorted(group, key=lambda c: (-c[2], c[0]))
            passing = [n for n, (_, _, p, _) in enumerate(best, 1) if p >= 1 - f / (n + 1)]
            number = sum(p >= bound for _, _, p, _ in best) if remasking == "threshold" else max(passing, default=0)
            assert [kept for *_, kept in best] == [n < max(1, min(number, most)) for n in range(len(best))]
        assert denoiser.write(candidates).written.any()


# -- stutter -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_token_to_the_left_is_made_less_likely_unless_it_is_an_end(ending_model):
    """Given or written, as long as it is known."""
    model, strength, compared = ending_model(2.0, attention="full"), 1.5, Counter()
    canvas = Canvas.infilling(
        [[1, None, None, 8, None, 2, None, 9], [None, 5, None, None, 7, None, None, 8]], model.config
    )
    canvas = replace(canvas, may_end=True)
    config = replace(GREEDY, gen_penalty_lambda=strength, gen_steps=5)
    denoiser = Denoiser(model, canvas, config, range(2))
    while not denoiser.finished:
        candidates, ids = denoiser.predict(), denoiser.state.ids
        for row, column, token, p, _ in zip(*(getattr(candidates, n).tolist() for n in FIELDS), strict=True):
            logits = model(ids[row][None])[0, column].clone()
            left = MASK if column == 0 else int(ids[row, column - 1])
            if left not in (MASK, EOS):
                logits[left] -= strength
            logits[MASK] = -math.inf
            compared[left if left in (MASK, EOS) else "token"] += 1
            assert token == int(logits.argmax()) and p == pytest.approx(logits.softmax(0)[token].item(), abs=1e-5)
        denoiser.write(candidates)
    assert min(compared[kind] for kind in (MASK, EOS, "token")) > 0


# -- guidance ----------------------------------------------------------------------------------------------------------


def test_without_guidance_there_is_no_second_pass(ending_model, monkeypatch):
    model = ending_model(0.0, attention="full")
    calls = spied(model, monkeypatch)
    plain = decode(model, continuing(model), replace(GREEDY, gen_steps=4), range(5))
    assert plain.num_forward_passes == len(calls) == 4
    with_guidance = decode(model, continuing(model), replace(GREEDY, gen_steps=4, gen_cfg_scale=1e-9), range(5))
    assert with_guidance.new == plain.new and with_guidance.row_passes == [2 * n for n in plain.row_passes]


@pytest.mark.parametrize("filling", [continuing, infilling])
@torch.no_grad()
def test_guidance_masks_the_given_tokens_and_these_alone_in_its_second_branch(filling, tiny_model, monkeypatch):
    model, scale = tiny_model(attention="full"), 1.5
    canvas = filling(model)
    denoiser = Denoiser(model, canvas, replace(GREEDY, gen_cfg_scale=scale, gen_steps=4), range(len(canvas.ids)))
    calls = spied(model, monkeypatch)
    for _ in range(2):
        candidates = denoiser.predict()
        rows, written = list(denoiser.state.active_rows), denoiser.state.written
        first, second = calls[-2:]
        for i, row in enumerate(rows):
            for column in range(first.shape[1]):
                given = column < canvas.lengths[row] and not canvas.open[row, column]
                assert second[i, column] == (MASK if given else first[i, column])
                if written[row, column]:
                    assert second[i, column] != MASK
        for row, column, token, p in zip(*(getattr(candidates, n).tolist() for n in FIELDS[:4]), strict=True):
            length = int(canvas.lengths[row])
            with_prompt, without = (ids[rows.index(row)][None, :length] for ids in (first, second))
            logits = (1 + scale) * model(with_prompt)[0, column] - scale * model(without)[0, column]
            logits[MASK] = -math.inf
            if filling is infilling:
                logits[EOS] = -math.inf
            assert token == int(logits.argmax()) and p == pytest.approx(logits.softmax(0)[token].item(), abs=1e-5)
        denoiser.write(candidates)


# -- one step at a time ------------------------------------------------------------------------------------------------


def test_a_denoiser_can_be_driven_by_hand(tiny_model):
    """Another choice than the policy's: the schedule goes on, and takes what is left in a block's last step."""
    model = tiny_model(attention="full")
    config = replace(HOT, gen_steps=3)
    by_itself = decode(model, continuing(model), config, range(5))
    denoiser = Denoiser(model, continuing(model), config, range(5))
    while not denoiser.finished:
        with pytest.raises(ValueError, match="5 rows are unfinished"):
            denoiser.finish()
        denoiser.write(denoiser.predict())
    assert denoiser.finish().new == by_itself.new

    denoiser = Denoiser(model, continuing(model), config, range(5))
    first = denoiser.predict()
    leftmost = torch.cat([torch.tensor([True]), first.rows[1:] != first.rows[:-1]])
    step = denoiser.write(replace(first, kept=leftmost, tokens=torch.full_like(first.tokens, 17)))
    assert (step.ids[step.written] == 17).all() and step.written.sum() == 5
    numbers = []
    while not denoiser.finished:
        numbers.append(denoiser.write(denoiser.predict()).written.sum(dim=1).tolist())
    assert numbers == [[3] * 5, [4] * 5]
    assert all(new[0] == 17 and MASK not in new for new in denoiser.finish().new)
