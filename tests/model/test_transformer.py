import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from model.attention import block_causal_mask, document_mask
from model.config import ModelConfig
from model.kv_cache import ColumnCache, KVCache
from model.transformer import Transformer
from scripts.engine.training.compiling import CXX_COMPILERS, compile_layers

CASES = {
    "plain": {},
    "grouped-query": {"num_key_value_heads": 2},
    "one key head, tied": {"num_key_value_heads": 1, "tie_embeddings": True},
    "relu": {"hidden_act": "relu"},
    "yarn beyond its original context": {"inference_rope_scaling": True, "rope_original_length": 8, "rope_theta": 1e4},
    "yarn, default base": {"inference_rope_scaling": True, "rope_original_length": 16, "num_key_value_heads": 2},
    "qk-norm": {"qk_norm": True, "num_key_value_heads": 2},
    "qk-norm, tied, yarn": {
        "qk_norm": True,
        "tie_embeddings": True,
        "inference_rope_scaling": True,
        "rope_original_length": 8,
    },
}


def stock_twin(model: Transformer):
    """transformers' own Llama or Qwen3 with the same weights."""
    c = model.config
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.inference_rope_scaling:
        rope = {
            "rope_type": "yarn",
            "rope_theta": c.rope_theta,
            "factor": c.rope_factor,
            "original_max_position_embeddings": c.rope_original_length,
        }
    shared = dict(
        hidden_size=c.hidden_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        intermediate_size=c.intermediate_size,
        vocab_size=c.vocab_size,
        rms_norm_eps=c.rms_norm_eps,
        hidden_act=c.hidden_act,
        tie_word_embeddings=c.tie_embeddings,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_position_embeddings,
        rope_parameters=rope,
        attn_implementation="eager",
    )
    twin = Qwen3ForCausalLM(Qwen3Config(**shared)) if c.qk_norm else LlamaForCausalLM(LlamaConfig(**shared))
    weights = {
        ("" if name.startswith("lm_head") else "model.") + name: tensor for name, tensor in model.state_dict().items()
    }
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert not missing and not unexpected
    return twin.eval()


@pytest.mark.parametrize("case", CASES)
def test_causal_logits_equal_those_of_stock_transformers(case, tiny_model):
    model = tiny_model(**CASES[case])
    for norm in [m for m in model.modules() if isinstance(m, torch.nn.RMSNorm)]:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)  # all ones would hide a norm in the wrong place
    ids = torch.randint(model.config.vocab_size, (3, 40))
    with torch.no_grad():
        ours, theirs = model(ids, is_causal=True), stock_twin(model)(ids).logits
    assert ours.abs().max() > 1  # the comparison is of something
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_yarn_leaves_sequences_within_the_original_context_plain(tiny_model):
    plain, stretched = tiny_model(), tiny_model(inference_rope_scaling=True, rope_original_length=16)
    stretched.load_state_dict(plain.state_dict())
    ids = torch.randint(24, (2, 9))
    for context, equal in ((16, True), (17, False)):
        stretched.set_context(context)
        assert torch.allclose(plain(ids), stretched(ids), rtol=0, atol=0) == equal


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 2, "qk_norm": True}, {"inference_rope_scaling": True, "rope_original_length": 8}],
)
def test_cached_equals_recomputed_token_by_token_and_in_chunks(changes, tiny_model):
    model = tiny_model(**changes)
    ids = torch.randint(24, (2, 12))
    whole = model(ids, is_causal=True)
    for chunks in ([1] * 12, [5, 1, 6], [12], [3, 4, 5]):
        cache, start = KVCache(model.config, 2, 12), 0
        for size in chunks:
            part = model(ids[:, start : start + size], is_causal=True, cache=cache)
            cache.advance(size)
            torch.testing.assert_close(part, whole[:, start : start + size], rtol=1e-5, atol=1e-5)
            start += size


def test_tokens_written_again_replace_the_current_ones_in_the_cache(tiny_model):
    """A block is denoised many times over one prefix: earlier versions of it must leave no trace."""
    model, cache = tiny_model(), None
    ids = torch.randint(24, (1, 8))
    mask = block_causal_mask(8, 4)[:, :, 4:]
    cache = KVCache(model.config, 1, 8)
    model(ids[:, :4], cache=cache)
    cache.advance(4)
    for _ in range(3):
        model(torch.randint(24, (1, 4)), attn_mask=mask, cache=cache)
    cached = model(ids[:, 4:], attn_mask=mask, cache=cache)
    torch.testing.assert_close(cached, model(ids, attn_mask=block_causal_mask(8, 4))[:, 4:], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="holds 8 positions"):
        model(ids[:, :5], cache=cache)


