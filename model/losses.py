"""Cross-entropies and other losses in nats; no sampling, no model call.

Shapes: N scored positions, flat over B rows of L tokens; C hidden_size; V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ranges import check_ranges


def forbid(logits: Tensor, token_id: int) -> Tensor:
    """Make one token impossible in logits (..., V), in place: [MASK] is never predicted, nor decoded."""
    logits[..., token_id] = -math.inf
    return logits


# Logits in float32 at a time: on a CPU few enough to stay in its caches, on a GPU enough to keep it busy.
# Other devices take the value between.
CHUNK_OF_LOGITS = {"cpu": 2**22, "cuda": 2**25}


def linear_nats(hidden: Tensor, weight: Tensor, targets: Tensor, forbidden: int | None = None) -> Tensor:
    """Return token_nats(forbid(hidden @ weight.T, forbidden), targets), (N,) float32, in a fifth of the memory.

    hidden (N, C), weight (V, C), targets (N,) int64. Softmax and its gradient are computed in float32 from logits of
    the autocast dtype, a chunk of rows at a time. Only p - onehot(target), the gradient by the logits, is kept of all
    rows, in that dtype: 2 bytes an entry in bfloat16, and autograd would keep 10. The gradients are those of autograd
    up to the rounding of p to that dtype.
    """
    return _linear_nats(hidden, weight, targets, forbidden, False)[0]


def linear_nats_and_least(
    hidden: Tensor, weight: Tensor, targets: Tensor, forbidden: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return `linear_nats`, and the nats (N,) of the likeliest token of each row, without gradient. The target is that
    token where both are equal."""
    return _linear_nats(hidden, weight, targets, forbidden, True)


def _linear_nats(
    hidden: Tensor, weight: Tensor, targets: Tensor, forbidden: int | None, with_least: bool
) -> tuple[Tensor, Tensor | None]:
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return _LinearNats.apply(hidden, weight, targets, forbidden, with_least)


def linear_confidence(hidden: Tensor, weight: Tensor, forbidden: int) -> Tensor:
    """Return the largest probability (N,) float32 of each row of forbid(hidden @ weight.T, forbidden), computed as in
    `linear_nats`."""
    parts = hidden.split(rows_at_a_time(hidden, weight))
    return torch.cat([forbid(F.linear(rows, weight).float(), forbidden).softmax(dim=-1).amax(dim=-1) for rows in parts])


