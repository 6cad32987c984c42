"""Masked diffusion, with full attention or in blocks: what LLaDA and LLaDA 2.0 train.

`prepare` masks a batch, `loss` predicts what was masked. Each addition of LLaDA 2.0 is a field (a flag) and a function
in the last part of this file, called at one numbered step.
Shapes: B rows of a batch; R rows of x_t, B or with complementary masks 2B; L positions; N masked positions, flat over
R * L; C hidden_size; V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from model.block_diffusion import BlockSchedule, predicted_states
from model.config import ModelConfig
from model.editing import EDIT_SOURCES, EditSettings, WithEditRates, drafts, edit_loss, mean_of, prepare_edits
from model.forward_process import MASK_SCHEDULES, MaskSettings, Noised, StepNoise, complement, mask_tokens, rate_range
from model.losses import (
    RepetitionPenalty,
    entropy,
    forbid,
    linear_nats,
    repetition_penalty,
    sum_by_row,
    token_nats,
)
from model.objective import Averages, Batch, BatchView, NextToken, Objective, Prepared, RowLoss, number_of, share_of
from model.transformer import Transformer

RATE_BINS = 10


@dataclass(frozen=True)
class MaskedDiffusion(RepetitionPenalty, EditSettings, BlockSchedule, MaskSettings, Objective):
    """Masked diffusion (LLaDA Eq. 3); with loss_mask on the response alone, its SFT loss (Eq. 5).

    With a block size it is block diffusion (LLaDA 2.0 Eq. 1): every block has a mask rate of its own and is predicted
    from itself and the clean blocks before it. block_size 1 is autoregressive, 0 the whole row at once.

    With next_token_weight, x_0 attends causally, and from the same pass predicts its own next tokens: one set of
    weights that writes in blocks and autoregressively.

    Mask rates may be confined to a band [a, b]. The weights stay as they are, so with g(t) the cross-entropy of a
    masked token at rate t the loss is then the mean of g over the band, (1 / (b - a)) times its integral from a to b,
    and bounds no likelihood.
    """

    title = "Masked diffusion"
    unit = "nats per token"
    autoregressive = False

    mask_schedule: Annotated[Literal[*MASK_SCHEDULES], "which tokens are masked and how they are weighted"] = (
        "fixed_count"
    )
    complementary_masks: Annotated[
        bool,
        "each row twice: masked, and masked where it was not, so that every token is learnt (fixed_count); the second "
        "half has the rates 1 - r, and the loss is no bound",
        "--llada2-enable-complementary-masking",
    ] = False
    cap_weight: Annotated[
        float,
        "times the entropy of predictions that are right, added to the loss (LLaDA 2.0's CAP)",
        "at least 0",
        "--llada2-cap-lambda",
        ("--llada2-enable-cap", 1.0),
    ] = 0.0
    mask_embedding_noise: Annotated[
        float,
        "normal noise on the embedding of [MASK] at the first step, in units of the embeddings' mean size",
        "at least 0",
    ] = 0.0
    mask_embedding_noise_steps: Annotated[
        int, "steps over which it falls to nothing", "at least 1", "with --mask-embedding-noise above 0"
    ] = 500
    next_token_weight: Annotated[
        float | None,
        "times the next-token loss of the clean tokens, which then attend causally: blocks that also write "
        "autoregressively (none: 0; for weights that already do, it must be given)",
        "at least 0",
    ] = None
    variable_length_prob: Annotated[float, "share of steps whose rows are cut to a random length", "in [0, 1]"] = 0.01
    sequence_mean: bool = False  # every row counts the same, however many tokens it learns

    def __post_init__(self):
        MaskSettings.__post_init__(self)
        BlockSchedule.__post_init__(self)
        EditSettings.__post_init__(self)
        low, high = rate_range(self)
        if self.mask_schedule == "iid_t" and low >= high:
            raise ValueError(
                f"--mask-rate-min {self.mask_rate_min} to --mask-rate-max {self.mask_rate_max} holds no rate between "
                f"--iid-mask-eps {self.iid_mask_eps} and 1 less that; widen the band or lower eps"
            )
        low, high = self.wsd_min_mask_ratio, self.wsd_max_mask_ratio
        if self.mask_schedule == "wsd" and not self.iid_mask_eps < low <= high:
            raise ValueError(
                f"--wsd-min-mask-ratio {low} must be above --iid-mask-eps {self.iid_mask_eps} and not above "
                f"--wsd-max-mask-ratio {high}"
            )
        if self.complementary_masks and self.block_size == 1:
            raise ValueError(
                "--complementary-masks has no effect with --block-size 1, where all is masked; leave it out"
            )
        if self.complementary_masks and self.mask_schedule != "fixed_count":
            raise ValueError(f"--complementary-masks needs --mask-schedule fixed_count, not {self.mask_schedule}")

    @property
    def eps_has_effect(self) -> bool:
        """True if the band of mask rates, if it is that of `iid_t`, ends at eps or at 1 - eps."""
        low, high = rate_range(self)
        return self.mask_schedule != "iid_t" or low == self.iid_mask_eps or high == 1 - self.iid_mask_eps

    @property
    def joint(self) -> bool:
        """True if the weights also learn to predict the next token."""
        return bool(self.next_token_weight)

    @property
    def terms(self) -> tuple[str, ...]:
        edit = ("edit", *self.edit_rates) if self.edit_weight else ()
        next_token = ("next_token",) if self.joint else ()
        return ("diffusion", *next_token, *edit) if edit or next_token else ()

    @property
    def num_copies(self) -> int:
        """Rows of x_t for each row of a batch, R / B."""
        return 2 if self.complementary_masks else 1

    def settle(self, config: ModelConfig) -> tuple["MaskedDiffusion", ModelConfig]:
        """Take --block-size from the starting weights if it was left out; write the run's last one into the config.

        The config then says how the weights at the end of the run are decoded. Raises ValueError if it is not said
        whether joint weights stay joint, or if there are no blocks beside a next-token loss.
        """
        if config.attention == "joint" and self.next_token_weight is None:
            raise ValueError(
                "the starting weights are joint: they write autoregressively, too; give --next-token-weight above 0 to "
                "keep that, such as 0.5, or 0 to train the blocks alone"
            )
        unsettled = self.block_size is None and not self.use_block_curriculum
        objective = replace(self, block_size=config.block_size) if unsettled else self
        size = objective.last_block_size
        if self.joint and not size:
            raise ValueError("--next-token-weight goes with blocks; give --block-size or --use-block-curriculum")
        attention = "joint" if self.joint else "block" if size else "full"
        return objective, replace(config, attention=attention, block_size=size)

    def schedules_done(self, progress: float) -> bool:
        if self.use_block_curriculum and self.block_size_at(progress) != self.last_block_size:
            return False
        decay = self.wsd_warmup_ratio + self.wsd_stable_ratio
        return self.mask_schedule != "wsd" or progress >= min(decay, 1.0)

    def for_validation(self) -> Objective:
        """Return the full-range bound by which every schedule is judged, at the block size of the run's end; of a joint
        model its weighted sum with the next-token loss, so that neither way of writing is chosen alone.

        If the model learns to edit, the rates of its edits are measured beside it, at one edit rate whatever is trained
        on.
        """
        bound = MaskedDiffusion(
            block_size=self.last_block_size, variable_length_prob=0.0, next_token_weight=self.next_token_weight
        )
        if not self.edit_weight:
            return bound
        return WithEditRates(bound, tuple(replace(bound, edit_weight=1.0, edit_source=name) for name in EDIT_SOURCES))

    def view(self, batch: Batch, config: ModelConfig, noise: StepNoise) -> BatchView:
        """Return what is masked in the first half of complementary masks."""
        noised = self.corrupt(batch, config.mask_token_id, noise)
        return BatchView(batch["loss_mask"], noised.scored[: len(batch["loss_mask"])])

    def corrupt(self, batch: Batch, mask_id: int, noise: StepNoise) -> Noised:
        """Mask a batch; with complementary masks (2B, L), the second half the other way round."""
        block_size = self.block_size_at(noise.progress)
        noised = mask_tokens(batch, mask_id, self.mask_schedule, noise, self, block_size)
        return stacked(noised, complement(noised, batch, mask_id, block_size)) if self.complementary_masks else noised

    def embedding_noise_at(self, step: int) -> float:
        """Return the size of the noise on the embedding of [MASK] at a step; it falls linearly to 0."""
        return max(self.mask_embedding_noise * (1 - step / self.mask_embedding_noise_steps), 0.0)

    def prepare(self, batch: Batch, config: ModelConfig, noise: StepNoise) -> Prepared:
        # 1. x_0 and x_t, (R, L).
        batch = shortened(batch, self.variable_length_prob, noise)
        config.require_length(batch["input_ids"].shape[1])
        noised = self.corrupt(batch, config.mask_token_id, noise)
        input_ids, maskable = (batch[name].repeat(self.num_copies, 1) for name in ("input_ids", "loss_mask"))
        # 2. The masked positions (N,), and of each its clean token and its weight.
        positions = noised.scored.flatten().nonzero()[:, 0]
        masked = noised.scored.sum(dim=1)
        prepared = {
            "input_ids": input_ids,
            "noised_ids": noised.input_ids,
            "positions": positions,
            "targets": input_ids.flatten()[positions],
            "weight": noised.weight.flatten()[positions],
            # 3. By row (R,): tokens that its loss stands for, masks, and mask rate.
            "count": noised.count if self.sequence_mean else of_text(noised.count, batch),
            "masked": masked,
            "rate": masked / maskable.sum(dim=1).clamp(min=1),
            # 4. What the schedules say of this step.
            "block_size": self.block_size_at(noise.progress),
            "joint": self.joint,
            "penalty_weight": self.penalty_weight_at(noise.step),
        }
        # 5. What not every step has.
        if self.edit_weight:
            prepared |= prepare_edits(self, noised, batch, config, noise)
        if "document_ids" in batch:
            prepared["document_ids"] = batch["document_ids"].repeat(self.num_copies, 1)
        if size := self.embedding_noise_at(noise.step):
            draw = embedding_noise(noised.scored, self.num_copies, config.hidden_size, noise)
            prepared["perturbation"] = draw * size
        if self.joint:
            upcoming = NextToken().prepare(without_fill(batch), config)
            prepared |= {f"next_{name}": upcoming[name] for name in ("positions", "targets", "count")}
        return prepared

    def loss(self, model: Transformer, prepared: Prepared) -> RowLoss:
        if "drafts" not in prepared:
            return self.loss_of(model, prepared)
        return mean_of([self.loss_of(model, drafted) for drafted in drafts(model, prepared)])

    def loss_of(self, model: Transformer, prepared: Prepared) -> RowLoss:
        """Return the loss of x_t as it is."""
        input_ids, positions, targets = prepared["input_ids"], prepared["positions"], prepared["targets"]
        shape, penalty_weight = input_ids.shape, prepared["penalty_weight"]
        # 1. Hidden states (N, C) at the masked positions, those at the visible ones that are learnt, too, and those
        #    before the tokens that a joint model predicts.
        places = torch.cat([positions, prepared["visible"]]) if self.edit_weight else positions
        hidden, visible, before_next = predicted_states(model, prepared, places).tensor_split(
            [len(positions), len(places)]
        )
        # 2. -log p(x_0 | x_t) of each (N,). Only CAP and the repetition penalty need the logits (N, V) themselves.
        if self.cap_weight or penalty_weight:
            logits = forbid(model.lm_head(hidden), model.config.mask_token_id)
            nats = token_nats(logits, targets)
        else:
            nats = linear_nats(hidden, model.lm_head.weight, targets, model.config.mask_token_id)
        averages = loss_by_rate(sum_by_row(nats.detach(), positions, *shape), prepared)
        averages["eos_share"] = share_of(targets, model.config.eos_token_id)
        # 3. Additions by token (N,).
        if penalty_weight:
            penalty = repetition_penalty(
                logits, prepared["noised_ids"], input_ids, positions, self.repeat_penalty_min_run
            )
            averages["repeat_penalty"] = (penalty.detach().sum(), number_of(penalty))
            nats = nats + penalty_weight * penalty
        # 4. Weighted sums by row (R,), and additions by row.
        total = sum_by_row(nats * prepared["weight"], positions, *shape)
        if self.cap_weight:
            confidence, cap_averages = confidence_loss(logits, targets, positions, shape)
            averages |= cap_averages
            total = total + self.cap_weight * prepared["count"] * confidence
        # 5. The copies of a row together (B,), and the tokens they stand for.
        terms = {"diffusion": self.of_rows(RowLoss(total, prepared["count"], averages))}
        # 6. The other terms: x_0 where x_t shows a token, right or wrong; and the next-token loss.
        if self.edit_weight:
            terms["edit"] = self.of_rows(edit_loss(visible, model, prepared, self.edit_source))
        if self.joint:
            terms["next_token"] = next_token_loss(before_next, model.lm_head.weight, prepared)
        if self.sequence_mean:
            terms = {name: loss.by_sequence() for name, loss in terms.items()}
        weights = {"edit": self.edit_weight, "next_token": self.next_token_weight}
        return weighted_sum(terms, weights) if len(terms) > 1 else terms["diffusion"]

    def of_rows(self, loss: RowLoss) -> RowLoss:
        """Return the loss of the rows of a batch (B,) from that of their copies (R,)."""
        nats, count = (values.view(self.num_copies, -1).sum(dim=0) for values in (loss.nats, loss.count))
        return RowLoss(nats, count, loss.averages)


def shortened(batch: Batch, probability: float, noise: StepNoise) -> Batch:
    """Cut all rows of a few steps to one random length (LLaDA, section 2.2), so that short canvases are familiar."""
    choices, length = noise.choices("length"), batch["input_ids"].shape[1]
    if choices.random() >= probability:
        return batch
    length = choices.randint(1, length)
    return {name: tensor[:, :length] for name, tensor in batch.items()}


def stacked(first: Noised, second: Noised) -> Noised:
    """Return the rows of both, first those of `first`."""
    return Noised(
        torch.cat([first.input_ids, second.input_ids]),
        torch.cat([first.scored, second.scored]),
        torch.cat([first.weight, second.weight]),
        torch.cat([first.count, second.count]),
    )


def loss_by_rate(nats: Tensor, prepared: Prepared) -> Averages:
    """Return the mean cross-entropy of masked tokens, rows (R,) grouped by their mask rate into RATE_BINS equal bins of
    (0, 1]."""
    bins = (torch.ceil(prepared["rate"] * RATE_BINS).long() - 1).clamp(min=0)
    zeros, masked = nats.new_zeros(RATE_BINS), prepared["masked"].to(nats.dtype)
    return {"loss_by_rate": (zeros.index_add(0, bins, nats), zeros.index_add(0, bins, masked))}


# -- additions ---------------------------------------------------------------------------------------------------------


def embedding_noise(masked: Tensor, num_copies: int, hidden_size: int, noise: StepNoise) -> Tensor:
    """Return standard normal noise (R, L, C) for the embeddings of the masked (R, L) positions, 0 elsewhere.

    LLaDA 2.0, section 7.1: autoregressive training has never seen [MASK], and so many equal inputs make large
    gradients. Copies of a row share their noise.
    """
    draw = noise.normal("embedding", len(masked) // num_copies, masked.shape[1], hidden_size)
    return draw.repeat(num_copies, 1, 1) * masked[:, :, None]


def without_fill(batch: Batch) -> Batch:
    """Return a batch that does not learn the EOS behind its texts: they are diffusion's canvas alone."""
    return batch | {"loss_mask": batch["loss_mask"] & ~batch["fill"]} if "fill" in batch else batch