def test_columns_are_cached_for_rows_at_different_places(tiny_model):
    """Rows feed different columns, padded to the widest; one is left out of a pass, another one leaves for good."""
    model, ids = tiny_model(num_key_value_heads=2), torch.randint(24, (3, 8))
    whole, cache = model(ids, is_causal=True), ColumnCache(model.config, 3, 8)

    def fed(row_ids, spans, aimed=None):
        """Logits of causal passes; spans: row -> (first, last)."""
        width, stop = max(last - first for first, last in spans), max(last for _, last in spans)
        columns = torch.tensor([[c if c < last else 8 for c in range(f, f + width)] for f, last in spans])
        attn_mask = (columns[:, :, None] >= torch.arange(stop))[:, None]
        tokens = row_ids.gather(1, columns.clamp(max=7))
        view = cache.view(aimed, columns, stop)
        return model(tokens, position_ids=columns, attn_mask=attn_mask, cache=view)

    def check(found, rows, spans):
        for one, row, (first, last) in zip(found, rows, spans, strict=True):
            torch.testing.assert_close(one[: last - first], whole[row, first:last], rtol=1e-5, atol=1e-5)

    check(fed(ids, spans := [(0, 5), (0, 2), (0, 3)]), range(3), spans)
    fed((ids + 1) % 24, [(5, 6), (2, 6), (3, 4)])  # overwritten below
    check(fed(ids[[0, 2]], spans := [(5, 7), (3, 6)], torch.tensor([0, 2])), (0, 2), spans)
    cache.keep(torch.tensor([1, 2]))
    check(fed(ids[1:], spans := [(2, 8), (6, 8)]), (1, 2), spans)
    view, attn_mask = cache.view(None, slice(6, 8), 8), block_causal_mask(8, 1)[:, :, 6:]
    last = model(ids[1:, 6:], position_ids=torch.tensor([[6, 7]]), attn_mask=attn_mask, cache=view)
    check(last, (1, 2), [(6, 8)] * 2)


def test_selected_positions_have_the_logits_of_the_dense_head(tiny_model):
    model = tiny_model()
    ids = torch.randint(24, (3, 7))
    select = torch.tensor([0, 6, 7, 20])
    torch.testing.assert_close(model(ids, select=select), model(ids).flatten(0, 1)[select])


def test_default_shape_has_32_million_parameters():
    with torch.device("meta"):
        assert Transformer(ModelConfig()).num_parameters() == pytest.approx(32e6, rel=0.01)


@pytest.mark.parametrize(
    "wrong",
    [{"hidden_size": 30}, {"num_key_value_heads": 3}, {"num_hidden_layers": 0}, {"hidden_size": 12}, {"dropout": 1.0}],
)
def test_impossible_shapes_are_refused(wrong):
    with pytest.raises(ValueError, match="--"):
        ModelConfig(**{"hidden_size": 32, "num_attention_heads": 4, **wrong})


def test_sequences_past_the_longest_are_refused(tiny_model):
    with pytest.raises(ValueError, match="at most 64"):
        tiny_model()(torch.zeros(1, 65, dtype=torch.long))


def test_yarn_is_decided_by_the_context_that_is_declared(tiny_model):
    model, ids = tiny_model(inference_rope_scaling=True, rope_original_length=8), torch.randint(24, (1, 20))
    stretched = model(ids)  # the longest context that the model accepts
    model.set_context(8)
    plain = tiny_model()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(ids), plain(ids)) and not torch.allclose(model(ids), stretched)


def test_only_relative_positions_matter(tiny_model):
    """So a document may stand anywhere in a packed row, and [x_t, x_0] may repeat its positions."""
    model, ids = tiny_model(), torch.randint(24, (1, 9))
    shifted = model(ids, position_ids=torch.arange(9)[None] + 21)
    torch.testing.assert_close(shifted, model(ids), rtol=1e-4, atol=1e-4)
    repeated = model(torch.cat([ids, ids], dim=1), position_ids=torch.arange(9).repeat(2)[None])
    torch.testing.assert_close(repeated[:, :9], repeated[:, 9:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", [1, 3])
def test_what_is_not_selected_is_attended_to_all_the_same(layers, tiny_model):
    """The last layer computes selected positions alone: their logits, and all gradients, are those of the whole."""
    model, ids = tiny_model(num_hidden_layers=layers), torch.randint(4, 24, (3, 7))
    chosen = torch.tensor([0, 3, 9, 20])
    whole = model(ids).flatten(0, 1)[chosen]
    some = model(ids, select=chosen)
    torch.testing.assert_close(some, whole)
    parameters = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), parameters) for x in (some, whole)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    hidden = model(ids, select=chosen, head=False)
    torch.testing.assert_close(model.lm_head(hidden), whole)


@pytest.mark.skipif(not any(map(shutil.which, CXX_COMPILERS)), reason="there is nothing to compile with")
def test_compiled_layers_have_the_values_and_gradients_of_eager_ones(tiny_model):
    """In bfloat16 with packed documents, as in training, within its precision."""
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = tiny_model(num_hidden_layers=1).train()
        if compiled:
            compile_layers(model)
        mask, ids = document_mask(torch.arange(12).expand(2, -1) // 5), torch.arange(24).view(2, 12)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids, attn_mask=mask, select=torch.tensor([0, 5, 20]))
        logits = logits.float()
        results.append((logits, *torch.autograd.grad(logits.square().mean(), list(model.parameters()))))
    for eager, made in zip(*results, strict=True):
        assert (made - eager).norm() < 0.03 * eager.norm() + 1e-6
