"""Whole texts: against decoders written with plain loops, in batches, in every setting."""

import math
from dataclasses import replace

import pytest
import torch

from model.decoding.autoregressive import SamplingConfig
from model.decoding.canvas import Canvas
from model.decoding.decode import decode
from model.decoding.remasking import POLICIES
from tests.model.decoding.canvases import EOS, GREEDY, HOT, MASK, PROMPTS, continuing, infilling, spied, steps_of

AR_GREEDY = SamplingConfig(ar_temperature=0.0, ar_repeat_penalty=0.0)
AR_HOT = SamplingConfig(ar_temperature=1.0, ar_top_k=12, ar_top_p=0.95, ar_repeat_penalty=0.5, ar_repeat_window=3)


# -- one row, against decoders written with plain loops ----------------------------------------------------------------


@torch.no_grad()
def published(model, prompt, length, block, steps):
    """LLaDA's released loop as it stands: equal blocks, steps / (length / block) steps each, idle ones included."""
    canvas, states = prompt + [MASK] * length, []
    per_block = steps // (length // block)
    share, rest = divmod(block, per_block)
    for low in range(len(prompt), len(prompt) + length, block):
        for j in range(per_block):
            logits = model(torch.tensor([canvas]))[0].clone()
            logits[:, MASK] = -math.inf
            masked = [i for i in range(low, low + block) if canvas[i] == MASK]
            ranked = sorted((-logits[i].softmax(-1).max().item(), i, int(logits[i].argmax())) for i in masked)
            for _, i, token in ranked[: share + (j < rest)]:
                canvas[i] = token
            if share + (j < rest):
                states.append(list(canvas))
    return states


