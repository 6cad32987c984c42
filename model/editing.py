"""Learning to edit (LLaDA 2.1): x_t also shows wrong tokens, and x_0 is predicted where a token is shown, too.

LLaDA 2.1 gives its training in words alone; laws of corruption, rates and weights here are our reading.
Shapes: B rows of a batch; R rows of x_t, B or with complementary masks 2B; L positions; M visible and D drafted
positions, flat over R * L; C hidden_size; V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.block_diffusion import predicted_states
from model.config import ModelConfig
from model.forward_process import Batch, Noised, StepNoise
from model.losses import forbid, linear_nats_and_least, rows_at_a_time, sum_by_row
from model.objective import Objective, Prepared, RowLoss, number_of
from model.ranges import check_ranges
from model.transformer import Transformer

EDIT_SOURCES = "random", "self"


@dataclass(frozen=True)
class EditSettings:
    """Wrong tokens in x_t, and the weight of recovering the text from them; every field is a flag."""

    edit_weight: Annotated[
        float,
        "times the cross-entropy of the tokens that x_t shows, some of them wrong, added to the loss (LLaDA 2.1's "
        "editing): the mean of a row's, which counts as much as the row does without it",
        "at least 0",
        "without --block-size 1",
    ] = 0.0
    edit_rate: Annotated[
        float,
        "largest share of a row's shown tokens that are replaced; each row draws its own, uniform from 0 on",
        "in (0, 1]",
        "with --edit-weight above 0",
    ] = 0.3
    edit_source: Annotated[
        Literal[*EDIT_SOURCES],
        "what replaces them: random = any other token of the text's vocabulary; self = what the model itself writes "
        "there, right or wrong, by a pass that sees them masked (a third more time)",
        "with --edit-weight above 0",
    ] = "random"
    edit_rounds: Annotated[
        int,
        "times that x_t is drafted and learnt in a step, each time on from the drafts before (LLaDA 2.1's multi-turn "
        "forward); the loss is the mean; multiplies time and memory",
        "at least 1",
        "with --edit-source self",
    ] = 1

    def __post_init__(self):
        check_ranges(type(self), vars(self))

    @property
    def edit_rates(self) -> tuple[str, ...]:
        """Names of the averages that say how the model edits what its source of errors made."""
        return tuple(f"{rate}_{self.edit_source}" for rate in ("repair_rate", "false_edit_rate"))


def prepare_edits(
    settings: EditSettings, noised: Noised, batch: Batch, config: ModelConfig, noise: StepNoise
) -> Prepared:
    """Return the visible positions (M,) that are scored and their clean tokens; and x_t (R, L) with its replacements,
    or of each round of drafts the positions (D,) and a random number for each.

    noised: (R, L), whose masks stay as they are. No draw is one of the masks'. Copies of a row share their draws: a
    token is visible in one of the two alone.
    """
    rows, length = batch["input_ids"].shape
    copies = len(noised.scored) // rows
    input_ids, maskable = (batch[name].repeat(copies, 1) for name in ("input_ids", "loss_mask"))
    # 1. What is to be kept or repaired.
    visible = maskable & ~noised.scored
    positions = visible.flatten().nonzero()[:, 0]
    prepared = {"visible": positions, "visible_targets": input_ids.flatten()[positions]}
    # 2. Of each round the tokens that are replaced, at the rate that the row has drawn, and numbers (R, L) that say by
    #    what.
    rounds = []
    for number in range(settings.edit_rounds):
        rate = settings.edit_rate * noise.uniform(f"edit/rate/{number}", rows)
        chosen = noise.uniform(f"edit/place/{number}", rows, length) < rate
        draw = noise.uniform(f"edit/token/{number}", rows, length)
        rounds.append((chosen.repeat(copies, 1) & visible, draw.repeat(copies, 1)))
    # 3. Random tokens now; the model's own when it is at hand.
    if settings.edit_source == "random":
        chosen, draw = rounds[0]
        return prepared | {"noised_ids": torch.where(chosen, other_tokens(input_ids, draw, config), noised.input_ids)}
    places = [(chosen.flatten().nonzero()[:, 0], draw.flatten()) for chosen, draw in rounds]
    return prepared | {"drafts": [{"positions": place, "draw": draw[place]} for place, draw in places]}


def other_tokens(ids: Tensor, draw: Tensor, config: ModelConfig) -> Tensor:
    """Return for each of ids (R, L) a token that it is not, uniform over the vocabulary without padding, BOS, EOS and
    [MASK] if the numbers draw (R, L) are uniform in [0, 1)."""
    special = [config.pad_token_id, config.bos_token_id, config.eos_token_id, config.mask_token_id]
    ordinary = torch.ones(config.vocab_size).index_fill(0, torch.tensor(special), 0).nonzero()[:, 0]
    # 1. The place of each id among the ordinary ones, or behind all of them.
    place = torch.full((config.vocab_size,), len(ordinary)).scatter_(0, ordinary, torch.arange(len(ordinary)))[ids]
    # 2. A place among the others: those from its own on move up by one.
    others = len(ordinary) - (place < len(ordinary)).long()
    other = (draw * others).long()
    return ordinary[other + (other >= place)]


def drafts(model: Transformer, prepared: Prepared) -> Iterator[Prepared]:
    """Yield, for each round, what is learnt from with an x_t in which more of the visible tokens are the model's own.

    Of each round those at its positions are masked, too, and predicted and drawn independently of each other, as a
    decoder does that writes many at once. So x_t keeps its masks, and their number the law that the loss's weights are
    made for. x_0 beside it stays as it is.
    """
    shape, mask_id = prepared["noised_ids"].shape, model.config.mask_token_id
    for draft in prepared["drafts"]:
        shown, places = prepared["noised_ids"].flatten(), draft["positions"]
        asked = {"noised_ids": shown.index_fill(0, places, mask_id).view(shape), "perturbation": None}
        if prepared["joint"]:
            asked["next_positions"] = places[:0]
        with torch.no_grad():
            hidden = predicted_states(model, prepared | asked, places)
            tokens = sampled(hidden, model.lm_head.weight, draft["draw"], mask_id)
        prepared = prepared | {"noised_ids": shown.index_copy(0, places, tokens).view(shape)}
        yield prepared


def sampled(hidden: Tensor, head: Tensor, draw: Tensor, forbidden: int) -> Tensor:
    """Return a token (D,) drawn from the prediction of each of hidden (D, C), by one number in [0, 1) each: the first
    at which the probabilities of all before it and its own exceed that."""
    parts, size = [hidden.new_empty(0, dtype=torch.long)], rows_at_a_time(hidden, head)
    for rows, numbers in zip(hidden.split(size), draw.split(size), strict=True):
        mass = forbid(F.linear(rows, head).float(), forbidden).softmax(dim=-1).cumsum(dim=-1)
        parts.append((mass <= numbers[:, None] * mass[:, -1:]).sum(dim=-1))
    return torch.cat(parts)


def edit_loss(hidden: Tensor, model: Transformer, prepared: Prepared, source: str) -> RowLoss:
    """Return the cross-entropies of the visible tokens of each row (R,), right and wrong ones, summed; for the log
    their mean, how many are wrong, and by `source`:

    repair rate      of the wrong ones, those whose likeliest token is the right one;
    false-edit rate  of the right ones, those whose likeliest token is another; "sure": at a probability above a half.
    """
    positions, targets, shape = prepared["visible"], prepared["visible_targets"], prepared["input_ids"].shape
    # 1. -log p(x_0) of each (M,) and that of its likeliest token; no probability is carried over from x_t.
    nats, least = linear_nats_and_least(hidden, model.lm_head.weight, targets, model.config.mask_token_id)
    # 2. What an editor would do.
    right = prepared["noised_ids"].flatten()[positions] == targets
    keeps = nats.detach() <= least
    sure = least < math.log(2)
    averages = {
        "edit_loss": (nats.detach().sum(), number_of(nats)),
        "wrong": ((~right).sum(), number_of(right)),
        "repair_rate": ((~right & keeps).sum(), (~right).sum()),
        "false_edit_rate": ((right & ~keeps).sum(), right.sum()),
        "sure_false_edit_rate": ((right & ~keeps & sure).sum(), right.sum()),
    }
    # 3. Sums by row: of right ones, too, or a model learns that what it is shown is wrong.
    total, number = (sum_by_row(values, positions, *shape) for values in (nats, torch.ones_like(nats)))
    return RowLoss(total, number, {f"{name}_{source}": value for name, value in averages.items()})


def mean_of(rounds: list[RowLoss]) -> RowLoss:
    """Return the mean loss of several rounds over the same rows, for the log with the averages over all of them."""
    if len(rounds) == 1:
        return rounds[0]
    averages = {}
    for name in rounds[0].averages:
        sums, numbers = zip(*(loss.averages[name] for loss in rounds), strict=True)
        averages[name] = (torch.stack(sums).sum(dim=0), torch.stack(numbers).sum(dim=0))
    return RowLoss(torch.stack([loss.nats for loss in rounds]).mean(dim=0), rounds[0].count, averages)


@dataclass(frozen=True)
class WithEditRates(Objective):
    """The loss of `bound`, and beside it how the model edits: the averages of objectives that show it wrong tokens, by
    passes of their own."""

    bound: Objective
    edited: tuple[Objective, ...]

    def prepare(self, batch: Batch, config: ModelConfig, noise: StepNoise) -> Prepared:
        edited = [objective.prepare(batch, config, noise) for objective in self.edited]
        return self.bound.prepare(batch, config, noise) | {"edited": edited}

    def loss(self, model: Transformer, prepared: Prepared) -> RowLoss:
        loss = self.bound.loss(model, prepared)
        averages = loss.averages
        for objective, edited in zip(self.edited, prepared["edited"], strict=True):
            rates = objective.loss(model, edited).averages
            averages = averages | {name: rate for name, rate in rates.items() if name.endswith(objective.edit_source)}
        return replace(loss, averages=averages)
