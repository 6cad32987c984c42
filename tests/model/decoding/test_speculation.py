"""Self-speculation: the text is the autoregressive one, whatever was drafted; and drafts are of use."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.decoding.autoregressive import SamplingConfig
from model.decoding.canvas import Canvas
from model.decoding.decode import decode
from model.decoding.denoiser import DenoisingConfig
from model.decoding.remasking import SELF_SPECULATIVE
from model.decoding.speculation import SpeculativeDecoder, num_accepted
from tests.model.decoding.canvases import EOS, MASK, PROMPTS, continuing, infilling, spied, steps_of

DRAFTED = DenoisingConfig(gen_temp=0.0, gen_repeat_penalty=0.0, gen_remasking=SELF_SPECULATIVE)
draws = {
    "temperature": st.sampled_from([0.0, 0.0, 1.0]),
    "top_k": st.sampled_from([0, 5]),
    "top_p": st.sampled_from([1.0, 0.9]),
    "repeat_penalty": st.sampled_from([0.0, 0.5]),
    "repeat_window": st.integers(1, 9),
}
draws = st.fixed_dictionaries(draws)


@pytest.fixture
def drafting_model(ending_model):
    """drafting_model(size, likeness=1, bias=0): a joint model whose drafts are right the more often, the more alike the
    embeddings of all tokens are; the logit of EOS is raised by `bias`."""

    def build(size, likeness=1.0, bias=0.0, **changes):
        model = ending_model(bias, attention="joint", block_size=size, **changes)
        with torch.no_grad():
            weight = model.embed_tokens.weight
            weight.copy_((1 - likeness) * weight + likeness * weight[5])
        return model

    return build


def autoregressive(model, canvas, config, seeds):
    """The text of the same weights, declared causal."""
    joint = model.config
    model.config = joint.as_kind("autoregressive")
    try:
        return decode(model, canvas, config, seeds)
    finally:
        model.config = joint


def both(model, prompts, num_new, draw):
    """Text by speculation, in one batch; and autoregressively, in another one of the same rows."""
    config = replace(DRAFTED, **{f"gen_{name.replace('temperature', 'temp')}": value for name, value in draw.items()})
    drafted = decode(model, continuing(model, prompts, num_new), config, range(len(prompts)))
    sampling = SamplingConfig(**{f"ar_{name}": value for name, value in draw.items()})
    plain = [autoregressive(model, continuing(model, [p], num_new), sampling, [i]) for i, p in enumerate(prompts)]
    return drafted, plain


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 6),
    likeness=st.sampled_from([0.0, 0.6, 0.85]),
    bias=st.sampled_from([0.0, 2.0, 4.0]),
    lengths=st.lists(st.integers(1, 13), min_size=1, max_size=4),
    num_new=st.integers(1, 14),
    draw=draws,
    yarn=st.booleans(),
)
def test_the_text_is_the_autoregressive_one_token_for_token(
    seed, size, likeness, bias, lengths, num_new, draw, yarn, drafting_model
):
    """Greedy, or drawn with the same seed; any block size, prompts of any length, in a batch, with EOS and penalty. In
    float64, where no two numbers are as close as rounding."""
    torch.manual_seed(seed)
    changes = {"inference_rope_scaling": yarn, "rope_original_length": 8, "num_key_value_heads": 2}
    model = drafting_model(size, likeness, bias, **changes).double()
    model.set_context(64)
    prompts = [[1, *torch.randint(4, 24, (length - 1,)).tolist()] for length in lengths]
    drafted, plain = both(model, prompts, num_new, draw)
    assert drafted.new == [one.new[0] for one in plain] and drafted.ended == [one.ended[0] for one in plain]
    for new, passes, tried, kept in zip(
        drafted.new, drafted.row_passes, drafted.row_drafted, drafted.row_accepted, strict=True
    ):
        # A pass writes the drafts that it keeps and one token more, unless a draft ends the text.
        assert len(new) <= passes + kept <= len(new) + 1 and kept <= tried <= passes * (size - 1)


def accept_everything(draft, verified):
    return min(len(draft), len(verified))


@pytest.mark.parametrize("likeness", [0.6, 0.85])
def test_drafts_are_of_use_and_a_wrong_rule_of_acceptance_is_noticed(likeness, drafting_model, monkeypatch):
    model, greedy = drafting_model(4, likeness), {"temperature": 0.0, "repeat_penalty": 0.0}
    drafted, plain = both(model, PROMPTS, 20, greedy)
    assert 0 < sum(drafted.row_accepted) < sum(drafted.row_drafted)
    assert sum(drafted.row_passes) < 0.8 * sum(map(len, drafted.new))
    monkeypatch.setattr("model.decoding.speculation.num_accepted", accept_everything)
    wrong, _ = both(model, PROMPTS, 20, greedy)
    assert wrong.new != drafted.new == [one.new[0] for one in plain]


def test_a_draft_that_is_always_right_takes_a_pass_for_a_block(drafting_model):
    """The first pass reads the prompt, writes a token and drafts the rest of its block; each later one writes a block,
    and the last of them drafts nothing."""
    model = drafting_model(4, likeness=1.0)
    for new in (1, 2, 4, 5, 8, 9, 17):
        decoded = decode(model, continuing(model, [[1, 7, 8]], new), replace(DRAFTED, gen_eos="never"), [0])
        assert decoded.num_forward_passes == 1 + math.ceil((new - 1) / 4)
        assert decoded.row_accepted == decoded.row_drafted and len(decoded.new[0]) == new


@pytest.mark.parametrize("rule", [num_accepted, accept_everything])
@pytest.mark.parametrize("top_k", [0, 2])
@torch.no_grad()
def test_sampling_keeps_the_joint_distribution(top_k, rule, drafting_model, monkeypatch):
    """Chi-squared of 2,500 texts of up to 4 tokens against their probabilities, enumerated with causal passes."""
    monkeypatch.setattr("model.decoding.speculation.num_accepted", rule)
    model, draws = drafting_model(3, 0.0), 2500
    allowed = torch.full((24,), -1e9).index_fill(0, torch.tensor([4, 5]), 0.0)
    allowed[EOS] = -1.0
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + allowed)

    probabilities = {}
    for text in itertools.chain.from_iterable(itertools.product([EOS, 4, 5], repeat=n) for n in range(1, 5)):
        if EOS in text[:-1] or (len(text) < 4 and text[-1] != EOS):
            continue
        logits = model(torch.tensor([[1, *text]]), is_causal=True)[0, :-1]
        kept = logits if not top_k else logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
        p = kept.double().softmax(dim=-1).gather(1, torch.tensor(text)[:, None])
        probabilities[text] = float(p.prod())
    assert sum(probabilities.values()) == pytest.approx(1)

    config = replace(DRAFTED, gen_temp=1.0, gen_top_k=top_k)
    decoded = decode(model, continuing(model, [[1]] * draws, 4), config, range(draws))
    counts = Counter(map(tuple, decoded.new))
    likely = {text: draws * p for text, p in probabilities.items() if draws * p >= 5}
    rest = draws - sum(likely.values()), draws - sum(counts[text] for text in likely)
    chi_squared = sum((counts[text] - n) ** 2 / n for text, n in likely.items())
    chi_squared += (rest[1] - rest[0]) ** 2 / max(rest[0], 5)
    limit = len(likely) + 4.5 * math.sqrt(2 * len(likely))  # mean and deviations of chi-squared
    assert (chi_squared < limit) == (rule is num_accepted), chi_squared
    assert sum(decoded.row_accepted) > 0.05 * sum(decoded.row_drafted) > 0


def test_each_step_tells_what_it_wrote_and_took_back(drafting_model, monkeypatch):
    model = drafting_model(4, 0.8)
    calls = spied(model, monkeypatch)
    decoded, steps = steps_of(model, continuing(model, num_new=20), DRAFTED)
    rejected = taken_back = 0
    for step in steps:
        wrong = step.rejected != MASK
        taken_back += int(wrong.sum())
        # The first one of a row gave way to the token that is written there; nothing was written for the others.
        for row in wrong.any(dim=1).nonzero()[:, 0].tolist():
            first = int(wrong[row].int().argmax())
            assert step.written[row, first] and step.ids[row, first] != step.rejected[row, first]
            assert not step.written[row, first + 1 :].any()
            rejected += 1
    assert rejected > 5 and steps[-1].num_forward_passes == len(calls) == decoded.num_forward_passes
    assert (steps[-1].num_drafted, steps[-1].num_accepted) == (sum(decoded.row_drafted), sum(decoded.row_accepted))
    assert taken_back == sum(decoded.row_drafted) - sum(decoded.row_accepted)


def test_what_it_cannot_do_is_refused(drafting_model, tiny_model):
    model = drafting_model(4)
    for attention, size in (("full", 0), ("block", 4)):
        other = tiny_model(attention=attention, block_size=size)
        with pytest.raises(ValueError, match="needs a joint checkpoint"):
            decode(other, continuing(other), DRAFTED, range(5))
    with pytest.raises(ValueError, match="--gen-eos confidence is not for"):
        decode(model, continuing(model), replace(DRAFTED, gen_eos="confidence"), range(5))
    with pytest.raises(ValueError, match="another policy"):
        SpeculativeDecoder(model, infilling(model), DRAFTED, range(3))
    assert decode(model, Canvas.infilling([[1, 5, 2]], model.config), DRAFTED, [0]).new == [[]]
