"""A row is its own: logits, likelihood and text, whatever shares its batch, in whatever order, however it is padded.

In a batch of another shape sums are taken in another order, so that float32 logits agree to about 1e-6 of their size,
not in every bit: they are compared with CLOSE. Tokens are chosen by comparing such numbers, and are the same but where
two of them come as close as that; `assert_same_texts` then has float64 decide, where no two are.
"""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from model.attention import causal_attention
from model.block_diffusion import denoising_inputs
from model.decoding.autoregressive import SamplingConfig
from model.decoding.canvas import Canvas
from model.decoding.decode import decode
from model.decoding.denoiser import DenoisingConfig
from model.decoding.remasking import POLICIES
from model.likelihood import row_nats
from tests.model.decoding.canvases import EOS, MASK, PAD

CLOSE = {"rtol": 5e-5, "atol": 5e-5}  # of 11,000 documents the worst came to 1e-5
CONTEXT = 64
VOCABULARY = range(4, 24)

heads = st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])  # of queries, of keys and values
shapes = st.builds(
    lambda heads, head_dim, yarn, **more: {
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "hidden_size": heads[0] * head_dim,
        "inference_rope_scaling": yarn,
        "rope_original_length": 8,
        **more,
    },
    heads,
    st.sampled_from([4, 8]),
    st.booleans(),
    num_hidden_layers=st.integers(1, 3),
    tie_embeddings=st.booleans(),
    qk_norm=st.booleans(),
)
attentions = st.one_of(
    st.just({"attention": "causal"}),
    st.just({"attention": "full"}),
    st.builds(lambda size: {"attention": "block", "block_size": size}, st.integers(1, 6)),
)
seeds = st.integers(0, 2**32 - 1)


def several(examples):
    """So many random examples; a test's fixtures make models, and keep nothing."""
    fixtures = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, deadline=None, suppress_health_check=fixtures)


@pytest.fixture
def model_of(ending_model):
    """model_of(seed, changes, bias=0) -> the model of that seed, the logit of EOS raised."""

    def build(seed, changes, bias=0.0):
        torch.manual_seed(seed)
        model = ending_model(bias, **changes)
        model.set_context(CONTEXT)
        return model

    return build


# -- logits and likelihoods --------------------------------------------------------------------------------------------


def packed_rows(draw, lengths):
    """Documents of these lengths packed into rows of one width in random order: document_ids (B, L), -1 = padding, and
    where each document stands."""
    order, rows = draw.sample(range(len(lengths)), len(lengths)), [[]]
    for number in order:
        if rows[-1] and draw.random() < 0.5:
            rows.append([])
        rows[-1].append(number)
    width = max(sum(lengths[number] for number in row) for row in rows) + draw.randint(0, 4)
    documents, places = torch.full((len(rows), width), -1), {}
    for row, numbers in enumerate(rows):
        begin = 0
        for number in numbers:
            places[number] = row, slice(begin, begin + lengths[number])
            documents[places[number]] = number
            begin += lengths[number]
    return documents, [places[number] for number in range(len(lengths))]


def logits_of(model, noised, clean, documents):
    """(B, L, V) as training and likelihoods have them: of the next token, or of what stands here, given x_t."""
    if model.config.autoregressive:
        return model(clean, **causal_attention(documents, clean.shape[1]))
    every = torch.arange(clean.numel())
    ids, attention = denoising_inputs(noised, clean, documents, model.config.block_size, every)
    return model(ids, **attention).view(*clean.shape, -1)


