import itertools

import pytest
import torch

from model import cpu_attention
from model.attention import Visibility, attend, block_causal_mask, document_mask, visibility
from model.cpu_attention import EXPLICIT_ATTENTION_KEYS, explicit_attention, explicit_attention_backward
from tests.model.precision import require_same_in_bfloat16

MASKS = {
    "none": (None, False),
    "causal": (None, True),
    "documents": (document_mask(torch.tensor([[0] * 4 + [1] * 5, [0] * 9, [0] * 3 + [-1] * 6])), False),
    "one for all rows": (block_causal_mask(9, 2), False),
    "keys": (document_mask(torch.tensor([[0] * 4 + [1] * 5]))[:, :, :1], False),
}


def examples(dtype, heads=(4, 2)):
    """q (3, H, 9, 8), k and v (3, H_kv, 9, 8), an upstream gradient; queries as the model hands them on, transposed."""
    made = [torch.randn(3, 9, h, 8).to(dtype).requires_grad_() for h in (heads[0], heads[1], heads[1])]
    return made, torch.randn(3, heads[0], 9, 8).to(dtype)


def run(inputs, upstream, mask):
    q, k, v = (x.transpose(1, 2) for x in inputs)
    x = torch.zeros(3, 9, 1, dtype=q.dtype)
    out = attend(q, k, v, visibility(*mask, x))
    return out, torch.autograd.grad(out, inputs, upstream)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scores_per_chunk", [1, 10**6])
def test_explicit_attention_and_its_gradient_are_those_of_the_fused_kernel(mask, scores_per_chunk, monkeypatch):
    """In bfloat16 as near to float32 as 8 bits allow; a chunk may hold one row or all."""
    monkeypatch.setattr(cpu_attention, "CHUNK_OF_SCORES", scores_per_chunk)
    inputs, upstream = examples(torch.bfloat16)
    exact, gradients = run([x.detach().float().requires_grad_() for x in inputs], upstream.float(), MASKS[mask])
    found, ours = run(inputs, upstream, MASKS[mask])
    assert found.dtype == torch.bfloat16
    for made, right in zip((found, *ours), (exact, *gradients), strict=True):
        assert (made.float() - right).norm() < 0.01 * right.norm()
    with torch.no_grad():
        torch.testing.assert_close(run_forward(inputs, MASKS[mask]), found, rtol=0.02, atol=0.02)


def run_forward(inputs, mask):
    q, k, v = (x.detach().transpose(1, 2) for x in inputs)
    return attend(q, k, v, visibility(*mask, torch.zeros(3, 9, 1, dtype=q.dtype)))


def test_the_operation_itself_is_exact_and_its_gradient_that_of_differences():
    """In float64, which `attend` never gives it."""
    q, k, v = (torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.zeros(2, 1, 5, 5, dtype=torch.float64).masked_fill(~block_causal_mask(5, 2), -torch.inf)
    for some in (None, bias):
        out, p = explicit_attention(q, k, v, some)
        fused = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=some)
        torch.testing.assert_close(out, fused, rtol=1e-5, atol=1e-6)  # the softmax is in float32
        torch.testing.assert_close(p.sum(dim=-1), torch.ones(2, 2, 5, dtype=torch.float64))
        wanted = torch.autograd.grad(fused.square().sum(), (q, k, v))
        for made, right in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), wanted, strict=True):
            torch.testing.assert_close(made, right, rtol=1e-4, atol=1e-5)


def test_compilers_are_told_the_shapes_that_the_operations_give():
    q, k, v = (torch.randn(2, 2, 5, 4, dtype=torch.float64).transpose(0, 1).requires_grad_() for _ in range(3))
    torch.library.opcheck(explicit_attention, (q, k, v, None), test_utils=("test_schema", "test_faketensor"))
    p = explicit_attention(q, k, v, None)[1].detach()
    inputs = (torch.randn_like(q), q.detach(), k.detach(), v.detach(), p)
    torch.library.opcheck(explicit_attention_backward, inputs, test_utils=("test_schema", "test_faketensor"))


def test_a_mask_becomes_a_bias_only_for_explicit_attention():
    for dtype, length in itertools.product((torch.float32, torch.bfloat16), (9, EXPLICIT_ATTENTION_KEYS + 1)):
        mask = block_causal_mask(length, 1)
        visible = visibility(mask, False, torch.zeros(1, length, 1, dtype=dtype))
        if dtype == torch.bfloat16 and length == 9:
            assert visible.attn_mask is None and torch.equal(visible.bias == 0, mask)
        else:
            assert visible == Visibility(mask)
    x, mask = torch.zeros(1, 9, 1), block_causal_mask(9, 1)
    with torch.autocast("cpu", torch.bfloat16):
        visible = visibility(None, True, x)
    assert not visible.is_causal and visible.bias.dtype == torch.bfloat16
    assert torch.equal(visible.bias, torch.zeros(1, 1, 9, 9).masked_fill(~mask, -torch.inf).bfloat16())
    assert visibility(None, True, x) == Visibility(is_causal=True)
    assert visibility(None, False, x.bfloat16()) == Visibility()


@pytest.mark.parametrize("kind", ["causal", "documents"])
def test_a_model_in_bfloat16_has_the_logits_and_gradients_of_float32_within_its_precision(kind, tiny_model):
    model, ids = tiny_model().train(), torch.randint(24, (3, 9))
    require_same_in_bfloat16(model, ids, attn_mask=MASKS[kind][0], is_causal=MASKS[kind][1])
