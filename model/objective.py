"""What a stage optimises: (model, batch, noise) -> RowLoss. Frozen dataclasses whose annotated fields are flags.

A batch holds (B, L) tensors: `input_ids` int64; `loss_mask` bool, "may be noised, and is scored"; `document_ids` int64
where a row holds several documents or padding (-1).
"""

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from model.attention_mask import block_causal_mask, document_mask
from model.forward_process import MASK_SCHEDULES, Noised, StepNoise, mask_tokens, rate_range
from model.losses import forbid, run_lengths, sum_by_row, token_nats, unlikelihood
from model.transformer import Transformer

Batch = dict[str, Tensor]
RATE_BINS = 10


@dataclass(frozen=True)
class RowLoss:
    """Loss of each row; a batch, or many, cost nats.sum() / count.sum(), whatever the split into batches."""

    nats: Tensor  # (B,)
    count: Tensor  # (B,) tokens
    averages: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # name -> (sums, counts), for the log

    def by_sequence(self) -> "RowLoss":
        """LLaDA Eq. 5: a batch costs the mean over its rows of each row's nats per token."""
        return RowLoss(self.nats / self.count.clamp(min=1), (self.count > 0).float(), self.averages)


@dataclass(frozen=True)
class NextToken:
    """Autoregressive cross-entropy. The first token of each document piece has nothing to be predicted from."""

    attention = "causal"

    sequence_mean: bool = False  # every row counts the same, however many tokens it learns

    def for_validation(self) -> "NextToken":
        return replace(self, sequence_mean=False)

    def __call__(self, model: Transformer, batch: Batch, noise: StepNoise) -> RowLoss:
        input_ids, documents = batch["input_ids"], batch.get("document_ids")
        rows, length = input_ids.shape
        scored = batch["loss_mask"][:, 1:]
        if documents is None:
            attention = {"is_causal": True}
        else:
            scored = scored & (documents[:, 1:] == documents[:, :-1])
            attention = {"attn_mask": block_causal_mask(length, 1, input_ids.device) & document_mask(documents)}
        positions = torch.nn.functional.pad(scored, (0, 1)).flatten().nonzero()[:, 0]
        logits = model(input_ids, **attention, select=positions)
        targets = input_ids.flatten()[positions + 1]
        nats = sum_by_row(token_nats(logits, targets), positions, rows, length)
        averages = {"eos_share": share_of(targets, model.config.eos_token_id)}
        loss = RowLoss(nats, scored.sum(dim=1).float(), averages)
        return loss.by_sequence() if self.sequence_mean else loss


