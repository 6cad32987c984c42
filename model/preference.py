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

from model.block_diffusion import Blocks, denoising_inputs
from model.config import ADJUSTABLE, ModelConfig
from model.forward_process import Noised, StepNoise, k_of_n_by_block
from model.losses import linear_nats, sum_by_row
from model.objective import Batch, BatchView, NextToken, Objective, Prepared, RowLoss
from model.ranges import check_ranges
from model.transformer import Transformer

VALIDATION_MASKS = 8


@dataclass(frozen=True)
class Preference(Objective):
    """A preference for the chosen reply over the rejected one."""

    title = "Preferences"
    unit = "per pair"

    dpo_beta: Annotated[
        float, "preference that a nat of log-likelihood gained over the reference stands for", "above 0"
    ] = 0.1
    dpo_sft_weight: Annotated[
        float, "weight of the chosen reply's own loss, in nats per token (0 = off)", "at least 0"
    ] = 0.0
    reference_from: Annotated[Path | None, "weights of the frozen reference (none: those of --load-from)"] = None
    reference: Transformer | None = None  # in eval mode and without gradient; set before the first call

    def __post_init__(self):
        check_ranges(type(self), vars(self))

    def settle(self, config: ModelConfig) -> tuple["Preference", ModelConfig]:
        """Take joint weights as the kind that is tuned: autoregressive ones are causal from then on, and in blocks they
        stay joint, although only the blocks are tuned. Raises ValueError if the reference is of another shape or kind.
        """
        kind = "autoregressive" if self.autoregressive else "diffusion"
        config = config.as_kind(kind) if kind in config.kinds else config
        theirs, ours = asdict(self.reference.config), asdict(config)
        different = [name for name in ours if name not in ADJUSTABLE and theirs[name] != ours[name]]
        if different:
            names = ", ".join(f"{name} {theirs[name]} (the weights to tune have {ours[name]})" for name in different)
            raise ValueError(f"--reference-from {self.reference_from} has {names}; give the checkpoint they come from")
        return self, config

    def for_validation(self) -> "Preference":
        """Return the preference loss alone."""
        return replace(self, dpo_sft_weight=0.0)

    def compare(self, policy: Tensor, reference: Tensor, loss_mask: Tensor) -> RowLoss:
        """Return the loss of each pair (DPO, Eq. 7), from the nats (2B,) that the replies cost either model.

        -log sigmoid(margin), margin = beta ((log p(w) - log ref(w)) - (log p(l) - log ref(l))), w chosen, l rejected.
        """
        # 1. Nats that a reply (B,) costs the policy less than the reference, and the margin between the two.
        chosen_gain, rejected_gain = (reference - policy).chunk(2)
        margin = self.dpo_beta * (chosen_gain - rejected_gain)
        # 2. The loss, with the chosen reply's own cost per token if asked for.
        nats, pairs = -F.logsigmoid(margin), torch.ones_like(margin)
        if self.dpo_sft_weight:
            tokens = loss_mask.sum(dim=1).chunk(2)[0]
            nats = nats + self.dpo_sft_weight * policy.chunk(2)[0] / tokens
        # 3. For the log. A pair without a margin, as all are before the first step, counts half in the accuracy.
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

    dpo_num_masks: Annotated[int, "masks drawn for each reply; time grows with it, memory does not", "in [1, 1024]"] = 4
    shared_masks: bool = True  # False is for measuring what sharing is worth

    def for_validation(self) -> "DiffusionDPO":
        """Return the preference loss alone, with the same number of masks in every run: fewer of them raise it."""
        return replace(super().for_validation(), dpo_num_masks=VALIDATION_MASKS, shared_masks=True)

    def prepare(self, batch: Batch, config: ModelConfig, noise: StepNoise) -> Prepared:
        config.require_length(batch["input_ids"].shape[1])
        prepared = dict(batch)
        for purpose in ("policy",) if self.shared_masks else ("policy", "reference"):
            masks = [
                self.corrupt(batch, config.mask_token_id, noise, sample, purpose)
                for sample in range(self.dpo_num_masks)
            ]
            prepared[f"{purpose}_masks"] = [prepare_mask(batch["input_ids"], noised) for noised in masks]
        return prepared

    def loss(self, model: Transformer, prepared: Prepared) -> RowLoss:
        policy, reference = 0.0, 0.0  # sums (2B,) over the masks
        masks = prepared["policy_masks"]
        for own, other in zip(masks, prepared.get("reference_masks", masks), strict=True):
            # Computed again for the gradient, so that the activations of one mask at a time are kept.
            policy = policy + checkpoint(bound, model, prepared, own, use_reentrant=False)
            with torch.no_grad():
                reference = reference + bound(self.reference, prepared, other)
        return self.compare(policy / self.dpo_num_masks, reference / self.dpo_num_masks, prepared["loss_mask"])

    def view(self, batch: Batch, config: ModelConfig, noise: StepNoise) -> BatchView:
        """Return the first mask of each reply."""
        return BatchView(batch["loss_mask"], self.corrupt(batch, config.mask_token_id, noise).scored)

    def corrupt(self, batch: Batch, mask_id: int, noise: StepNoise, sample: int = 0, purpose: str = "policy") -> Noised:
        """Return the batch with mask number `sample`: k of the n maskable tokens of each block, weight n / k.

        k is systematic: over the masks the counts of a block fall into equal strata of {1..n}, and multiples of the
        golden ratio spread those of the blocks of a row. Blocks are counted from the start of each row.
        """
        draws, size = [], self.reference.config.block_size
        for side, maskable in zip(("chosen", "rejected"), batch["loss_mask"].chunk(2), strict=True):
            blocks = Blocks(maskable, None, size)
            stratum = noise.uniform(f"{purpose}/{side}/count", len(maskable)) + sample / self.dpo_num_masks  # (B, 1)
            keys = noise.uniform(f"{purpose}/{side}/mask {sample}", *maskable.shape)
            draws.append(k_of_n_by_block(maskable, blocks, stratum + blocks.golden_steps, keys))
        scored, weight = (torch.cat(sides) for sides in zip(*draws, strict=True))
        noised = torch.where(scored, mask_id, batch["input_ids"])
        return Noised(noised, scored, weight * scored, batch["loss_mask"].sum(dim=1).float())


def prepare_mask(input_ids: Tensor, noised: Noised) -> Prepared:
    """Return one mask of a batch as `bound` reads it."""
    positions = noised.scored.flatten().nonzero()[:, 0]
    return {
        "noised_ids": noised.input_ids,
        "positions": positions,
        "targets": input_ids.flatten()[positions],
        "weight": noised.weight.flatten()[positions],
    }


def bound(model: Transformer, batch: Batch, mask: Prepared) -> Tensor:
    """Return weighted sums (2B,) of -log p(x_0 | x_t, clean blocks before) over the masked tokens."""
    input_ids, config, positions = batch["input_ids"], model.config, mask["positions"]
    ids, attention = denoising_inputs(
        mask["noised_ids"],
        input_ids,
        batch.get("document_ids"),
        config.block_size,
        positions,
        config.attention == "joint",
    )
    hidden = model(ids, **attention, head=False)
    nats = linear_nats(hidden, model.lm_head.weight, mask["targets"], config.mask_token_id)
    return sum_by_row(nats * mask["weight"], positions, *input_ids.shape)
