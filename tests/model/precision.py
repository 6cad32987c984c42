"""What a model computes in bfloat16, against float32."""

from typing import Any

import torch
from torch import Tensor

from model.transformer import Transformer


def require_same_in_bfloat16(model: Transformer, ids: Tensor, **attention: Any) -> None:
    """Fail unless logits and gradients of ids (B, L) are those of float32 within the precision of bfloat16."""
    with torch.no_grad():
        for parameter in model.parameters():  # less sharp than the tests' usual weights, which no 8 bits tell
            parameter.mul_(0.3 if parameter.ndim == 2 else 1.0)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model(ids, **attention)
        gradients = torch.autograd.grad(logits.float().square().mean(), list(model.parameters()))
        results.append((logits.float(), *gradients))
    for right, made in zip(*results, strict=True):
        assert (made - right).norm() < 0.03 * right.norm() + 1e-6
