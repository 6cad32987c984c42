"""The likelihoods of a diffusion model side by side, on the same documents: its bound, and the exact chain rules by
which it writes one token after the other.

A chain rule is the likelihood of one way of writing, and costs a pass for every token, in blocks for every token of a
block; the bound is the mean of the chain rules over all orders.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, NamedTuple

from model.likelihood import RowNats, chain_rule, confidence_chain_rule, next_token_nats
from scripts.engine.files import or_none
from scripts.engine.likelihood.documents import Likelihood, by_language, kind_of, with_error
from scripts.engine.likelihood.windows import DIFFUSION, DataEvalConfig, Document, Window, batches, scrambled
from scripts.engine.loaded import Loaded

BOUND, LEFT_TO_RIGHT, BY_CONFIDENCE, AUTOREGRESSIVE = "bound", "left to right", "by confidence", "autoregressive"
TOGETHER = 8  # windows in a pass, of like length: few, so that hardly any are done before the others


@dataclass(frozen=True)
class ChainRuleConfig:
    """Chain rules of diffusion models."""

    chain_rule_documents: Annotated[
        int,
        "beside the bound of a random sample of so many documents or conversations of a file show what the model pays "
        "exactly when it writes token by token, from left to right or where it is surest; each costs a pass for every "
        "token, in blocks for every token of a block",
        "at least 0",
        f"with {DIFFUSION}",
        "with text or conversations",
    ] = 0


class Rule(NamedTuple):
    """A chain rule, and how many windows share its passes."""

    nats: Callable[..., RowNats]  # (model, batch)
    together: int


def rules_of(loaded: Loaded, rows_per_pass: int) -> dict[str, Rule]:
    """The chain rules of a diffusion model; if its weights are joint, also that by which they write
    autoregressively. An autoregressive model has no other than that which it is scored by."""
    if loaded.kind == "autoregressive":
        return {}
    together = min(TOGETHER, rows_per_pass)
    rules = {
        LEFT_TO_RIGHT: Rule(partial(chain_rule, steps_per_pass=rows_per_pass), 1),  # the steps of a window share passes
        BY_CONFIDENCE: Rule(confidence_chain_rule, together),
    }
    joint = "autoregressive" in loaded.model.config.kinds
    return rules | ({AUTOREGRESSIVE: Rule(next_token_nats, together)} if joint else {})


def sampled(windows: list[Window], number: int) -> list[int]:
    """Numbers of a random sample of at most so many of the documents of windows; it follows their content, not their
    places in the file."""
    seeds: dict[int, int] = {}
    for window in windows:
        seeds.setdefault(window.document, window.seed)
    return sorted(heapq.nsmallest(number, seeds, key=lambda document: scrambled(seeds[document])))


def chain_rules(
    loaded: Loaded, documents: list[Document], windows: list[Window], config: DataEvalConfig, number: int
) -> dict[str, dict[int, Document]]:
    """rule -> {number: document} for a sample of scored documents: as they are scored, BOUND, and with the nats of each
    chain rule of the model."""
    chosen = sampled(windows, number)
    some = [window for window in windows if window.document in set(chosen)]
    found = {BOUND: {place: documents[place] for place in chosen}}
    for name, rule in rules_of(loaded, config.eval_batch_size).items():
        found[name] = {place: replace(documents[place], nats=0.0, variance=0.0) for place in chosen}
        for batch, numbers in batches(some, loaded, replace(config, eval_batch_size=rule.together)):
            with loaded.runtime.autocast():
                nats = rule.nats(loaded.model, batch).nats.tolist()
            for place, cost in zip(numbers, nats, strict=True):
                found[name][some[place].document].nats += cost
    return found


def side_by_side(
    loaded: Loaded, documents: list[Document], windows: list[Window], config: DataEvalConfig, number: int, unit: str
) -> tuple[list[str], dict[str, Any]]:
    """Lines on the bound of a sample of scored documents and on every chain rule, by language, with what lies between
    them, paired by document; and the record for the result file. Nothing if the sample is to be empty."""
    found = chain_rules(loaded, documents, windows, config, number) if number else {}
    lines, record = {}, {}
    for name, scored in found.items():
        members, bounds = list(scored.values()), list(found[BOUND].values())
        gaps = [replace(d, nats=bound.nats - d.nats) for d, bound in zip(members, bounds, strict=True)]
        pairs, languages = list(zip(members, gaps, strict=True)), [document.language for document in members]
        for group, some in by_language(pairs, languages).items():
            kind = kind_of(loaded.model) if name == BOUND else "exact"
            value, gap = (Likelihood.of(kind, list(column)) for column in zip(*some, strict=True))
            line, entry = f"{group}, {name}: {value.line(unit)}", value.as_json()
            if name != BOUND:
                below, error = gap.bits_per_byte, gap.bits_per_byte_error
                line += f", {with_error(below, error)} below the bound"
                entry |= {"bits_per_byte_below_bound": below, "below_bound_error": or_none(error)}
            lines.setdefault(group, []).append(line)
            record.setdefault(group, {})[name] = entry
    return [line for some in lines.values() for line in some], {"chain_rules": record} if found else {}
