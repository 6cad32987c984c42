import math

import pytest
import torch

from model import losses
from model.losses import forbid, linear_nats, token_nats


def example(dtype=torch.float32):
    """hidden (40, 8), weight (11, 8), targets (40,), an upstream gradient (40,) of very unequal size."""
    hidden = torch.randn(40, 8, dtype=dtype).mul_(2).requires_grad_()
    weight = torch.randn(11, 8, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(0, 10, (40,)), torch.rand(40) ** 4 * 30


def by_autograd(hidden, weight, targets, forbidden):
    logits = hidden @ weight.T
    return token_nats(logits if forbidden is None else forbid(logits, forbidden), targets)


@pytest.mark.parametrize("forbidden", [None, 10])
@pytest.mark.parametrize("rows_per_chunk", [1, 7, 40, 100])
def test_nats_and_both_gradients_are_those_of_the_dense_logits(forbidden, rows_per_chunk, monkeypatch):
    monkeypatch.setitem(losses.CHUNK_OF_LOGITS, "cpu", rows_per_chunk * 11)
    hidden, weight, targets, upstream = example()
    found, expected = (f(hidden, weight, targets, forbidden) for f in (linear_nats, by_autograd))
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected, (hidden, weight), upstream)
    for made, right in zip(torch.autograd.grad(found, (hidden, weight), upstream), wanted, strict=True):
        torch.testing.assert_close(made, right, atol=1e-5, rtol=1e-5)
    if forbidden is not None:
        assert not wanted[1][forbidden].any() and found.isfinite().all()


def test_in_bfloat16_the_gradients_are_as_near_to_the_exact_ones_as_autograds():
    hidden, weight, targets, upstream = example(torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    upstream64 = upstream.double()
    nats = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, targets, reduction="none")
    wanted = torch.autograd.grad(nats, exact, upstream64)
    with torch.autocast("cpu", torch.bfloat16):
        found, usual = (f(hidden, weight, targets, None) for f in (linear_nats, by_autograd))
    torch.testing.assert_close(found.double(), nats, atol=0.1, rtol=0.01)
    errors = [
        [float((g.double() - w).norm() / w.norm()) for g, w in zip(grads, wanted, strict=True)]
        for grads in (torch.autograd.grad(x, (hidden, weight), upstream) for x in (found, usual))
    ]
    assert all(ours < 1.3 * theirs + 1e-4 and ours < 0.01 for ours, theirs in zip(*errors, strict=True))


def test_autocast_gives_float32_parameters_float32_gradients():
    hidden, weight, targets, upstream = example()
    with torch.autocast("cpu", torch.bfloat16):
        nats = linear_nats(hidden, weight, targets, 10)
    gradients = torch.autograd.grad(nats, (hidden, weight), upstream)
    assert nats.dtype == torch.float32 and all(g.dtype == torch.float32 for g in gradients)
    for made, right in zip(
        gradients,
        torch.autograd.grad(by_autograd(hidden, weight, targets, 10), (hidden, weight), upstream),
        strict=True,
    ):
        assert (made - right).norm() < 0.02 * right.norm()


def test_only_one_copy_of_the_logits_is_kept_and_none_without_a_gradient():
    """Bytes saved for the backward pass: (N, V) entries of the products' dtype, and inputs; nothing in float32."""
    hidden, weight, targets, _ = example()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        with torch.autocast("cpu", torch.bfloat16):
            linear_nats(hidden, weight, targets)
        assert sum(x.numel() for x in kept if x.shape == (40, 11)) == 440
        assert all(x.dtype == torch.bfloat16 for x in kept)
        kept.clear()
        linear_nats(hidden.detach(), weight.detach(), targets)
    assert not kept


def test_a_target_of_no_probability_costs_its_finite_logarithm():
    """1 - p rounds to 1 and p underflows: log-softmax, not the logarithm of a softmax."""
    hidden, weight = torch.tensor([[200.0]]), torch.tensor([[1.0], [-1.0]])
    assert linear_nats(hidden, weight, torch.tensor([1])).item() == pytest.approx(400.0)
    assert math.isfinite(token_nats(hidden @ weight.T, torch.tensor([1])).item())


def test_no_rows_are_no_loss_and_no_gradient():
    hidden, weight, *_ = example()
    nats = linear_nats(hidden[:0], weight, torch.zeros(0, dtype=torch.long))
    assert nats.shape == (0,) and not torch.autograd.grad(nats.sum(), weight)[0].any()