def of_text(count: Tensor, batch: Batch) -> Tensor:
    """Return counts of tokens (R,) without the share of the fill: the empty end of a canvas costs nats but is no text,
    so that the loss bounds what the text alone costs."""
    if "fill" not in batch:
        return count
    maskable, text = (values["loss_mask"].sum(dim=1).float() for values in (batch, without_fill(batch)))
    copies = len(count) // len(maskable)
    return count * text.repeat(copies) / maskable.clamp(min=1).repeat(copies)


def next_token_loss(hidden: Tensor, head: Tensor, prepared: Prepared) -> RowLoss:
    """Return the loss of `NextToken`, by row (B,), from the states (M, C) of the clean tokens before those scored."""
    nats = linear_nats(hidden, head, prepared["next_targets"])
    count = prepared["next_count"]
    return RowLoss(sum_by_row(nats, prepared["next_positions"], len(count), prepared["input_ids"].shape[1]), count)


def weighted_sum(terms: dict[str, RowLoss], weights: dict[str, float]) -> RowLoss:
    """Return the sum of losses per token, of which the first has weight 1, for the log with the mean of each.

    A row counts as it does in the first; a token that has no part in another counts as much as the others of its row.
    """
    first, *others = terms
    nats, count, averages = terms[first].nats, terms[first].count, {}
    for name in others:
        nats = nats + weights[name] * (count / terms[name].count.clamp(min=1)) * terms[name].nats
    for name, loss in terms.items():
        averages |= loss.averages | {name: (loss.nats.detach().sum(), loss.count.sum())}
    return RowLoss(nats, count, averages)


def confidence_loss(
    logits: Tensor, targets: Tensor, positions: Tensor, shape: tuple[int, int]
) -> tuple[Tensor, Averages]:
    """CAP (LLaDA 2.0 Eq. 6), (R,): the mean entropy, in nats, of a row's predictions that are right as they stand.

    0 if none is. Which ones are right has no gradient. shape: (R, L). Also returns what the log says of it.
    """
    right = (logits.detach().argmax(dim=-1) == targets).float()
    sums, number = (sum_by_row(values, positions, *shape) for values in (entropy(logits) * right, right))
    averages = {"cap_entropy": (sums.detach().sum(), number.sum()), "right": (number.sum(), number_of(right))}
    return sums / number.clamp(min=1), averages