@several(60)
@given(seed=seeds, shape=shapes, attention=attentions, lengths=st.lists(st.integers(1, 13), min_size=1, max_size=6))
@torch.no_grad()
def test_a_document_has_the_logits_that_it_has_alone(seed, shape, attention, lengths, model_of):
    """Packed with others in any order, in a batch of any size, padded with anything. What neighbours and padding say
    changes no bit."""
    model, draw = model_of(seed, shape | attention), random.Random(seed)
    documents, places = packed_rows(draw, lengths)
    clean = torch.randint(4, 24, documents.shape)
    noised = torch.where(torch.rand(documents.shape) < 0.5, MASK, clean)
    together = logits_of(model, noised, clean, documents)
    assert together.abs().max() > 0.1
    for number, (row, place) in enumerate(places):
        alone = logits_of(model, noised[row : row + 1, place], clean[row : row + 1, place], None)[0]
        torch.testing.assert_close(together[row, place], alone, **CLOSE)
        others = documents != number
        filled = (torch.where(others, torch.randint(24, clean.shape), ids) for ids in (noised, clean))
        assert torch.equal(logits_of(model, *filled, documents)[row, place], together[row, place])


@several(40)
@given(seed=seeds, shape=shapes, attention=attentions, rows=st.lists(st.integers(2, 12), min_size=1, max_size=5))
def test_a_row_is_as_likely_as_it_is_alone(seed, shape, attention, rows, model_of):
    """Exact or drawn, by any number of masks per pass, in any order and batch, with any padding."""
    model, draw = model_of(seed, shape | attention), random.Random(seed)
    texts = [torch.randint(4, 24, (length,)) for length in rows]
    begins = [draw.randrange(length) for length in rows]

    def nats(chosen, padding, together):
        place = torch.arange(max(rows[i] for i in chosen) + padding)
        lengths, begin = (torch.tensor([all_[i] for i in chosen])[:, None] for all_ in (rows, begins))
        ids = torch.randint(24, (len(chosen), len(place)))
        for row, i in enumerate(chosen):
            ids[row, : rows[i]] = texts[i]
        batch = {"input_ids": ids, "document_ids": (place < lengths).long() - 1, "row_ids": torch.tensor(chosen)}
        found = row_nats(model, batch | {"loss_mask": (place < lengths) & (place >= begin)}, 3, seed, together)
        return found.nats, found.variance, found.count

    order = draw.sample(range(len(rows)), len(rows))
    whole = nats(order, draw.randint(0, 4), draw.randint(1, 4))
    for row, i in enumerate(order):
        for found, alone in zip(whole, nats([i], 0, 1), strict=True):
            torch.testing.assert_close(found[row], alone[0], **CLOSE, equal_nan=True)


# -- texts -------------------------------------------------------------------------------------------------------------

draws = {"temp": st.sampled_from([0.0, 1.0]), "top_k": st.sampled_from([0, 5]), "top_p": st.sampled_from([1.0, 0.9])}
draws |= {"repeat_penalty": st.sampled_from([0.0, 0.5]), "repeat_window": st.integers(1, 9)}
sampling = st.builds(
    SamplingConfig, **{f"ar_{name.replace('temp', 'temperature')}": drawn for name, drawn in draws.items()}
)
denoising = st.builds(
    DenoisingConfig,
    gen_steps=st.integers(1, 12),
    gen_remasking=st.sampled_from(list(POLICIES)),
    gen_confidence_threshold=st.sampled_from([0.2, 0.9]),
    gen_factor=st.sampled_from([0.5, 2.0]),
    gen_cap_start_ratio=st.sampled_from([0.08, 1.0]),
    gen_entropy_bound=st.sampled_from([0.1, 2.0]),
    gen_penalty_lambda=st.sampled_from([0.0, 0.5]),
    gen_cfg_scale=st.sampled_from([0.0, 0.0, 0.7]),
    gen_eos=st.sampled_from(["free", "confidence", "never"]),
    gen_edit_threshold=st.sampled_from([None, 0.0, 0.1, 0.5]),
    gen_edit=st.sampled_from(["overwrite", "remask"]),
    gen_post_edits=st.integers(0, 5),
    gen_edit_blocks=st.integers(0, 2),
    **{f"gen_{name}": drawn for name, drawn in draws.items()},
)
caches = {"full": ["none", "prefix", "dual"], "block": ["none", "block"], "joint": ["none", "block"]}
in_blocks = st.sampled_from(["block", "joint"])


