"""Direct preference optimisation: a policy learns to prefer one reply to another, measured against a frozen reference.

A batch holds B pairs as 2B rows, the chosen replies before the rejected ones: (2B, L) tensors as in model/objective.py,
loss_mask True on a reply and its EOS alone. Log-likelihoods are sums over a reply, in nats, not means.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.block_diffusion import predict
from model.config import ModelConfig
from model.forward_process import Noised, StepNoise, lowest
from model.import_weights import ADJUSTABLE
from model.likelihood import GOLDEN
from model.losses import linear_nats, sum_by_row
from model.objective import Batch, BatchView, NextToken, Objective, Prepared, RowLoss
from model.transformer import Transformer

VALIDATION_MASKS = 8


@dataclass(frozen=True)
class Preference(Objective):
    """Preferences."""

    unit = "per pair"

    dpo_beta: Annotated[float, "preference that a nat of log-likelihood gained over the reference stands for"] = 0.1
    dpo_sft_weight: Annotated[float, "weight of the chosen reply's own loss, in nats per token (0 = off)"] = 0.0
    reference_from: Annotated[Path | None, "weights of the frozen reference (none: those of --load-from)"] = None
    reference: Transformer | None = None  # in eval mode and without gradient; set before the first call

    def __post_init__(self):
        if self.dpo_beta <= 0:
            raise ValueError(f"--dpo-beta must be positive, not {self.dpo_beta}")
        if self.dpo_sft_weight < 0:
            raise ValueError(f"--dpo-sft-weight must not be negative, not {self.dpo_sft_weight}")

    def settle(self, config: ModelConfig) -> tuple["Preference", ModelConfig]:
        """Leave both as they are. Raises ValueError if the reference is of another shape or kind than the weights."""
        found, expected = asdict(self.reference.config), asdict(config)
        wrong = [name for name in expected if name not in ADJUSTABLE and found[name] != expected[name]]
        if wrong:
            told = ", ".join(f"{name} {found[name]} (the weights to tune have {expected[name]})" for name in wrong)
            raise ValueError(f"--reference-from {self.reference_from} has {told}; give the checkpoint they come from")
        return self, config

    def for_validation(self) -> "Preference":
        """The preference loss alone."""
        return replace(self, dpo_sft_weight=0.0)

    def compare(self, policy: Tensor, reference: Tensor, loss_mask: Tensor) -> RowLoss:
        """-log sigmoid(margin) (DPO, Eq. 7), from the nats (2B,) that the replies cost either model.

        margin = beta ((log p(w) - log ref(w)) - (log p(l) - log ref(l))), w chosen and l rejected. In the averages, a
        pair without a margin, as all are before the first step, counts half in the accuracy.
        """
        chosen_gain, rejected_gain = (reference - policy).chunk(2)
        margin = self.dpo_beta * (chosen_gain - rejected_gain)
        nats, pairs = -F.logsigmoid(margin), torch.ones_like(margin)
        if self.dpo_sft_weight:
            tokens = loss_mask.sum(dim=1).chunk(2)[0]
            nats = nats + self.dpo_sft_weight * policy.chunk(2)[0] / tokens
        logged = {
            "accuracy": (margin.sign() + 1) / 2,
            "margin": margin,
            "chosen_gain": chosen_gain,
            "rejected_gain": rejected_gain,
        }
        return RowLoss(nats, pairs, {name: (value.detach().sum(), pairs.sum()) for name, value in logged.items()})


@dataclass(frozen=True)
class ExactDPO(Preference):
    """Preferences."""

    autoregressive = True

    def prepare(self, batch: Batch, config: ModelConfig, noise: StepNoise) -> Prepared:
        return NextToken().prepare(batch, config) | {"loss_mask": batch["loss_mask"]}

    def loss(self, model: Transformer, prepared: Prepared) -> RowLoss:
        policy = NextToken().loss(model, prepared).nats
        with torch.no_grad():
            reference = NextToken().loss(self.reference, prepared).nats
        return self.compare(policy, reference, prepared["loss_mask"])

    def view(self, batch: Batch, config: ModelConfig, noise: StepNoise) -> BatchView:
        return NextToken().view(batch, config, noise)


@dataclass(frozen=True)
class DiffusionDPO(Preference):
    """Preferences; each reply's log-likelihood is estimated by its lower bound.

    The bound is LLaDA's Eq. 6, or for a block checkpoint that of each block given the clean ones before it (LLaDA 2.0,
    section 5.3). Noise in the margin costs preference, so its variance is kept low as in LLaDA 1.5 (VRPO): several
    masks, each with a count of its own, and the same ones for policy and reference. The two replies of a pair draw
    theirs independently.
    """

    autoregressive = False

    dpo_num_masks: Annotated[int, "masks drawn for each reply; time grows with it, memory does not"] = 4
    shared_masks: bool = True  # False is for measuring what sharing is worth

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.dpo_num_masks <= 1024:
            raise ValueError(f"--dpo-num-masks must be from 1 to 1024, not {self.dpo_num_masks}")

    def for_validation(self) -> "DiffusionDPO":
        """The preference loss alone, with the same number of masks in every run: fewer of them raise it."""
        return replace(super().for_validation(), dpo_num_masks=VALIDATION_MASKS, shared_masks=True)

    def prepare(self, batch: Batch, config: ModelConfig, noise: StepNoise) -> Prepared:
        prepared = dict(batch)
        for purpose in ("policy",) if self.shared_masks else ("policy", "reference"):
            masks = [
                self.corrupt(batch, config.mask_token_id, noise, sample, purpose)
                for sample in range(self.dpo_num_masks)
            ]
            prepared[f"{purpose}_masks"] = [prepare_mask(batch["input_ids"], noised) for noised in masks]
        return prepared

    def loss(self, model: Transformer, prepared: Prepared) -> RowLoss:
        policy, reference = 0.0, 0.0
        masks = prepared["policy_masks"]
        for own, other in zip(masks, prepared.get("reference_masks", masks), strict=True):
            # Computed again for the gradient, lest the activations of all masks be kept.
            policy = policy + checkpoint(bound, model, prepared, own, use_reentrant=False)
            with torch.no_grad():
                reference = reference + bound(self.reference, prepared, other)
        return self.compare(policy / self.dpo_num_masks, reference / self.dpo_num_masks, prepared["loss_mask"])

    def view(self, batch: Batch, config: ModelConfig, noise: StepNoise) -> BatchView:
        """The first mask of each reply."""
        return BatchView(batch["loss_mask"], self.corrupt(batch, config.mask_token_id, noise).scored)

    def corrupt(self, batch: Batch, mask_id: int, noise: StepNoise, sample: int = 0, purpose: str = "policy") -> Noised:
        """The batch with mask number `sample`: k_b of the n_b maskable tokens of block b masked, weight n_b / k_b.

        k_b ~ U{1..n_b} is systematic: a block's counts fall into equal strata of {1..n_b} over the masks, and golden
        ratios spread those of a row's blocks.
        """
        weights, size = [], self.reference.config.block_size
        for side, maskable in zip(("chosen", "rejected"), batch["loss_mask"].chunk(2), strict=True):
            strata = noise.uniform(f"{purpose}/{side}/count", len(maskable)) + sample / self.dpo_num_masks
            keys = noise.uniform(f"{purpose}/{side}/mask {sample}", *maskable.shape)
            weights.append(count_weights(maskable, size, strata, keys))
        weight = torch.cat(weights)
        noised = torch.where(weight > 0, mask_id, batch["input_ids"])
        return Noised(noised, weight > 0, weight, batch["loss_mask"].sum(dim=1).float())


def count_weights(maskable: Tensor, block_size: int, strata: Tensor, keys: Tensor) -> Tensor:
    """float32 (B, L): n_b / k_b where one of block b's k_b masks falls, 0 elsewhere; n_b maskable (B, L) positions.

    Blocks are counted from each row's start; block_size 0: the row is one block. Block b of a row at `strata` (B, 1)
    masks the share (strata + b * golden ratio) mod 1 of its tokens, rounded up, those with the lowest keys (B, L).
    """
    rows, length = maskable.shape
    size = min(block_size or length, length)

    def blocks(values: Tensor) -> Tensor:
        return F.pad(values, (0, -length % size)).view(-1, size)

    eligible = blocks(maskable)
    total = eligible.sum(dim=1)
    share = (strata + GOLDEN * torch.arange(len(eligible) // rows, device=maskable.device)).flatten() % 1.0
    k = (1 + (share * total).long()).minimum(total)
    weight = lowest(blocks(keys), eligible, k) * (total / k.clamp(min=1))[:, None]
    return weight.view(rows, -1)[:, :length]


def prepare_mask(input_ids: Tensor, noised: Noised) -> Prepared:
    """One mask of a batch as `bound` wants it."""
    positions = noised.scored.flatten().nonzero()[:, 0]
    return {
        "noised_ids": noised.input_ids,
        "positions": positions,
        "targets": input_ids.flatten()[positions],
        "weight": noised.weight.flatten()[positions],
    }


def bound(model: Transformer, batch: Batch, mask: Prepared) -> Tensor:
    """(R,) weighted sums of -log p(x_0 | x_t, clean blocks before) over the masked tokens."""
    input_ids, config, positions = batch["input_ids"], model.config, mask["positions"]
    documents = batch.get("document_ids")
    hidden = predict(model, mask["noised_ids"], input_ids, documents, config.block_size, positions, head=False)
    nats = linear_nats(hidden, model.lm_head.weight, mask["targets"], config.mask_token_id)
    return sum_by_row(nats * mask["weight"], positions, *input_ids.shape)