@pytest.mark.parametrize("length", [6, 8])
def test_equal_blocks_are_the_published_sampler_step_for_step(length, tiny_model):
    model = tiny_model(attention="full")
    ending = torch.zeros(model.config.vocab_size).index_fill(0, torch.tensor(EOS), -50.0)
    model.lm_head.register_forward_hook(lambda *call: call[-1] + ending)  # the loop knows no early stop
    prompt, cases = [1, 9, 4, 4], 0
    for block in (d for d in range(1, length + 1) if length % d == 0):
        for per_block in range(1, block + 3):
            steps = per_block * (length // block)
            config = replace(GREEDY, gen_steps=steps, gen_block_size=block)
            _, seen = steps_of(model, continuing(model, [prompt], length), config)
            assert [step.ids[0].tolist() for step in seen] == published(model, prompt, length, block, steps)
            cases += per_block > block
    assert cases >= 8, "more steps than tokens, in every block size"


def penalised(logits, canvas, written, position, config):
    for j in written:
        if abs(j - position) <= config.gen_repeat_window and canvas[j] != EOS:
            logits[canvas[j]] -= config.gen_repeat_penalty
    return logits


def reference_denoiser(model, prompt, new, config):
    """LLaDA's sampler written out: one row, greedy, low confidence. (canvas, {position: probability}) per step."""
    steps, block = config.gen_steps, config.gen_block_size or new
    canvas, written, states = prompt + [MASK] * new, set(), []
    blocks = math.ceil(new / block)
    for b in range(blocks):
        low, high = len(prompt) + b * block, min(len(prompt) + (b + 1) * block, len(prompt) + new)
        first, last = low - len(prompt), high - len(prompt)
        share = max(1, steps * last // new - steps * first // new)
        share = min(share, high - low)
        for j in range(share):
            quota = (high - low) // share + (j < (high - low) % share)
            logits = model(torch.tensor([canvas]))[0]
            candidates = []
            for i in range(low, high):
                if canvas[i] == MASK:
                    own = penalised(logits[i], canvas, written, i, config)
                    own[MASK] = -math.inf
                    p = own.softmax(-1)
                    candidates.append((-p.max().item(), i, int(p.argmax())))
            chosen = sorted(candidates)[:quota]
            for _, i, token in chosen:
                canvas[i] = token
                written.add(i)
            states.append((list(canvas), {i: -p for p, i, _ in chosen}))
    return states


def has_ended(prompt, canvas):
    """An EOS is written and nothing to the left of it is open."""
    for token in canvas[len(prompt) :]:
        if token in (MASK, EOS):
            return token == EOS
    return False


@pytest.mark.parametrize("penalty, bias", [(0.0, 0.0), (0.0, 5.0), (2.0, 3.0)])
@torch.no_grad()
def test_greedy_denoising_equals_a_decoder_written_with_plain_loops(penalty, bias, ending_model):
    """Token for token and commit for commit, for every block size and step count; it only stops where EOS says so."""
    model, new = ending_model(bias, attention="full"), 5
    stopped = 0
    for prompt in ([1, 5, 5, 7], [1, 9]):
        for block in range(new + 2):
            for steps in (*range(1, new + 2), 20):
                config = replace(
                    GREEDY,
                    gen_steps=steps,
                    gen_block_size=block,
                    gen_repeat_penalty=penalty,
                    gen_repeat_window=2,
                )
                expected = reference_denoiser(model, prompt, new, config)
                ends = [i for i, (canvas, _) in enumerate(expected) if has_ended(prompt, canvas)]
                expected = expected[: ends[0] + 1] if ends else expected
                decoded, seen = steps_of(model, continuing(model, [prompt], new), config)
                assert [step.ids[0].tolist() for step in seen] == [canvas for canvas, _ in expected]
                for step, (_, chosen) in zip(seen, expected, strict=True):
                    assert set(step.written[0].nonzero()[:, 0].tolist()) == set(chosen)
                    for i, p in chosen.items():
                        assert step.confidence[0, i].item() == pytest.approx(p, abs=1e-5)
                last = expected[-1][0]
                stopped += MASK in last
                assert decoded.ids[0].tolist() == [EOS if token == MASK else token for token in last]
                text = last[len(prompt) :]
                assert decoded.new[0] == (text[: text.index(EOS) + 1] if EOS in text else text)
                assert decoded.ended[0] == (EOS in text) and decoded.num_forward_passes == len(expected)
    assert stopped > 5 or not bias, "no row ended early"


def test_what_early_stopping_leaves_out_is_behind_the_end(ending_model, monkeypatch):
    """The text up to EOS is that of the full schedule."""
    model = ending_model(4.0, attention="full")
    for policy in POLICIES:
        config = replace(HOT, gen_remasking=policy, gen_steps=6, gen_block_size=3)
        short = decode(model, continuing(model), config, range(5))
        with monkeypatch.context() as patch:
            patch.setattr(
                "model.decoding.canvas.CanvasState._has_ended", lambda state, row: not state.masked_columns[row]
            )
            full = decode(model, continuing(model), config, range(5))
        assert short.new == full.new and short.ended == full.ended
        assert short.num_forward_passes <= full.num_forward_passes
        assert sum(short.row_passes) < sum(full.row_passes), "no row ended early, so nothing was tested"


@pytest.mark.parametrize("penalty, window", [(0.0, 1), (3.0, 2), (3.0, 50)])
@torch.no_grad()
def test_greedy_cached_decoding_equals_recomputing_every_prefix(penalty, window, ending_model):
    """A batch of unequal prompts against one row at a time without a cache; the prompt is never penalised."""
    model = ending_model(2.0)
    config = replace(AR_GREEDY, ar_repeat_penalty=penalty, ar_repeat_window=window)
    decoded = decode(model, continuing(model), config, range(5))
    for row, prompt in enumerate(PROMPTS):
        new = []
        while len(new) < 8 and EOS not in new:
            logits = model(torch.tensor([prompt + new]), is_causal=True)[0, -1]
            for token in new[-window:]:
                logits[token] -= penalty
            logits[MASK] = -math.inf
            new.append(int(logits.argmax()))
        assert decoded.new[row] == new and decoded.row_passes[row] == len(new)
        assert decoded.ended[row] == (EOS in new)
        assert decoded.ids[row, : len(prompt) + 8].tolist() == prompt + new + [EOS] * (8 - len(new))
    assert decoded.num_forward_passes == max(decoded.row_passes) > min(decoded.row_passes)


# -- many rows (each as it would be alone: test_invariance.py) ---------------------------------------------------------

CONFIGS = {f"{name} hot": replace(HOT, gen_remasking=name) for name in POLICIES}
CONFIGS |= {f"{name} greedy": replace(GREEDY, gen_remasking=name, gen_block_size=3) for name in POLICIES}
CONFIGS |= {
    "guided": replace(HOT, gen_cfg_scale=0.7, gen_block_size=4),
    "confident": replace(HOT, gen_remasking="threshold", gen_confidence_threshold=0.2, gen_cap_start_ratio=0.5),
    "EOS last": replace(HOT, gen_eos="confidence", gen_block_size=3),
    "never": replace(HOT, gen_eos="never"),
    "prefix cache": replace(HOT, gen_cache="prefix", gen_block_size=3),
    "dual cache": replace(HOT, gen_cache="dual", gen_block_size=3),
    "dual cache, guided": replace(GREEDY, gen_cache="dual", gen_block_size=2, gen_cfg_scale=0.7),
    "AR greedy": AR_GREEDY,
    "AR hot": AR_HOT,
    "blocks": HOT,
    "blocks recomputed": replace(HOT, gen_cache="none"),
    "blocks confident": replace(HOT, gen_remasking="hybrid", gen_confidence_threshold=0.2, gen_eos="confidence"),
    "blocks guided": replace(GREEDY, gen_cfg_scale=0.7),
    "blocks unfused": replace(HOT, gen_fuse_commit=False, gen_steps=5),
    "blocks unfused, guided": replace(HOT, gen_fuse_commit=False, gen_cfg_scale=0.5, gen_steps=5),
}


def trained_for(name):
    """The changes to a model that make it one for the config of this name."""
    if isinstance(CONFIGS[name], SamplingConfig):
        return {"attention": "causal"}
    return {"attention": "block", "block_size": 3} if name.startswith("blocks") else {"attention": "full"}


@pytest.mark.parametrize("name", ["random hot", "low_confidence hot", "AR hot", "blocks"])
def test_the_seed_decides_the_text(name, tiny_model):
    config = CONFIGS[name]
    model = tiny_model(**trained_for(name))
    texts = decode(model, continuing(model, [[1, 5]] * 3), config, [1, 2, 1]).new
    assert texts[0] == texts[2] != texts[1]


@pytest.mark.parametrize("filling", [continuing, infilling])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_open_position_is_written_once_and_nothing_else_ever_changes(name, filling, ending_model):
    config = CONFIGS[name]
    autoregressive = isinstance(config, SamplingConfig)
    if autoregressive and filling is infilling:
        return  # it cannot
    model = ending_model(1.0, **trained_for(name))
    canvas = filling(model)
    decoded, seen = steps_of(model, canvas, config)
    before, known = canvas.ids, ~canvas.open
    for step in seen:  # all of them were made before any is looked at: each holds its own copy
        assert step.written.any() and not (step.written & known).any()
        assert torch.equal(step.ids[~step.written], before[~step.written])
        assert torch.equal(step.confidence > 0, step.written) and (step.confidence <= 1).all()
        before, known = step.ids, known | step.written
        assert torch.equal(before == MASK, ~known)
    assert torch.equal(decoded.ids[known], before[known]) and (decoded.ids[~known] == EOS).all()
    assert torch.equal(decoded.ids[~canvas.open], canvas.ids[~canvas.open])
    for row, new in enumerate(decoded.new):
        is_open = canvas.text(row)[1]
        filled = decoded.ids[row, : len(is_open)][is_open].tolist()
        assert new == (filled[: filled.index(EOS) + 1] if EOS in filled else filled) and MASK not in filled
        assert decoded.ended[row] == (EOS in filled)
    assert filling is continuing or (known.all() and not any(decoded.ended))
    assert [s.num_forward_passes for s in seen] == sorted({s.num_forward_passes for s in seen})
    assert seen[-1].num_forward_passes == decoded.num_forward_passes


@pytest.mark.parametrize("name", CONFIGS)
def test_the_passes_counted_are_the_calls_of_the_network(name, ending_model, monkeypatch):
    config = CONFIGS[name]
    model = ending_model(1.0, **trained_for(name))
    calls = spied(model, monkeypatch)
    decoded = decode(model, continuing(model), config, range(5))
    assert decoded.num_forward_passes == len(calls)
    assert sum(len(ids) for ids in calls) == sum(decoded.row_passes), "finished rows are no longer computed"


# -- the interface -----------------------------------------------------------------------------------------------------


def test_decoding_in_bfloat16_reports_probabilities_in_float32(tiny_model):
    for name in ("AR hot", "guided", "dual cache", "blocks", "blocks recomputed"):
        model = tiny_model(**trained_for(name))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, seen = steps_of(model, continuing(model), CONFIGS[name])
        assert {step.confidence.dtype for step in seen} == {torch.float32}


def test_decoders_refuse_the_other_kind_and_what_does_not_fit(tiny_model):
    causal, full = tiny_model(), tiny_model(attention="full")
    with pytest.raises(ValueError, match="trained by diffusion; sampling"):
        decode(full, continuing(full), AR_GREEDY, range(5))
    with pytest.raises(ValueError, match="is autoregressive; denoising"):
        decode(causal, continuing(causal), GREEDY, range(5))
    with pytest.raises(ValueError, match="at most 64"):
        Canvas.continuing([[1] * 60], 5, causal.config)
    with pytest.raises(ValueError, match="at most 64"):
        Canvas.infilling([[1] * 60 + [None] * 5], causal.config)
    with pytest.raises(ValueError, match="infilling needs one of diffusion"):
        decode(causal, infilling(causal), AR_GREEDY, range(3))
    with pytest.raises(ValueError, match="BOS"):
        decode(causal, Canvas.continuing([[1], []], 3, causal.config), AR_GREEDY, range(2))
    with pytest.raises(ValueError, match="5 rows need as many seeds, not 1"):
        decode(causal, continuing(causal), AR_GREEDY, [0])
    with pytest.raises(ValueError, match="among the given"):
        Canvas.continuing([[1, MASK]], 3, causal.config)


def test_a_text_without_blanks_is_done(tiny_model):
    model = tiny_model(attention="full")
    canvas = Canvas.infilling([[1, 5, 2], [1, None, 2]], model.config)
    decoded = decode(model, canvas, GREEDY, range(2))
    assert decoded.new[0] == [] and decoded.row_passes == [0, 1] and len(decoded.new[1]) == 1