def rows_at_a_time(hidden: Tensor, weight: Tensor) -> int:
    return max(1, CHUNK_OF_LOGITS.get(hidden.device.type, 2**24) // len(weight))


class _LinearNats(torch.autograd.Function):
    """The operation of `linear_nats`, with a backward pass of its own."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, forbidden: int | None, with_least: bool
    ) -> tuple[Tensor, Tensor | None]:
        nats = hidden.new_empty(len(hidden), dtype=torch.float32)
        least = torch.empty_like(nats) if with_least else None
        chunk = rows_at_a_time(hidden, weight)
        gradient = None
        if any(ctx.needs_input_grad[:2]):
            # Whole chunks on a CPU: the allocator reuses memory of a size that it has seen before.
            room = -(-len(hidden) // chunk) * chunk if hidden.device.type == "cpu" else len(hidden)
            gradient = hidden.new_empty(room, len(weight))[: len(hidden)]
        for first in range(0, len(hidden), chunk):
            # 1. log p (chunk, V) in float32.
            rows, target = slice(first, first + chunk), targets[first : first + chunk, None]
            logits = F.linear(hidden[rows], weight).float()
            log_p = (logits if forbidden is None else forbid(logits, forbidden)).log_softmax(dim=-1)
            # 2. -log p(target), and in place of log p the gradient by the logits.
            nats[rows] = -log_p.gather(1, target)[:, 0]
            if least is not None:
                least[rows] = -log_p.amax(dim=1)
            if gradient is not None:
                gradient[rows] = log_p.exp_().scatter_add_(1, target, log_p.new_full((), -1.0).expand(target.shape))
        ctx.save_for_backward(hidden, weight, gradient)
        if least is not None:
            ctx.mark_non_differentiable(least)
        return nats, least

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, gradient = ctx.saved_tensors
        # The scale of a row of the logits' gradient may be applied on the cheaper side of the product.
        scale = upstream[:, None]
        by_hidden = (scale * (gradient @ weight)).to(hidden.dtype) if ctx.needs_input_grad[0] else None
        by_weight = gradient.T @ (scale * hidden).to(hidden.dtype) if ctx.needs_input_grad[1] else None
        return by_hidden, by_weight, None, None, None


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (N, V), targets (N,) -> cross-entropy (N,) in nats, computed in float32 whatever the logits' dtype."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def entropy(logits: Tensor) -> Tensor:
    """logits (N, V), -inf allowed -> entropy (N,) in nats, in float32."""
    log_p = logits.float().log_softmax(dim=-1)
    # 0 log 0 is 0, and its gradient must be 0, not NaN.
    return -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(dim=-1)


def sum_by_row(values: Tensor, positions: Tensor, num_rows: int, length: int) -> Tensor:
    """values (N,) at flat positions (N,) of a (num_rows, length) batch -> (num_rows,) sums."""
    return values.new_zeros(num_rows).index_add(0, positions // length, values)


def unlikelihood(logits: Tensor, unwanted: Tensor) -> Tensor:
    """-log(1 - p(unwanted)) (N,), Welleck et al. 2020 Eq. 3; logits (N, V), unwanted (N,) token ids."""
    p = logits.float().softmax(dim=-1).gather(-1, unwanted[:, None])[:, 0]
    return -torch.log1p(-p.clamp(max=1 - 1e-6))


def run_lengths(ids: Tensor) -> Tensor:
    """ids (B, L) -> int64 (B, L): the number of equal tokens in a row that end at each position, itself included."""
    index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    new_run = torch.ones_like(ids, dtype=torch.bool)
    new_run[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return index - torch.where(new_run, index, 0).cummax(dim=1).values + 1


@dataclass(frozen=True)
class RepetitionPenalty:
    """Weight of the unlikelihood of repetitions; every field is a flag."""

    repeat_penalty_weight: Annotated[
        float, "unlikelihood of continuing a run of equal tokens (0 = off)", "at least 0"
    ] = 0.0
    repeat_penalty_min_run: Annotated[
        int,
        "tokens in a run before its continuation is penalised",
        "at least 1",
        "with --repeat-penalty-weight above 0",
    ] = 2
    repeat_penalty_delay_steps: Annotated[
        int, "steps before the penalty sets in", "at least 0", "with --repeat-penalty-weight above 0"
    ] = 0
    repeat_penalty_warmup_steps: Annotated[
        int, "steps over which it grows to full weight", "at least 0", "with --repeat-penalty-weight above 0"
    ] = 0

    def __post_init__(self):
        check_ranges(type(self), vars(self))

    def penalty_weight_at(self, step: int) -> float:
        """Return the weight at a step: 0 during the delay, then a linear ramp to the full weight."""
        ramp = (step - self.repeat_penalty_delay_steps) / max(self.repeat_penalty_warmup_steps, 1)
        if self.repeat_penalty_warmup_steps == 0:
            ramp = float(step >= self.repeat_penalty_delay_steps)
        return self.repeat_penalty_weight * min(max(ramp, 0.0), 1.0)


def repetition_penalty(
    logits: Tensor, noised_ids: Tensor, input_ids: Tensor, positions: Tensor, min_run: int
) -> Tensor:
    """Return the unlikelihood (N,), at each masked position, of the token whose run ends just before it.

    x_t = noised_ids and x_0 = input_ids (B, L), logits (N, V) at the flat positions (N,) of the masks. Runs of at least
    `min_run` equal tokens are penalised; not if the text itself goes on with the run.
    """
    # 1. The canvas (B, L) as a greedy decoder would fill it.
    guess = logits.detach().argmax(dim=-1)
    canvas = noised_ids.flatten().index_put((positions,), guess).view_as(input_ids)
    # 2. The token before each masked position (N,), and the length of its run, 0 before the first column.
    previous = canvas.roll(1, dims=1).flatten()[positions]
    run = run_lengths(canvas).roll(1, dims=1)
    run[:, 0] = 0
    # 3. Where going on with it would be wrong.
    wrong = (run.flatten()[positions] >= min_run) & (previous != input_ids.flatten()[positions])
    return unlikelihood(logits, previous) * wrong
