"""What is written gives way to what is likelier: which tokens, when a block is done, where the text ends."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from model.decoding.canvas import Canvas
from model.decoding.decode import decode
from model.decoding.denoiser import Denoiser, DenoisingConfig
from tests.model.decoding.canvases import (
    EOS,
    GREEDY,
    HOT,
    MASK,
    PAD,
    PROMPTS,
    continuing,
    infilling,
    scripted_config,
    steps_of,
)
from tests.model.decoding.test_block_decoding import assert_same_steps

SIZE, NEW = 4, 11
EAGER = replace(
    GREEDY, gen_remasking="threshold", gen_confidence_threshold=0.06
)  # of a network that has learnt nothing
FREELY = replace(EAGER, gen_edit_threshold=0.0)
KINDS = {"full": {"attention": "full"}, **{a: {"attention": a, "block_size": SIZE} for a in ("block", "joint")}}


class Scripted:
    """A network that is sure of what a function of a row's ids wants at each position."""

    def __init__(self, wants, size=0, sure=0.95):
        self.wants, self.sure = wants, sure
        self.config = scripted_config(size)

    def __call__(self, ids, select, **unused):
        p = torch.full((*ids.shape, 30), (1 - self.sure) / 29)
        for row, one in enumerate(ids.tolist()):
            for column, token in enumerate(self.wants(one)[: len(one)]):
                p[row, column, token] = self.sure
        return p.log().flatten(0, 1)[select]


def run(model, canvas, config, plant=None):
    """Its result, its steps; `plant` changes the candidates of the first step."""
    config = replace(config, gen_cache="none")
    denoiser, steps = Denoiser(model, canvas, config, range(len(canvas.ids))), []
    while not denoiser.finished:
        candidates = denoiser.predict()
        steps.append(denoiser.write(candidates if steps or plant is None else plant(candidates)))
        assert len(steps) < 500
    return denoiser.finish(), steps


# -- the rule ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filling", [continuing, infilling])
@torch.no_grad()
def test_a_step_edits_what_is_written_in_its_block_where_another_token_is_surer_than_the_threshold(
    kind, filling, ending_model
):
    """Against a plain reading of every row alone. No given token and no mask is looked at for editing."""
    model, threshold, seen = ending_model(1.0, **KINDS[kind]), 0.07, Counter()
    canvas = continuing(model, num_new=NEW) if filling is continuing else infilling(model)
    config = replace(
        EAGER, gen_edit_threshold=threshold, gen_block_size=None if kind != "full" else 5, gen_cache="none"
    )
    denoiser = Denoiser(model, canvas, config, range(len(canvas.ids)))
    while not denoiser.finished:
        candidates, ids = denoiser.predict(), denoiser.state.ids.clone()
        for row in denoiser.state.active_rows:
            block, length = denoiser.blocks[row], int(canvas.lengths[row])
            stop = block.stop if kind != "full" else length
            mask = None
            if kind != "full":
                columns = torch.arange(stop)
                before = columns if kind == "joint" else columns // SIZE * SIZE + SIZE - 1
                mask = (columns <= before.where(columns < block.start, stop - 1)[:, None])[None, None]
            logits = model(ids[row : row + 1, :stop], attn_mask=mask)[0]
            logits[:, MASK] = -math.inf
            if not canvas.may_end:
                logits[:, EOS] = -math.inf
            mine = candidates.rows == row
            found = dict(zip(candidates.columns[mine].tolist(), candidates.kept[mine].tolist(), strict=True))
            ends = [c for c in range(length) if canvas.open[row, c] and ids[row, c] == EOS]
            end = min([*ends, length - canvas.surplus[row] - 1])
            for column in range(block.start, block.stop):
                p, likeliest = logits[column].softmax(0).max(0)
                if not canvas.open[row, column]:
                    assert column not in found
                elif ids[row, column] != MASK and column <= end:
                    changes = likeliest != ids[row, column] and p > threshold
                    assert found[column] == changes
                    seen[bool(changes)] += 1
                else:
                    assert found.get(column, False) in (False, ids[row, column] == MASK)
        before = denoiser.state.masked
        step = denoiser.write(candidates)
        assert (step.ids == canvas.ids)[~canvas.open].all() and not (step.ids[~before] == MASK).any()
    assert min(seen[True], seen[False]) > 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [replace(EAGER, gen_temp=1.0), replace(HOT, gen_steps=6, gen_eos="confidence")])
