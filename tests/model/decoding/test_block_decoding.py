"""Block by block on the grid of a checkpoint's training, and what caches keep: exactly, or by approximation."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.attention import block_causal_mask
from model.block_diffusion import denoising_inputs
from model.decoding.canvas import Canvas
from model.decoding.decode import decode
from model.decoding.denoiser import Denoiser, DenoisingConfig
from model.decoding.denoiser_cache import BlockCache, Span
from model.decoding.remasking import transfer_schedule
from model.kv_cache import KVCache
from tests.model.decoding.canvases import EOS, GREEDY, HOT, MASK, PROMPTS, continuing, infilling, spied, steps_of

SIZE, NEW = 4, 11  # prompts of 3, 1, 6, 5 and 3 tokens: ragged at both ends, some shorter than a block
CONFIGS = {
    "greedy": GREEDY,
    "few steps": replace(GREEDY, gen_steps=4),
    "hot": replace(HOT, gen_steps=6),
    "threshold": replace(HOT, gen_remasking="threshold", gen_confidence_threshold=0.4),
    "factor, hot": replace(HOT, gen_remasking="factor", gen_factor=1.5),
    "hybrid, greedy": replace(GREEDY, gen_remasking="hybrid", gen_confidence_threshold=0.6, gen_steps=6),
    "random": replace(HOT, gen_remasking="random", gen_steps=7),
    "guided": replace(HOT, gen_cfg_scale=0.8, gen_steps=8),
    "may end": replace(HOT, gen_eos="confidence"),
}


@pytest.fixture
def block_model(tiny_model):
    def build(size=SIZE, attention="block", **changes):
        return tiny_model(attention=attention, block_size=size, **changes)

    return build


def assert_same_steps(steps, expected):
    """Tokens and places identical, confidences to 1e-5."""
    for a, b in zip(steps, expected, strict=True):
        assert torch.equal(a.ids, b.ids) and torch.equal(a.written, b.written)
        torch.testing.assert_close(a.confidence, b.confidence, rtol=0, atol=1e-5)


def side_by_side(leader, follower):
    """Both write what the leader writes; per step, the largest difference of confidence and the leader's block."""
    while not leader.finished:
        ours, theirs = leader.predict(), follower.predict()
        assert torch.equal(ours.columns, theirs.columns)
        yield (ours.confidence - theirs.confidence).abs().max().item(), leader.blocks[0]
        leader.write(ours)
        follower.write(replace(theirs, tokens=ours.tokens, kept=ours.kept))


