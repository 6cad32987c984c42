import math
from collections import Counter

import pytest
import torch

from model.decode import DenoisingConfig, SamplingConfig, decode_autoregressive, decode_diffusion, denoise
from model.remasking import Step, commit, transfer_schedule
from model.sampling import sample_tokens

GREEDY = SamplingConfig(max_new_tokens=8, temperature=0.0)


@pytest.mark.parametrize("n", range(0, 12))
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 20])
def test_the_transfer_schedule_spreads_all_tokens_evenly(n, steps):
    schedule = transfer_schedule(n, steps)
    assert sum(schedule) == n and schedule == sorted(schedule, reverse=True)
    assert not schedule or max(schedule) - min(schedule) <= 1 and min(schedule) >= 1
    assert len(schedule) == min(n, steps)


def test_greedy_cached_decoding_equals_recomputing_every_prefix(tiny_model):
    model, tokens = tiny_model(), torch.randint(4, 24, (1, 5))
    decoded = decode_autoregressive(model, tokens, GREEDY)
    for _ in range(decoded.num_forward_passes):
        logits = model(tokens, is_causal=True)[:, -1].index_fill(-1, torch.tensor([3]), -math.inf)
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(decoded.tokens, tokens)


def test_a_batch_decodes_as_its_rows_do_alone(tiny_model):
    prompts = torch.randint(4, 24, (4, 5))
    for model, decode, more in (
        (tiny_model(), decode_autoregressive, ()),
        (tiny_model(attention="full"), decode_diffusion, (DenoisingConfig(gen_steps=4),)),
    ):
        together = decode(model, prompts, GREEDY, *more).tokens
        for row in range(4):
            alone = decode(model, prompts[row : row + 1], GREEDY, *more).tokens[0]
            assert torch.equal(together[row, : len(alone)], alone)
            assert (together[row, len(alone) :] == model.config.eos_token_id).all()