def test_a_threshold_that_no_probability_is_above_leaves_every_token_as_it_was(kind, config, ending_model):
    """Seed for seed, at a pass for each block that sees that nothing changes; with editing off, at none."""
    model = ending_model(2.0, **KINDS[kind])
    canvas = continuing(model, num_new=NEW)
    plain, steps = steps_of(model, canvas, config)
    off = replace(config, gen_edit_threshold=0.0, gen_edit="off")
    assert_same_steps(steps_of(model, canvas, off)[1], steps)
    edited, _ = steps_of(model, canvas, replace(config, gen_edit_threshold=1.0))
    assert edited.new == plain.new and torch.equal(edited.ids, plain.ids) and edited.row_edits == [0] * 5
    for row, prompt in enumerate(PROMPTS):
        first = 0 if kind == "full" else len(prompt)
        size = 8 if kind == "full" else SIZE
        begin = 0 if kind == "full" else first // size
        blocks = (first + len(plain.new[row]) - 1) // size - begin + 1
        assert edited.row_passes[row] == plain.row_passes[row] + blocks


TARGET = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]


@pytest.mark.parametrize("edit", ["overwrite", "remask"])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("size", [0, SIZE])
def test_wrong_tokens_are_repaired_by_a_model_that_knows_and_right_ones_are_never_touched(size, threshold, edit):
    model = Scripted(lambda ids: [1, *TARGET], size)
    config = replace(EAGER, gen_edit_threshold=threshold, gen_edit=edit, gen_block_size=None if size else 0)
    wrong = {2: 25, 3: EOS}

    def plant(candidates):
        tokens = [wrong.get(c, t) for c, t in zip(candidates.columns.tolist(), candidates.tokens.tolist(), strict=True)]
        return replace(candidates, tokens=torch.tensor(tokens))

    canvas = Canvas.continuing([[1]], 10, model.config)
    decoded, steps = run(model, canvas, config, plant)
    assert decoded.new == [TARGET] and decoded.row_edits == [2]
    touched = torch.stack([step.written for step in steps]).sum(dim=0)[0].tolist()
    assert touched[1:11] == [1 + (column in wrong) for column in range(1, 11)]
    unsure, _ = run(model, canvas, replace(config, gen_edit_threshold=0.96), plant)
    assert unsure.row_edits == [0] and unsure.new == [[11, 25, EOS]]


# -- when a block is done ----------------------------------------------------------------------------------------------


def swapped(ids):
    """Columns 1 and 2 want each other's token."""
    return [1, ids[2], ids[1], 13, 14] if MASK not in ids[:5] else [1, 11, 12, 13, 14]


def restless(ids):
    """Wants another token wherever there is one; what is written comes back after twenty steps."""
    return [1, *(5 + (token - 4) % 20 for token in ids[1:])]


@pytest.mark.parametrize("edit", ["overwrite", "remask"])
@pytest.mark.parametrize("wants", [swapped, restless])
@pytest.mark.parametrize("post", [0, 1, 2, 5, 40])
def test_a_block_is_done_however_restless_the_model_is(wants, post, edit):
    """After no more steps than masks and those that only edit; with remasking, twice the masks. What comes back to
    where it was goes on no longer."""
    model = Scripted(wants)
    canvas = Canvas.continuing([[1]], 4, model.config)
    config = replace(FREELY, gen_post_edits=post, gen_edit=edit)
    decoded, steps = run(model, canvas, config)
    assert len(steps) <= (4 + post if edit == "overwrite" else 8 + post)
    one_by_one = replace(config, gen_remasking="low_confidence")
    assert len(run(model, canvas, one_by_one)[1]) <= (4 + post if edit == "overwrite" else 8 + post)
    if edit == "overwrite":
        expected = {swapped: min(post, 2), restless: min(post, 20)}[wants]
        assert len(steps) == 1 + expected and decoded.row_edits == [expected * (2 if wants is swapped else 4)]
    assert MASK not in decoded.new[0]


