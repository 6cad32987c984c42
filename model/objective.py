"""What a training stage optimises: (model, batch, noise) -> RowLoss; and next-token prediction.

Objectives are frozen dataclasses whose annotated fields are flags.

A batch holds (B, L) tensors: `input_ids` int64; `loss_mask` bool, "is scored, and may be masked"; `document_ids` int64
if a row holds several documents or padding (-1).

An objective works in two parts, so that the host prepares the next step while the device is busy with this one.
`prepare` has all that is random and all sizes that depend on the data; it runs on the host and returns a dict of
tensors and plain numbers. `loss` is a function of the weights and of that dict alone, and never waits for the device.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from model.attention import causal_attention
from model.config import ModelConfig
from model.forward_process import Batch, StepNoise
from model.losses import linear_nats, sum_by_row
from model.transformer import Transformer

Prepared = dict[str, Any]
Averages = dict[str, tuple[Tensor, Tensor]]  # name -> (sums, numbers of summands), for the log


@dataclass(frozen=True)
class RowLoss:
    """Loss of each row; a batch, or many, cost nats.sum() / count.sum(), whatever the split into batches."""

    nats: Tensor  # (B,)
    count: Tensor  # (B,) tokens
    averages: Averages = field(default_factory=dict)

    def by_sequence(self) -> "RowLoss":
        """Return each row's nats per token (LLaDA Eq. 5): a batch then costs their mean."""
        return RowLoss(self.nats / self.count.clamp(min=1), (self.count > 0).float(), self.averages)


@dataclass(frozen=True)
class BatchView:
    """The use that an objective makes of a batch, for people to look at."""

    scored: Tensor  # (B, L) bool, tokens that the loss asks for or, if `masked` has any, may ask for
    masked: Tensor  # (B, L) bool, tokens that the network sees as [MASK]


class Objective:
    """All that a training stage needs to know of what it trains for."""

    unit: ClassVar[str]  # of the validation loss
    autoregressive: ClassVar[bool]  # it predicts the next token, so diffusion weights are no start for it
    terms: tuple[str, ...] = ()  # averages to be told with it: what it is the sum of, and what else is judged by

    def settle(self, config: ModelConfig) -> tuple["Objective", ModelConfig]:
        """Settle what is open in either, before the network is built, for starting weights of this config.

        Returns the objective and the config to build by, whose `attention` and `block_size` say how the trained weights
        are decoded. Raises ValueError if the two do not go together.
        """
        raise NotImplementedError

    def schedules_done(self, progress: float) -> bool:
        """Return whether all schedules are in their last phase when a share `progress` of the run is done: before, a
        validation loss that rises is no reason to stop."""
        return True

    def for_validation(self) -> "Objective":
        """Return the objective that validation measures: one quantity, whatever is trained on, at any step."""
        raise NotImplementedError

    def prepare(self, batch: Batch, config: ModelConfig, noise: StepNoise) -> Prepared:
        """Return what a step of a model of this config needs of a batch; all on the host."""
        raise NotImplementedError

    def loss(self, model: Transformer, prepared: Prepared) -> RowLoss:
        """Return the loss of what `prepare` returned, once that is on the model's device."""
        raise NotImplementedError

    def view(self, batch: Batch, config: ModelConfig, noise: StepNoise) -> BatchView:
        """Return what a step with this noise scores and masks of a batch of whole rows."""
        raise NotImplementedError

    def __call__(self, model: Transformer, batch: Batch, noise: StepNoise) -> RowLoss:
        """Return the loss of a batch, for a model on the host."""
        return self.loss(model, self.prepare(batch, model.config, noise))


@dataclass(frozen=True)
class NextToken(Objective):
    """Autoregressive cross-entropy. The first token of each document piece has nothing to be predicted from."""

    unit = "nats per token"
    autoregressive = True

    sequence_mean: bool = False  # every row counts the same, however many tokens it learns

    def settle(self, config: ModelConfig) -> tuple["NextToken", ModelConfig]:
        return self, replace(config, attention="causal", block_size=0)

    def for_validation(self) -> "NextToken":
        return replace(self, sequence_mean=False)

    def prepare(self, batch: Batch, config: ModelConfig, noise: StepNoise | None = None) -> Prepared:
        input_ids, documents = batch["input_ids"], batch.get("document_ids")
        # Position i predicts token i + 1: flat positions (N,) in (B, L) whose next token is scored.
        scored = predictable(batch)[:, 1:]
        positions = torch.nn.functional.pad(scored, (0, 1)).flatten().nonzero()[:, 0]
        prepared = {
            "input_ids": input_ids,
            "positions": positions,
            "targets": input_ids.flatten()[positions + 1],
            "count": scored.sum(dim=1).float(),
        }
        return prepared if documents is None else prepared | {"document_ids": documents}

    def loss(self, model: Transformer, prepared: Prepared) -> RowLoss:
        input_ids, positions, targets = prepared["input_ids"], prepared["positions"], prepared["targets"]
        # 1. Hidden states (N, C) before the scored tokens, and the nats (N,) of these.
        attention = causal_attention(prepared.get("document_ids"), input_ids.shape[1])
        hidden = model(input_ids, **attention, select=positions, head=False)
        token_costs = linear_nats(hidden, model.lm_head.weight, targets)
        # 2. Sums by row (B,).
        nats = sum_by_row(token_costs, positions, *input_ids.shape)
        loss = RowLoss(nats, prepared["count"], {"eos_share": share_of(targets, model.config.eos_token_id)})
        return loss.by_sequence() if self.sequence_mean else loss

    def view(self, batch: Batch, config: ModelConfig, noise: StepNoise) -> BatchView:
        return BatchView(predictable(batch), torch.zeros_like(batch["loss_mask"]))


def predictable(batch: Batch) -> Tensor:
    """Return the positions of loss_mask that have a token before them in their document, bool (B, L)."""
    maskable = batch["loss_mask"]
    documents = batch.get("document_ids", torch.zeros_like(batch["input_ids"]))
    first = torch.ones_like(maskable)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return maskable & ~first


def number_of(values: Tensor) -> Tensor:
    """Return the number of values (N,) on their device, without waiting for it."""
    return torch.full((), len(values), device=values.device)


def share_of(targets: Tensor, token_id: int) -> tuple[Tensor, Tensor]:
    """Return how many of the targets (N,) are `token_id`, and N: of EOS, how much of the learning goes into ending."""
    return (targets == token_id).sum(), number_of(targets)
