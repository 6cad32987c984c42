import math
import random

import pytest
import torch

from model.decoding.sampling import FEW_ROWS, STRIDE, Draw, guide, noise_width, penalise_repeats, sample_tokens


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_sampling_follows_the_tempered_softmax_and_reports_the_plain_probability():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    for temperature, top_k in ((1.0, 0), (0.5, 0), (2.0, 3), (1.0, 9)):
        tokens, confidence = sample_tokens(
            logits.expand(100_000, 4), temperature, top_k, uniform=noise(100_000, noise_width(4, top_k))
        )
        scaled = logits / temperature
        if top_k:
            scaled = scaled.masked_fill(scaled < scaled.sort(descending=True).values[min(top_k, 4) - 1], -math.inf)
        frequency = torch.bincount(tokens, minlength=4) / 100_000
        torch.testing.assert_close(frequency, scaled.softmax(0), rtol=0, atol=0.006)
        torch.testing.assert_close(confidence, logits.softmax(0)[tokens])


def test_temperature_zero_is_argmax_and_small_temperatures_approach_it():
    logits = torch.randn(500, 30)
    assert torch.equal(sample_tokens(logits)[0], logits.argmax(-1))
    assert (sample_tokens(logits, 1e-4, uniform=noise(500, 30))[0] == logits.argmax(-1)).all()


@pytest.mark.parametrize("size", [STRIDE // 2, STRIDE, 3 * STRIDE, 3 * STRIDE + 1])
@pytest.mark.parametrize("number", [1, FEW_ROWS - 1, FEW_ROWS, 300])
def test_the_likeliest_is_the_first_of_equals_and_its_probability_that_of_the_softmax(number, size):
    logits = torch.randint(4, (number, size)).float() * 2  # ties in most rows, within and between strides
    logits[:, 0] = -math.inf
    logits[0] = 3.0
    tokens, confidence = sample_tokens(logits)
    first = [row.index(max(row)) for row in logits.tolist()]
    assert tokens.tolist() == first
    expected = logits.double().softmax(-1)[torch.arange(number), first].float()
    torch.testing.assert_close(confidence, expected)


def test_the_noise_keeps_the_precision_of_float64():
    """A Gumbel of 27.6, from a number that float32 would round to 1: it outweighs 27 nats, not 28.5."""
    uniform = torch.tensor([[0.5, 1 - 1e-12]], dtype=torch.float64)
    for logit, chosen in ((-27.0, 1), (-28.5, 0)):
        assert sample_tokens(torch.tensor([[0.0, logit]]), 1.0, uniform=uniform)[0].item() == chosen
        assert sample_tokens(torch.tensor([[0.0, logit]]), 1.0, 2, 1 - 1e-15, uniform)[0].item() == chosen


def fewest(p: list[float], mass: float) -> set[int]:
    """The fewest tokens that hold `mass`, written with a loop."""
    order, total, kept = sorted(range(len(p)), key=lambda i: -p[i]), 0.0, set()
    for token in order:
        kept.add(token)
        total += p[token]
        if total >= mass:
            break
    return kept


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.8])
@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.6, 0.9, 0.999])
def test_top_p_keeps_the_fewest_tokens_that_hold_the_mass(top_p, top_k, temperature):
    """Of the tempered distribution, after top-k; and what is kept is drawn in the same proportions."""
    draws, logits = 20_000, torch.randn(9, generator=torch.Generator().manual_seed(3)) * 1.5
    tokens, _ = sample_tokens(logits.expand(draws, 9), temperature, top_k, top_p, noise(draws, noise_width(9, top_k)))
    p = (logits.double() / temperature).softmax(0)
    if top_k:
        p = p * (p >= p.sort(descending=True).values[top_k - 1])
        p = p / p.sum()
    kept = fewest(p.tolist(), top_p)
    expected = torch.tensor([p[i] if i in kept else 0.0 for i in range(9)])
    frequency = torch.bincount(tokens, minlength=9) / draws
    assert {i for i in range(9) if frequency[i] > 0} <= kept
    torch.testing.assert_close(frequency, (expected / expected.sum()).float(), rtol=0, atol=0.018)


def test_top_p_is_exact_where_a_set_holds_just_the_mass():
    """Half the mass is one token, a little more are two; two of four equal tokens hold exactly half."""
    unequal, equal = torch.tensor([0.5, 0.25, 0.1875, 0.0625]).log(), torch.zeros(4)
    for mass, size in ((0.4999, 1), (0.5001, 2), (0.74, 2), (0.7501, 3), (0.94, 4)):
        tokens, _ = sample_tokens(unequal.expand(4000, 4), 1.0, 0, mass, noise(4000, 4))
        assert set(tokens.tolist()) == set(range(size))
    tokens, _ = sample_tokens(equal.expand(4000, 4), 1.0, 0, 0.5, noise(4000, 4))
    assert len(set(tokens.tolist())) == 2


@pytest.mark.parametrize("temperature", [1e-320, 1e-6, 1e6, 1e300])
def test_an_extreme_temperature_draws_the_likeliest_or_any_token(temperature):
    logits = torch.tensor([1.0, 3.0, -math.inf, 2.0]).expand(3000, 4)
    tokens = set(sample_tokens(logits, temperature, 0, 1.0, noise(3000, 4))[0].tolist())
    assert tokens == ({1} if temperature < 1 else {0, 1, 3})


def test_forbidden_tokens_are_never_drawn():
    logits = torch.randn(5000, 6)
    logits[:, 3] = -math.inf
    for top_k, top_p in ((0, 1.0), (6, 1.0), (0, 0.99999), (6, 0.99999)):
        assert not (sample_tokens(logits, 5.0, top_k, top_p, noise(5000, 6))[0] == 3).any()


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
def test_guidance_is_the_renormalised_ratio_of_powers(scale):
    """LLaDA Eq. 16."""
    conditional, unconditional = torch.randn(40, 7), torch.randn(40, 7)
    p, q = conditional.double().softmax(-1), unconditional.double().softmax(-1)
    expected = p ** (1 + scale) / q**scale
    guided = guide(conditional, unconditional, scale).double().softmax(-1)
    torch.testing.assert_close(guided, expected / expected.sum(-1, keepdim=True), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("window", [1, 2, 5, 100])
def test_the_repetition_penalty_counts_what_was_written_nearby(window):
    draw, size, eos = random.Random(window), 6, 2
    ids = torch.tensor([[draw.randrange(size) for _ in range(12)] for _ in range(30)])
    written = torch.tensor([[draw.random() < 0.6 for _ in range(12)] for _ in range(30)])
    columns = torch.tensor([draw.randrange(12) for _ in range(30)])
    written[torch.arange(30), columns] = False
    logits = torch.randn(30, size)
    penalised = penalise_repeats(logits, ids, written, columns, Draw(0.0, 0, 1.0, 0.3, window), eos)
    for i in range(30):
        for token in range(size):
            count = sum(
                written[i, j].item() and ids[i, j].item() == token
                for j in range(12)
                if abs(j - columns[i].item()) <= window
            )
            expected = logits[i, token] - (0.0 if token == eos else 0.3 * count)
            assert penalised[i, token].item() == pytest.approx(expected.item(), abs=1e-6)