# -- where the text ends -----------------------------------------------------------------------------------------------


def test_a_token_behind_an_end_that_is_edited_away_is_text_again():
    """The end is written first, between others; what was masked behind it is then written, too."""

    def wants(ids):
        early = ids[1:5] == [MASK] * 4
        return [1, 11, EOS, 13, 14] if early or MASK in ids[1:3] else [1, 11, 12, 13, EOS]

    model = Scripted(wants)
    canvas = Canvas.continuing([[1], [1]], 4, model.config)
    denoiser = Denoiser(model, canvas, FREELY, [0, 1])
    first = denoiser.predict()
    denoiser.write(replace(first, kept=torch.tensor([True, True, True, False, True, True, False, False])))
    assert denoiser.state.active_rows == [0, 1], "an end is one only when its block is done"
    while not denoiser.finished:
        denoiser.write(denoiser.predict())
    decoded = denoiser.finish()
    assert decoded.new == [[11, 12, 13, EOS]] * 2 and decoded.ended == [True, True]
    assert decoded.row_edits == [1, 1]


@pytest.mark.parametrize("size", [0, SIZE])
def test_an_end_that_an_edit_writes_cuts_the_text(size):
    def wants(ids):
        return [1, 11, 12, 13, *TARGET] if MASK in ids[1:4] else [1, 11, EOS, 13, *TARGET]

    model = Scripted(wants, size)
    config = replace(FREELY, gen_block_size=None if size else 3)
    decoded, steps = run(model, Canvas.continuing([[1]], 11, model.config), config)
    assert decoded.new == [[11, EOS]] and decoded.ended == [True] and decoded.row_edits == [1]
    assert len(steps) == 3 and (decoded.ids[0, 4:] == EOS).all()


@pytest.mark.parametrize("eos", ["free", "confidence", "never"])
def test_an_edit_writes_no_end_that_the_policy_would_not_write(eos, ending_model):
    model, early, late = ending_model(2.0, attention="full"), 0, 0
    config = replace(FREELY, gen_eos=eos, gen_remasking="low_confidence", gen_steps=16)
    denoiser = Denoiser(model, continuing(model, PROMPTS * 2, 16), config, range(10))
    while not denoiser.finished:
        candidates = denoiser.predict()
        written = ~denoiser.state.masked[candidates.rows, candidates.columns]
        ends = candidates.rows[candidates.kept & written & (candidates.tokens == EOS)].tolist()
        masked = sum(bool(denoiser.blocks[row].masked) for row in ends)
        early, late = early + masked, late + len(ends) - masked
        denoiser.write(candidates)
    assert (early > 0) == (eos == "free") and (late > 0) == (eos != "never")


# -- caches ------------------------------------------------------------------------------------------------------------

BRIEF = replace(FREELY, gen_post_edits=3)
VARIANTS = {
    "rarely": replace(FREELY, gen_edit_threshold=0.08),
    "reopened": replace(BRIEF, gen_edit_blocks=1),
    "two reopened": replace(BRIEF, gen_edit_blocks=2, gen_temp=1.0),
    "remasked": replace(BRIEF, gen_edit="remask", gen_edit_blocks=1),
    "guided": replace(BRIEF, gen_cfg_scale=0.8, gen_edit_blocks=1),
    "penalised": replace(BRIEF, gen_repeat_penalty=0.5, gen_penalty_lambda=0.5),
}