def reference_decoder(model, prompt, new, steps, block):
    """LLaDA's sampler written out with plain loops: one row, greedy, low confidence."""
    mask_id, canvas = model.config.mask_token_id, prompt.tolist() + [3] * new
    blocks = math.ceil(new / block)
    order = []
    for b in range(blocks):
        low, high = len(prompt) + b * block, min(len(prompt) + (b + 1) * block, len(prompt) + new)
        share = max(1, steps * (b + 1) // blocks - steps * b // blocks)
        share = min(share, high - low)
        for j in range(share):
            quota = (high - low) // share + (j < (high - low) % share)
            logits = model(torch.tensor([canvas]))[0]
            logits[:, mask_id] = -math.inf
            candidates = []
            for i in range(low, high):
                if canvas[i] == mask_id:
                    p = logits[i].softmax(-1)
                    candidates.append((-p.max().item(), i, int(p.argmax())))
            for _, i, token in sorted(candidates)[:quota]:
                canvas[i] = token
                order.append(i)
    return canvas, order


@pytest.mark.parametrize("steps", [1, 3, 8, 20])
@pytest.mark.parametrize("block", [0, 1, 3, 4, 8])
def test_greedy_denoising_equals_a_decoder_written_with_plain_loops(steps, block, tiny_model):
    model, prompt = tiny_model(attention="full"), torch.randint(4, 24, (1, 5))
    with torch.no_grad():
        expected, order = reference_decoder(model, prompt[0], 8, steps, block or 8)
    settings = DenoisingConfig(gen_steps=steps, gen_block_size=block)
    states = list(denoise(model, prompt, GREEDY, settings))
    assert states[-1].canvas[0].tolist() == expected
    committed = [set(s.committed[0].nonzero()[:, 0].tolist()) for s in states]
    assert [i for group in committed for i in sorted(group, key=order.index)] == order


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_committed_tokens_never_change_and_no_mask_is_left(remasking, tiny_model):
    model, prompt = tiny_model(attention="full"), torch.randint(4, 24, (2, 5))
    settings = DenoisingConfig(gen_steps=5, gen_block_size=4, gen_remasking=remasking)
    sampling = SamplingConfig(max_new_tokens=10, temperature=1.0, top_k=0)
    known, previous = torch.zeros(2, 15, dtype=torch.bool), None
    known[:, :5] = True
    for state in denoise(model, prompt, sampling, settings, torch.Generator().manual_seed(1)):
        assert torch.equal(state.canvas[:, :5], prompt)
        if previous is not None:
            assert torch.equal(state.canvas[known], previous[known])
        assert not (state.committed & known).any()
        known = known | state.committed
        assert torch.equal(state.canvas == 3, ~known)
        previous = state.canvas
    assert known.all()


def test_one_by_one_sampling_in_random_order_follows_the_models_joint(tiny_model):
    """Chi-squared of 3,000 samples against the exact probability of each sequence under random-order sampling."""
    model, draws = tiny_model(vocab_size=4, attention="full"), 3000
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
        expected = Counter()
        for order in ((0, 1), (1, 0)):
            for first in range(3):
                canvas = torch.tensor([[1, 3, 3]])
                p = probabilities(model, canvas)[order[0] + 1]
                canvas[0, order[0] + 1] = first
                q = probabilities(model, canvas)[order[1] + 1]
                for second in range(3):
                    pair = (first, second) if order == (0, 1) else (second, first)
                    expected[pair] += 0.5 * p[first].item() * q[second].item()
        sampling = SamplingConfig(max_new_tokens=2, temperature=1.0, top_k=0)
        settings = DenoisingConfig(gen_steps=2, gen_remasking="random")
        out = decode_diffusion(
            model, torch.ones(draws, 1, dtype=torch.long), sampling, settings, torch.Generator().manual_seed(0)
        )
    counts = Counter(tuple(row) for row in out.tokens[:, 1:].tolist())
    chi_squared = sum((counts[pair] - draws * p) ** 2 / (draws * p) for pair, p in expected.items())
    assert sum(expected.values()) == pytest.approx(1.0) and set(counts) <= set(expected)
    assert chi_squared < 26.1  # 8 degrees of freedom, 0.1 %


def probabilities(model, canvas):
    return model(canvas)[0].index_fill(-1, torch.tensor([3]), -math.inf).double().softmax(-1)


def test_sampling_follows_the_tempered_softmax_and_reports_the_plain_probability():
    logits, generator = torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.Generator().manual_seed(0)
    for temperature, top_k in ((1.0, 0), (0.5, 0), (2.0, 3)):
        tokens, confidence = sample_tokens(logits.expand(100_000, 4), temperature, top_k, generator)
        scaled = logits / temperature
        if top_k:
            scaled = scaled.masked_fill(scaled < scaled.sort(descending=True).values[top_k - 1], -math.inf)
        frequency = torch.bincount(tokens, minlength=4) / 100_000
        torch.testing.assert_close(frequency, scaled.softmax(0), rtol=0, atol=0.006)
        torch.testing.assert_close(confidence, logits.softmax(0)[tokens])


def test_temperature_zero_is_argmax_and_small_temperatures_approach_it():
    logits = torch.randn(500, 30)
    assert torch.equal(sample_tokens(logits)[0], logits.argmax(-1))
    assert (sample_tokens(logits, 1e-4)[0] == logits.argmax(-1)).all()


def test_rare_tokens_can_be_drawn():
    """float32 noise would cap the Gumbel near 16.6 and lose the tail; a token of probability 1e-4 must appear."""
    logits = torch.zeros(2)
    logits[1] = math.log(1e-4)
    tokens, _ = sample_tokens(logits.expand(200_000, 2), 1.0, 0, torch.Generator().manual_seed(0))
    assert 5 <= int(tokens.sum()) <= 45


def test_ties_are_committed_from_the_left():
    step = Step(torch.full((1, 5), 0.5), torch.tensor([[True, False, True, True, True]]), 2, None)
    assert commit("low_confidence", step).tolist() == [[True, False, True, False, False]]


def test_decoders_refuse_the_other_kind_and_too_long_canvases(tiny_model):
    prompt = torch.ones(1, 60, dtype=torch.long)
    with pytest.raises(ValueError, match="eval_diffusion"):
        decode_autoregressive(tiny_model(attention="full"), prompt[:, :2], GREEDY)
    with pytest.raises(ValueError, match="eval_minimind"):
        decode_diffusion(tiny_model(), prompt[:, :2], GREEDY, DenoisingConfig())
    with pytest.raises(ValueError, match="at most 64"):
        decode_autoregressive(tiny_model(), prompt, GREEDY)
    with pytest.raises(ValueError, match="at most 64"):
        decode_diffusion(tiny_model(attention="full"), prompt, GREEDY, DenoisingConfig())