@dataclass(frozen=True)
class MaskedDiffusion:
    """Masked diffusion (LLaDA Eq. 3); with loss_mask on the response alone, its SFT loss (Eq. 5).

    Mask rates may be confined to a band [a, b]. The weights stay as they are, so with g(t) the cross-entropy of a
    masked token at rate t the loss is then the mean of g over the band, (1 / (b - a)) times its integral from a to b,
    and bounds no likelihood.
    """

    attention = "full"

    mask_schedule: Annotated[Literal[*MASK_SCHEDULES], "which tokens are masked and how they are weighted"] = (
        "fixed_count"
    )
    iid_mask_eps: Annotated[float, "iid_t: rates are drawn from (eps, 1 - eps)"] = 1e-3
    mask_rate_min: Annotated[
        float, "least mask rate in training; with a narrower band than 0 to 1 the training loss is no bound"
    ] = 0.0
    mask_rate_max: Annotated[float, "largest mask rate in training; validation is over the full range"] = 1.0
    variable_length_prob: Annotated[float, "share of steps whose rows are cut to a random length"] = 0.01
    repeat_penalty_weight: Annotated[float, "unlikelihood of continuing a run of equal tokens (0 = off)"] = 0.0
    repeat_penalty_min_run: Annotated[int, "tokens in a run before its continuation is penalised"] = 2
    repeat_penalty_delay_steps: Annotated[int, "steps before the penalty sets in"] = 0
    repeat_penalty_warmup_steps: Annotated[int, "steps over which it grows to full weight"] = 0
    sequence_mean: bool = False  # every row counts the same, however many tokens it learns

    def __post_init__(self):
        if not 0 < self.iid_mask_eps < 0.5:
            raise ValueError(f"--iid-mask-eps must be in (0, 0.5), not {self.iid_mask_eps}")
        if not 0 <= self.mask_rate_min < self.mask_rate_max <= 1:
            raise ValueError(
                f"--mask-rate-min {self.mask_rate_min} and --mask-rate-max {self.mask_rate_max} must be in [0, 1], "
                "the first below the second"
            )
        low, high = rate_range(self)
        if self.mask_schedule == "iid_t" and low >= high:
            raise ValueError(
                f"--mask-rate-min {self.mask_rate_min} to --mask-rate-max {self.mask_rate_max} holds no rate between "
                f"--iid-mask-eps {self.iid_mask_eps} and 1 less that; widen the band or lower eps"
            )
        if not 0 <= self.variable_length_prob <= 1:
            raise ValueError(f"--variable-length-prob must be in [0, 1], not {self.variable_length_prob}")
        for name in ("weight", "delay_steps", "warmup_steps"):
            if getattr(self, "repeat_penalty_" + name) < 0:
                raise ValueError(f"--repeat-penalty-{name.replace('_', '-')} must not be negative")
        if self.repeat_penalty_min_run < 1:
            raise ValueError(f"--repeat-penalty-min-run must be at least 1, not {self.repeat_penalty_min_run}")

    def for_validation(self) -> "MaskedDiffusion":
        """The full-range bound that every schedule is judged by, so that all validation losses are one quantity."""
        return replace(
            self,
            mask_schedule="fixed_count",
            mask_rate_min=0.0,
            mask_rate_max=1.0,
            variable_length_prob=0.0,
            repeat_penalty_weight=0.0,
            sequence_mean=False,
        )

    def __call__(self, model: Transformer, batch: Batch, noise: StepNoise) -> RowLoss:
        batch = self.shorten(batch, noise)
        input_ids, documents = batch["input_ids"], batch.get("document_ids")
        rows, length = input_ids.shape
        mask_id = model.config.mask_token_id
        noised = mask_tokens(input_ids, batch["loss_mask"], mask_id, self.mask_schedule, noise, self)
        positions = noised.scored.flatten().nonzero()[:, 0]
        attn_mask = None if documents is None else document_mask(documents)
        logits = forbid(model(noised.input_ids, attn_mask=attn_mask, select=positions), mask_id)
        targets = input_ids.flatten()[positions]
        nats = token_nats(logits, targets)
        averages = loss_by_rate(sum_by_row(nats.detach(), positions, rows, length), noised, batch["loss_mask"])
        averages["eos_share"] = share_of(targets, model.config.eos_token_id)
        penalty_weight = self.penalty_weight_at(noise.step)
        if penalty_weight:
            penalty = self.repeat_penalty(logits, noised, input_ids, positions)
            averages["repeat_penalty"] = (penalty.detach().sum(), torch.tensor(len(positions), device=penalty.device))
            nats = nats + penalty_weight * penalty
        weighted = nats * noised.weight.flatten()[positions]
        loss = RowLoss(sum_by_row(weighted, positions, rows, length), noised.count, averages)
        if self.sequence_mean:
            return loss.by_sequence()
        # The empty end of a reply's canvas costs nats but is no text: these bound what the reply alone costs.
        return replace(loss, count=batch["reply_tokens"].float()) if "reply_tokens" in batch else loss

    def shorten(self, batch: Batch, noise: StepNoise) -> Batch:
        """LLaDA, section 2.2: a few steps see rows of a random length, lest short canvases be off-distribution."""
        choices, length = noise.choices("length"), batch["input_ids"].shape[1]
        if choices.random() >= self.variable_length_prob:
            return batch
        length = choices.randint(1, length)
        return {name: tensor[:, :length] for name, tensor in batch.items()}

    def penalty_weight_at(self, step: int) -> float:
        ramp = (step - self.repeat_penalty_delay_steps) / max(self.repeat_penalty_warmup_steps, 1)
        if self.repeat_penalty_warmup_steps == 0:
            ramp = float(step >= self.repeat_penalty_delay_steps)
        return self.repeat_penalty_weight * min(max(ramp, 0.0), 1.0)

    def repeat_penalty(self, logits: Tensor, noised: Noised, input_ids: Tensor, positions: Tensor) -> Tensor:
        """(N,) unlikelihood, at each scored position, of the token whose run ends just before it.

        Runs are counted on the canvas as a greedy decoder would fill it; where the text itself goes on with the run,
        nothing is penalised.
        """
        canvas = noised.input_ids.flatten().index_put((positions,), logits.detach().argmax(dim=-1)).view_as(input_ids)
        previous = canvas.roll(1, dims=1).flatten()[positions]
        run = run_lengths(canvas).roll(1, dims=1)
        run[:, 0] = 0
        wrong = (run.flatten()[positions] >= self.repeat_penalty_min_run) & (previous != input_ids.flatten()[positions])
        return unlikelihood(logits, previous) * wrong


def share_of(targets: Tensor, token_id: int) -> tuple[Tensor, Tensor]:
    """(how many of the targets (N,) are `token_id`, N): for EOS, how much of the learning goes into ending."""
    return (targets == token_id).sum(), torch.tensor(len(targets), device=targets.device)


def loss_by_rate(by_row: Tensor, noised: Noised, maskable: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean cross-entropy of masked tokens, rows grouped by their mask rate into RATE_BINS equal bins of (0, 1]."""
    masked = noised.scored.sum(dim=1)
    rate = masked / maskable.sum(dim=1).clamp(min=1)
    bins = (torch.ceil(rate * RATE_BINS).long() - 1).clamp(min=0)
    zeros = by_row.new_zeros(RATE_BINS)
    return {"loss_by_rate": (zeros.index_add(0, bins, by_row), zeros.index_add(0, bins, masked.to(by_row.dtype)))}