@pytest.mark.parametrize("attention", ["block", "joint"])
@pytest.mark.parametrize("filling", [continuing, infilling])
@pytest.mark.parametrize("name", VARIANTS)
def test_cached_equals_recomputed(name, filling, attention, tiny_model):
    model = tiny_model(**KINDS[attention], num_key_value_heads=2)
    canvas = continuing(model, num_new=NEW) if filling is continuing else infilling(model)
    config = VARIANTS[name]
    recomputed, steps = steps_of(model, canvas, replace(config, gen_cache="none"))
    for fused in (True, False):
        cached, others = steps_of(model, canvas, replace(config, gen_fuse_commit=fused))
        assert_same_steps(others, steps)
        assert cached.new == recomputed.new and cached.row_edits == recomputed.row_edits
    assert sum(recomputed.row_edits) > 5
    if config.gen_edit_blocks:
        late = [
            step.written & (step.ids != before.ids) & ~before.written
            for before, step in zip(steps, steps[1:], strict=False)
        ]
        assert any(one.any() for one in late)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("name", VARIANTS)
def test_prefix_and_dual_cache_are_exact_for_one_layer(name, cache, tiny_model):
    model = tiny_model(attention="full", num_hidden_layers=1)
    config = replace(VARIANTS[name], gen_block_size=3)
    _, steps = steps_of(model, continuing(model, num_new=NEW), replace(config, gen_cache=cache))
    assert_same_steps(steps, steps_of(model, continuing(model, num_new=NEW), config)[1])


@pytest.mark.parametrize("size", [0, SIZE])
def test_a_reopened_block_sees_the_one_behind_it(size):
    """A token that only the next block shows to be wrong is repaired, in the pass after that block; no other is."""

    def wants(ids):
        known = [token for token in (ids[4:8] if size else ids[5:9]) if token not in (MASK, PAD)]
        return [1, 11, 12, 21 if len(known) == 4 else 13, *range(14, 30)]

    model = Scripted(wants, size)
    canvas = Canvas.continuing([[1]], 11 if size else 12, model.config)
    config = replace(FREELY, gen_block_size=None if size else SIZE)
    plain, _ = run(model, canvas, config)
    again, steps = run(model, canvas, replace(config, gen_edit_blocks=1))
    assert plain.new[0][2] == 13 and plain.row_edits == [0]
    assert again.new[0] == [*plain.new[0][:2], 21, *plain.new[0][3:]] and again.row_edits == [1]
    assert [step.num_edits for step in steps] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_blocks_without_open_positions_are_not_looked_at_again(tiny_model):
    model = tiny_model(**KINDS["block"])
    row = [1, None, 5, 6, 7, 8, 9, 10, 11, None, 2]
    canvas, config = Canvas.infilling([row], model.config), replace(FREELY, gen_post_edits=0)
    passes = [decode(model, canvas, replace(config, gen_edit_blocks=w), [0]).num_forward_passes for w in (0, 1, 2)]
    assert passes == [2, 2, 3]


# -- modes -------------------------------------------------------------------------------------------------------------


def test_a_mode_is_its_thresholds(tiny_model):
    model = tiny_model(attention="full")
    for mode, mask, edit in (("quality", 0.7, 0.5), ("speed", 0.5, 0.0)):
        fitted = DenoisingConfig(gen_mode=mode).fitted(model.config)
        asked = (fitted.gen_remasking, fitted.gen_confidence_threshold, fitted.gen_edit_threshold)
        assert asked == ("threshold", mask, edit) and fitted.edits
        typed = DenoisingConfig(gen_remasking="threshold", gen_confidence_threshold=mask, gen_edit_threshold=edit)
        assert typed.fitted(model.config) == fitted == fitted.fitted(model.config)
        off = DenoisingConfig(gen_mode=mode, gen_edit="off").fitted(model.config)
        assert off.gen_confidence_threshold == mask and not off.edits
    assert not DenoisingConfig().edits
