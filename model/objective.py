"""What a stage optimises: (model, batch, noise) -> RowLoss. Frozen dataclasses whose annotated fields are flags.

A batch holds (B, L) tensors: `input_ids` int64; `loss_mask` bool, "may be noised, and is scored"; `document_ids` int64
where a row holds several documents or padding (-1).

An objective works in two parts, so that the next step can be made ready while the device is busy with this one:
`prepare` has all that is random and all sizes that depend on the data; it runs on the host and gives a dict of tensors
and plain numbers. `loss` is a function of the weights and of that dict alone, and never waits for the device.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from model.attention_mask import causal_attention
from model.config import ModelConfig
from model.forward_process import StepNoise
from model.losses import linear_nats, sum_by_row
from model.transformer import Transformer

Batch = dict[str, Tensor]
Prepared = dict[str, Any]


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
class BatchView:
    """What an objective does with a batch, for people to look at."""

    scored: Tensor  # (B, L) bool, tokens that the loss asks for or, if `masked` has any, may ask for
    masked: Tensor  # (B, L) bool, tokens that the network sees as [MASK]


class Objective:
    """All that a training stage needs to know of what it trains for."""

    unit: ClassVar[str]  # of the validation loss
    autoregressive: ClassVar[bool]  # it predicts the next token, so diffusion weights are no start for it

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

    @property
    def keeps_logits(self) -> bool:
        """Whether the loss keeps all logits in float32 for its gradient, and does not go through them in chunks."""
        return False

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
        attention = causal_attention(prepared.get("document_ids"), input_ids.shape[1])
        hidden = model(input_ids, **attention, select=positions, head=False)
        nats = sum_by_row(linear_nats(hidden, model.lm_head.weight, targets), positions, *input_ids.shape)
        loss = RowLoss(nats, prepared["count"], {"eos_share": share_of(targets, model.config.eos_token_id)})
        return loss.by_sequence() if self.sequence_mean else loss

    def view(self, batch: Batch, config: ModelConfig, noise: StepNoise) -> BatchView:
        return BatchView(predictable(batch), torch.zeros_like(batch["loss_mask"]))


def predictable(batch: Batch) -> Tensor:
    """bool (B, L): the positions of loss_mask that have a token before them in their document."""
    maskable = batch["loss_mask"]
    documents = batch.get("document_ids", torch.zeros_like(batch["input_ids"]))
    first = torch.ones_like(maskable)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return maskable & ~first


def number_of(values: Tensor) -> Tensor:
    """How many they are, on their device, without waiting for it."""
    return torch.full((), len(values), device=values.device)


def share_of(targets: Tensor, token_id: int) -> tuple[Tensor, Tensor]:
    """(how many of the targets (N,) are `token_id`, N): for EOS, how much of the learning goes into ending."""
    return (targets == token_id).sum(), number_of(targets)