@st.composite
def decodings(draw):
    """What a model is like, and how it is decoded."""
    attention = draw(attentions)
    if attention["attention"] == "causal":
        return attention, draw(sampling)
    if attention["attention"] == "block":
        attention = attention | {"attention": draw(in_blocks)}
    config = replace(draw(denoising), gen_cache=draw(st.sampled_from(caches[attention["attention"]])))
    if attention["attention"] == "full":
        config = replace(config, gen_block_size=draw(st.integers(0, 5)))
    elif config.gen_cache == "block":
        config = replace(config, gen_fuse_commit=draw(st.booleans()))
    return attention, config


@st.composite
def rows_to_fill(draw, attention):
    """Rows of a canvas, None where open: prompts of nothing but BOS, of whole blocks, of one token less and more, of
    any length, one that fills the context perhaps; or, for diffusion, texts with blanks."""
    size, token = attention.get("block_size", 0) or 4, st.sampled_from(VOCABULARY)
    blanks = attention["attention"] != "causal" and draw(st.booleans())
    num_new, rows = draw(st.integers(1, 9)), []
    lengths = st.one_of(st.sampled_from([1, size - 1, size, size + 1, 2 * size, CONTEXT - num_new]), st.integers(1, 12))
    for length in draw(st.lists(lengths, min_size=2, max_size=5)):
        row = [1, *draw(st.lists(token, min_size=max(length, 1) - 1, max_size=max(length, 1) - 1))]
        if blanks:
            holes = draw(st.lists(st.booleans(), min_size=len(row) - 1, max_size=len(row) - 1))
            row = [1, *(None if hole else given for given, hole in zip(row[1:], holes, strict=True)), None, EOS]
            rows.append(row[:CONTEXT])
        else:
            rows.append([*row, *[None] * num_new])
    return rows, not blanks


def texts(model, rows, may_end, config, chosen):
    """Per row, of those chosen, in that order: all that decoding says of it. Row i has the seed 100 + i."""
    canvas = Canvas.from_rows([rows[i] for i in chosen], model.config, "cpu", may_end)
    found = decode(model, canvas, config, [100 + i for i in chosen])
    ids = found.ids.tolist()
    for i, one in zip(chosen, ids, strict=True):
        assert set(one[len(rows[i]) :]) <= {PAD}
    told = zip(chosen, ids, found.new, found.ended, found.row_passes, found.row_edits or chosen, strict=True)
    return {i: (one[: len(rows[i])], *more) for i, one, *more in told}


def assert_same_texts(model, rows, may_end, config, groups):
    """Each row's is the same in every group of rows that are decoded together; where it is not in float32, because two
    numbers are as close as rounding, it is in float64."""

    def differing():
        found = [texts(model, rows, may_end, config, group) for group in groups]
        return [(i, one[i], found[0][i]) for one in found[1:] for i in one if one[i] != found[0][i]]

    if apart := differing():
        note(f"in float32: {apart}")
        model.double()
        assert not differing()


@several(120)
@given(data=st.data(), seed=seeds, shape=shapes, decoding=decodings(), bias=st.sampled_from([0.0, 2.0, 5.0]))
def test_a_text_is_the_one_that_is_written_alone(data, seed, shape, decoding, bias, model_of):
    """Token ids, end and passes, greedy or sampled with the row's seed: in any batch, order and padding."""
    attention, config = decoding
    rows, may_end = data.draw(rows_to_fill(attention))
    model, draw = model_of(seed, shape | attention, bias), random.Random(seed)
    everyone = range(len(rows))
    some = draw.sample(everyone, draw.randint(1, len(rows)))
    groups = [everyone, draw.sample(everyone, len(rows)), some, *([i] for i in everyone)]
    assert_same_texts(model, rows, may_end, config, groups)