# -- what a block is given ---------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(model, prompt, new, steps):
    """One row, greedy, low confidence: a block sees itself and the clean ones before it, whose tokens see their blocks
    and those before or, in a joint model, the tokens before. The canvas after each step; it consists of whole blocks,
    and the last one is left as soon as the text in it is written."""
    size, end = model.config.block_size, len(prompt) + new
    room = -(-end // size) * size - len(prompt)
    canvas, states = prompt + [MASK] * room, []
    for low in range(len(prompt) // size * size, end, size):
        high = low + size
        count, first = sum(t == MASK for t in canvas[low:high]), max(low - len(prompt), 0)
        share = min(count, max(1, steps * (first + count) // room - steps * first // room))
        for j in range(share):
            if MASK not in canvas[:end]:
                break
            attn_mask = block_causal_mask(high, size if model.config.attention == "block" else 1)
            attn_mask[..., low:, :] = True
            logits = model(torch.tensor([canvas[:high]]), attn_mask=attn_mask)[0].clone()
            logits[:, [MASK, EOS]] = -math.inf  # it knows no end
            masked = [i for i in range(low, high) if canvas[i] == MASK]
            ranked = sorted((-logits[i].softmax(-1).max().item(), i, int(logits[i].argmax())) for i in masked)
            for _, i, token in ranked[: count // share + (j < count % share)]:
                canvas[i] = token
            states.append(list(canvas))
    return states


@pytest.mark.parametrize("attention", ["block", "joint"])
@pytest.mark.parametrize("cache", ["none", "block"])
@pytest.mark.parametrize("size", [1, 3, 4, 20])
def test_block_decoding_equals_a_decoder_written_with_plain_loops(size, cache, attention, block_model):
    model, compared = block_model(size, attention), 0
    for prompt in PROMPTS:
        for steps in (1, 5, 40):
            config = replace(GREEDY, gen_steps=steps, gen_cache=cache, gen_eos="never")
            decoded, seen = steps_of(model, continuing(model, [prompt], NEW), config)
            assert [step.ids[0].tolist() for step in seen] == by_hand(model, prompt, NEW, steps)
            assert decoded.num_forward_passes == len(seen)
            compared += len(seen)
    assert compared > 40


@torch.no_grad()
@pytest.mark.parametrize("policy", ["low_confidence", "random", "threshold", "hybrid"])
def test_blocks_of_one_token_are_written_from_left_to_right_each_from_the_clean_ones_before(policy, block_model):
    """An AR factorisation: position i is predicted at i, from [MASK]."""
    model = block_model(1)
    for prompt in PROMPTS:
        ids = list(prompt)
        while len(ids) < len(prompt) + NEW and EOS not in ids[len(prompt) :]:
            logits = model(torch.tensor([[*ids, MASK]]), is_causal=True)[0, -1].clone()
            logits[MASK] = -math.inf
            ids.append(int(logits.argmax()))
        decoded, seen = steps_of(model, continuing(model, [prompt], NEW), replace(GREEDY, gen_remasking=policy))
        assert prompt + decoded.new[0] == ids
        assert [step.written[0].nonzero().flatten().tolist() for step in seen] == [
            [len(prompt) + i] for i in range(len(decoded.new[0]))
        ]


@pytest.mark.parametrize("attention", ["block", "joint"])
def test_a_block_is_decoded_from_the_logits_it_was_trained_with(attention, block_model):
    """Training's one pass over [x_t, x_0], x_0 being right up to the active block and arbitrary from there on."""
    model, rows = block_model(attention=attention), 0
    for canvas in (continuing(model, num_new=NEW), infilling(model)):
        canvas.ids.masked_fill_(canvas.ids == 0, 9)  # training has no padding here, and nothing later is seen
        denoiser = Denoiser(model, canvas, GREEDY, range(len(canvas.ids)))
        while not denoiser.finished:
            candidates = denoiser.predict()
            for row in denoiser.state.active_rows:
                noised = denoiser.state.ids[row : row + 1, : denoiser.blocks[row].length]
                masked = denoiser.state.masked[row, : denoiser.blocks[row].length].nonzero()[:, 0]
                block = masked[masked // SIZE == masked[0] // SIZE]
                clean = noised.where(noised != MASK, 5)
                clean[0, masked[0] // SIZE * SIZE :] = torch.randint(4, 24, (1,))
                with torch.no_grad():
                    both, halves = denoising_inputs(noised, clean, None, SIZE, block, attention == "joint")
                    logits = model(both, **halves)
                logits[:, MASK] = -math.inf
                if not canvas.may_end:
                    logits[:, EOS] = -math.inf
                mine = candidates.rows == row
                assert candidates.columns[mine].tolist() == block.tolist()
                expected = logits.softmax(dim=-1).amax(dim=-1)
                torch.testing.assert_close(candidates.confidence[mine], expected, rtol=0, atol=1e-5)
                rows += 1
            denoiser.write(candidates)
    assert rows > 50


def test_given_tokens_in_later_blocks_are_not_seen_and_those_in_the_same_block_are(block_model):
    model = block_model(num_hidden_layers=1)
    row = [1, None, None, 8, None, 5, None, 7, 6, 2]
    confidence = []
    for changed in (None, 9, 5, 3):
        blanks = [11 if i == changed else token for i, token in enumerate(row)]
        _, seen = steps_of(model, Canvas.infilling([blanks], model.config), replace(GREEDY, gen_steps=1))
        confidence.append([step.confidence[0, : 4 + 4 * i] for i, step in enumerate(seen)])
    plain, later, own, first = confidence
    assert all(torch.equal(a, b) for a, b in zip(plain, later, strict=True))
    assert torch.equal(plain[0], own[0]) and not torch.allclose(plain[1], own[1])
    assert not torch.allclose(plain[0], first[0])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(1, 6),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    new=st.integers(1, 14),
    name=st.sampled_from(list(CONFIGS)),
    bias=st.sampled_from([0.0, 3.0]),
)
def test_a_shorter_text_is_the_beginning_of_a_longer_one(size, lengths, new, name, bias, ending_model):
    """Whatever the last block is cut to, it is decoded as the whole one that training has shown: of the canvas up to
    the end of the batch's blocks, the first `new` tokens, and an end only if it stands among them."""
    torch.manual_seed(size)
    model = ending_model(bias, attention="block", block_size=size).double()
    prompts = [[1, *range(4, 3 + length)] for length in lengths]
    for i, prompt in enumerate(prompts):
        whole = new + -(len(prompt) + new) % size
        short, long = (decode(model, continuing(model, [prompt], n), CONFIGS[name], [i]) for n in (new, whole))
        cut = long.new[0][:new]
        assert short.new == [cut] and short.ended == [EOS in cut]
        assert short.row_passes <= long.row_passes
    together = decode(model, continuing(model, prompts, new), CONFIGS[name], range(len(prompts)))
    assert together.new[-1] == cut and together.ended[-1] == (EOS in cut)


def test_a_canvas_ends_with_a_block_or_with_the_context(block_model):
    config = block_model().config
    canvas = Canvas.continuing([[1], [1, 5, 6], [1] * 10], 5, config, context=17)
    assert canvas.lengths.tolist() == [8, 8, 16] and canvas.surplus == (2, 0, 1)
    assert Canvas.continuing([[1] * 10], 7, config, context=17).surplus == (0,)
    assert Canvas.continuing([[1] * 10], 5, config, context=15).surplus == (0,)
    ids, is_open = canvas.text(0)
    assert ids.tolist() == [1, *[MASK] * 5] and is_open.tolist() == [False, *[True] * 5]


# -- the exact cache ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["block", "joint"])
@pytest.mark.parametrize("filling", [continuing, infilling])
@pytest.mark.parametrize("name", CONFIGS)
def test_cached_equals_recomputed(name, filling, attention, block_model):
    model = block_model(attention=attention, num_key_value_heads=2, qk_norm=True)
    canvas = continuing(model, num_new=NEW) if filling is continuing else infilling(model)
    cached, steps = steps_of(model, canvas, CONFIGS[name])
    recomputed, others = steps_of(model, canvas, replace(CONFIGS[name], gen_cache="none"))
    assert_same_steps(steps, others)
    assert cached.new == recomputed.new and cached.row_passes == recomputed.row_passes


class StaleCommit(BlockCache):
    """Keeps the K/V that a block's last denoising pass left, computed while some of its tokens were [MASK]."""

    def _span(self, row, stop):
        return Span(self.committed[row] if self.committed[row] == 0 else self.start_of[row], stop, stop)

    def passes(self, ids, blocks):
        self.start_of = {block.row: block.start for block in blocks}
        return super().passes(ids, blocks)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_the_keys_of_a_noisy_pass_are_wrong_even_with_one_layer(num_layers, block_model, monkeypatch):
    model = block_model(num_hidden_layers=num_layers)
    canvas = continuing(model, [[1, 7, 8, 9, 5]], NEW)
    config = replace(GREEDY, gen_steps=6, gen_eos="never")
    exact = Denoiser(model, canvas, replace(config, gen_cache="none"), [0])
    monkeypatch.setattr("model.decoding.denoiser.BlockCache", StaleCommit)
    errors = {}
    for error, block in side_by_side(exact, Denoiser(model, canvas, config, [0])):
        errors[block.number] = max(error, errors.get(block.number, 0.0))
    assert errors[1] < 1e-5, "the prompt's block is clean"
    assert min(errors[2], errors[3]) > 1e-3


@pytest.mark.parametrize("attention", ["block", "joint"])
@pytest.mark.parametrize("name", ["greedy", "hot", "guided"])
def test_a_fused_commit_writes_the_same_and_saves_a_pass_per_block(name, attention, block_model):
    """Without it a row makes a pass for each block it decodes but the last, and one for the whole blocks of its
    prompt if there are any."""
    model = block_model(attention=attention)
    canvas = continuing(model, num_new=NEW)
    fused, steps = steps_of(model, canvas, CONFIGS[name])
    apart, others = steps_of(model, canvas, replace(CONFIGS[name], gen_fuse_commit=False))
    assert_same_steps(steps, others)
    branches = 2 if CONFIGS[name].gen_cfg_scale else 1
    for row, prompt in enumerate(PROMPTS):
        blocks = {column // SIZE for s in steps for column in s.written[row].nonzero().flatten().tolist()}
        saved = len(blocks) - 1 + (len(prompt) >= SIZE)
        assert apart.row_passes[row] == fused.row_passes[row] + branches * saved
        assert fused.row_passes[row] == branches * sum(bool(step.written[row].any()) for step in steps)


@pytest.mark.parametrize("fused", [True, False])
def test_a_pass_feeds_the_active_block_and_once_each_block_before_it(fused, block_model, monkeypatch):
    model = block_model()
    calls = spied(model, monkeypatch)
    config = replace(GREEDY, gen_fuse_commit=fused, gen_eos="never", gen_steps=100)
    decoded = decode(model, continuing(model, [[1] + [9] * 9], 14), config, [0])
    first = [8 + 4] if fused else [8, 4]  # the prompt's two blocks; its tail of two stands in the third
    block = [4 + 4, *[4] * 3] if fused else [4, *[4] * 4]
    assert [ids.shape[1] for ids in calls] == [*first, 4, *block, *block, *block]
    assert decoded.num_forward_passes == len(calls)


# -- the approximate caches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("filling", [continuing, infilling])
@pytest.mark.parametrize("name", CONFIGS)
def test_prefix_and_dual_cache_are_exact_for_one_layer(name, filling, cache, tiny_model):
    """K and V then depend on their own tokens alone."""
    model = tiny_model(attention="full", num_hidden_layers=1)
    canvas = continuing(model, num_new=NEW) if filling is continuing else infilling(model)
    config = replace(CONFIGS[name], gen_block_size=3)
    _, steps = steps_of(model, canvas, replace(config, gen_cache=cache))
    assert_same_steps(steps, steps_of(model, canvas, config)[1])


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_with_two_layers_they_are_exact_in_the_first_step_of_a_block_only(cache, tiny_model):
    model = tiny_model(attention="full", num_hidden_layers=2)
    canvas, config = continuing(model, [[1, 7, 8, 9, 5]], 12), replace(GREEDY, gen_block_size=4, gen_eos="never")
    cached = Denoiser(model, canvas, replace(config, gen_cache=cache), [0])
    first, later = [], []
    for error, block in side_by_side(Denoiser(model, canvas, config, [0]), cached):
        (later if block.steps_done else first).append(error)
    assert len(first) == 3 and max(first) < 1e-5
    assert len(later) == 9 and max(later) > 1e-2


class Frozen(KVCache):
    """Answers with the K/V of another pass, but for the columns first to last, which are those of this one."""

    def __init__(self, other, first, last):
        self.other, self.first, self.last = other, first, last
        self.length, self.max_length = first, other.max_length

    def update(self, layer, key, value):
        before, behind = slice(0, self.first), slice(self.last, None)
        pairs = (self.other.keys[layer], key), (self.other.values[layer], value)
        return tuple(torch.cat([old[:, :, before], new, old[:, :, behind]], dim=2) for old, new in pairs)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@torch.no_grad()
def test_what_they_keep_is_that_of_the_blocks_first_step(cache, tiny_model):
    """Against attention to the K/V of a full pass at the block's start, outside of what is computed anew."""
    model, size, compared = tiny_model(attention="full", num_hidden_layers=3), 4, 0
    canvas = continuing(model, num_new=NEW)
    eager = replace(GREEDY, gen_remasking="threshold", gen_confidence_threshold=0.2)
    config = replace(eager, gen_block_size=size, gen_cache=cache, gen_eos="never")
    denoiser, kept, apart = Denoiser(model, canvas, config, range(5)), {}, 0
    while not denoiser.finished:
        candidates, ids = denoiser.predict(), denoiser.state.ids
        apart += len({denoiser.blocks[row].steps_done == 0 for row in denoiser.state.active_rows}) > 1
        for row in denoiser.state.active_rows:
            columns, length = candidates.columns[candidates.rows == row], denoiser.blocks[row].length
            start = len(PROMPTS[row]) + (int(columns[0]) - len(PROMPTS[row])) // size * size
            stop = min(start + size, length) if cache == "dual" else length
            if kept.get(row, (None,))[0] != start:
                kept[row] = start, KVCache(model.config, 1, length)
                model(ids[row : row + 1, :length], cache=kept[row][1])
            frozen = Frozen(kept[row][1], start, stop)
            logits = model(ids[row : row + 1, start:stop], cache=frozen)[0, columns - start]
            logits[:, [MASK, EOS]] = -math.inf
            expected = logits.softmax(dim=-1).amax(dim=-1)
            torch.testing.assert_close(candidates.confidence[candidates.rows == row], expected, rtol=0, atol=1e-5)
            compared += 1
        denoiser.write(candidates)
    assert compared > 20 and apart > 3, "some rows begin a block while others are inside one"


# -- policies and the number of steps ----------------------------------------------------------------------------------


def test_hybrid_at_a_threshold_that_nothing_reaches_follows_the_schedule(block_model):
    """Every block has its share of the steps by the number of its open tokens, at least one."""
    model, blocks = block_model(), ((0, 1), (1, 5), (5, 9), (9, 13))
    canvas = continuing(model, [[1, 7, 8]], 13)
    for steps in (1, 4, 7, 13, 50):
        config = replace(GREEDY, gen_remasking="hybrid", gen_confidence_threshold=1.0, gen_steps=steps)
        decoded, seen = steps_of(model, canvas, replace(config, gen_eos="never"))
        expected = []
        for begin, end in blocks:
            expected += transfer_schedule(end - begin, max(1, steps * end // 13 - steps * begin // 13))
        assert [int(step.written.sum()) for step in seen] == expected
        assert steps < 13 or expected == [1] * 13


@pytest.mark.parametrize("policy", ["threshold", "hybrid"])
def test_at_a_threshold_that_all_reach_a_block_takes_one_step_unless_a_cap_is_typed(policy, block_model):
    model = block_model()
    free = replace(GREEDY, gen_remasking=policy, gen_confidence_threshold=1e-6, gen_eos="never")
    for cap in ({}, {"gen_max_decode_per_step": 2}, {"gen_cap_start_ratio": 0.5}):
        decoded = decode(model, continuing(model, [[1, 7, 8]], 13), replace(free, **cap), [0])
        assert (decoded.num_forward_passes > 4) == (bool(cap) and policy == "threshold")


# -- what fits a checkpoint --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attention, settings, words",
    [
        ("block", {"gen_block_size": 8}, "--gen-block-size 8 is not 4"),
        ("block", {"gen_block_size": 0}, "--gen-block-size 0 is not 4"),
        (
            "block",
            {"gen_cache": "prefix"},
            "--gen-cache prefix is not for .* block diffusion; give block or none",
        ),
        ("block", {"gen_cache": "dual"}, "--gen-cache dual is not for this checkpoint of block diffusion"),
        (
            "full",
            {"gen_cache": "block"},
            "--gen-cache block is not for .* full attention; give none or prefix or dual",
        ),
        ("full", {"gen_fuse_commit": False}, "--no-gen-fuse-commit has no effect"),
        ("block", {"gen_fuse_commit": False, "gen_cache": "none"}, "--no-gen-fuse-commit has no effect"),
    ],
)
def test_settings_that_do_not_fit_the_attention_are_refused(attention, settings, words, tiny_model):
    model = tiny_model(attention=attention, block_size=SIZE if attention == "block" else 0)
    with pytest.raises(ValueError, match=words):
        decode(model, continuing(model), DenoisingConfig(**settings), range(5))


def test_a_checkpoint_decides_what_is_left_to_it(tiny_model):
    blocks, full = (tiny_model(attention=a, block_size=s).config for a, s in (("block", SIZE), ("full", 0)))
    fitted = [DenoisingConfig().fitted(config) for config in (blocks, full)]
    assert [(config.gen_block_size, config.gen_cache) for config in fitted] == [(SIZE, "block"), (8, "none")]
    assert DenoisingConfig(gen_block_size=SIZE).fitted(blocks) == DenoisingConfig().fitted(blocks)
    assert DenoisingConfig(gen_block_size=0, gen_cache="dual").fitted(full).gen_block_size == 0
