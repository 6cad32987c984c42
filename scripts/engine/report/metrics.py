"""What is computed from each recorded row: one `Metric` for each column of numbers that the report has.

To add a metric, write an entry and list it in `METRICS` for the formats of rows that it applies to. Whatever it needs
beyond the texts and nats recorded so far, `measure` must record.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from dataset.rows.choice_formats import Question
from scripts.engine.decoding.answers import Answer, is_premature
from scripts.engine.likelihood.chain_rules import AUTOREGRESSIVE, BOUND, BY_CONFIDENCE, LEFT_TO_RIGHT
from scripts.engine.likelihood.choices import outcome
from scripts.engine.report.measure import WRITTEN
from scripts.engine.statistics import chrf, edit_distance, is_correct, longest_repeat

Item = dict[str, Any]  # of a section of report.json
Result = dict[str, Any]  # what one model made of an item
Ratio = tuple[float, float]  # numerator and denominator
Columns = np.ndarray  # (N, 2): the ratios of N items

SECONDS = "seconds"
UNMEASURED = (0.0, 0.0)


class Metric(NamedTuple):
    """A sum over items divided by another one; for a mean or a share, every measured item has denominator 1."""

    name: str
    of: Callable[[Item, Result], Ratio]  # UNMEASURED: the item does not count
    description: str  # in the report's glossary
    share: bool = False  # of items: it gets a Wilson interval, and bars in exact_match.png; else a standard error
    bound: bool = False  # for a diffusion model an upper bound, shown with <=
    exponential: bool = False  # e to the ratio is shown
    digits: int = 3  # shown after the point
    by_kind: bool = False  # also shown for each kind of question, as a file's first metric is
    cost: bool = False  # of the writing, not of its content: shown in a table of its own, by language alone


def columns_of(metric: Metric, items: Iterable[Item], results: Iterable[Result]) -> Columns:
    return np.array([metric.of(item, result) for item, result in zip(items, results, strict=True)], dtype=float)


# -- ratios of one item ------------------------------------------------------------------------------------------------


def _mean(value: Callable[[Item, Result], float]) -> Callable[[Item, Result], Ratio]:
    return lambda item, result: (float(value(item, result)), 1.0)


def _recorded(name: str) -> Callable[[Item, Result], Ratio]:
    return lambda item, result: (result[name], 1.0)


def _gave_way(item: Item, result: Result) -> Ratio:
    edits = result.get("num_edits")  # none: no model of the report edits
    return UNMEASURED if edits is None else (edits, 1.0)


def _outcome(item: Item, result: Result) -> tuple[int, bool, bool]:
    question = Question(item["question"], item["choices"], item["answer"], item["lang"])
    return outcome(question, np.array(result["nats"]))


def _reference_nats(item: Item, result: Result) -> Ratio:
    likelihood = result.get("reference_likelihood")
    return (likelihood["nats"], likelihood["tokens"]) if likelihood else UNMEASURED


def _chain_rule(*names: str) -> Callable[[Item, Result], Ratio]:
    """Return the bits per byte by the first of these chain rules that a model has; one that has none of them, because
    it writes in one order alone, is exact as it is."""

    def of(item: Item, result: Result) -> Ratio:
        rules = result.get("chain_rules")
        if not rules:
            return UNMEASURED
        nats = next((rules[name] for name in names if name in rules), result["nats"])
        return nats / math.log(2), item["bytes"]

    return of


def _edits(item: Item, result: Result) -> Ratio:
    return (edit_distance(result["text"], item["wanted"]), 1.0) if item.get("whole") else UNMEASURED


def _premature(item: Item, result: Result) -> bool:
    answer = Answer(**{name: result[name] for name in WRITTEN})
    return is_premature(answer, Answer("", item["reference_tokens"], True))


# -- metrics -----------------------------------------------------------------------------------------------------------

EXACT = Metric(
    "exact match",
    _mean(lambda item, result: is_correct(result["text"], item["wanted"], item["question"], item.get("whole", False))),
    "share of the answers that hold the wanted string as words of their own, whatever its case; where a number is "
    "wanted, share of those whose last number it is, numbers of the question left out if there is another; of "
    'questions with "match": "whole", share of those that are the wanted answer and nothing else, blanks aside',
    share=True,
)
EDITS = Metric(
    "edit distance",
    _edits,
    'mean over answers to questions with "match": "whole" of the characters to insert, delete or replace to make the '
    "wanted answer of it / the length of the longer one: 0 to 1",
    by_kind=True,
)
CHRF = Metric(
    "chrF",
    _mean(lambda item, result: chrf(result["text"], item["reference"])),
    "mean over answers of chrF2, 0 to 100: how far character 1- to 6-grams are those of the reference, recall counting "
    "twice",
    digits=1,
)
NATS = Metric(
    "nats per token",
    lambda item, result: (result["nats"], item["tokens"]),
    "-log p of all tokens / their number",
    bound=True,
)
PERPLEXITY = NATS._replace(name="perplexity", description="e to the nats per token", exponential=True, digits=2)
BITS = Metric(
    "bits per byte",
    lambda item, result: (result["nats"] / math.log(2), item["bytes"]),
    "-log2 p / UTF-8 bytes of the text, which does not depend on the tokenizer",
    bound=True,
)
SAMPLE = "of the documents of --chain-rule-documents, -log2 p / UTF-8 bytes"
CHAIN_RULES = [
    Metric(f"bits per byte, {BOUND}", _chain_rule(BOUND), f"{SAMPLE}; for diffusion the bound", bound=True),
    Metric(
        f"bits per byte, {LEFT_TO_RIGHT}",
        _chain_rule(LEFT_TO_RIGHT),
        f"{SAMPLE}, exact, if the tokens are written from left to right, in blocks block by block",
    ),
    Metric(
        f"bits per byte, {BY_CONFIDENCE}",
        _chain_rule(BY_CONFIDENCE),
        f"{SAMPLE}, exact, if the next token is written where the likeliest value is surest, in blocks block by block; "
        "AR writes from left to right",
    ),
    Metric(
        f"bits per byte, {AUTOREGRESSIVE}",
        _chain_rule(AUTOREGRESSIVE, LEFT_TO_RIGHT),
        f"{SAMPLE}, exact, if each token is predicted at the one before it, as AR and joint weights do; of diffusion "
        "alone, which cannot, as from left to right",
    ),
]
REFERENCE_NATS = Metric(
    "nats per token of the given answer",
    _reference_nats,
    "-log p of the answer in the file, its question given / its tokens; EOS is not scored; only where it fits the "
    "context",
    bound=True,
)
ACC = Metric(
    "acc",
    _mean(lambda item, result: _outcome(item, result)[1]),
    "share of the questions whose right choice has the least nats",
    share=True,
)
ACC_NORM = Metric(
    "acc_norm",
    _mean(lambda item, result: _outcome(item, result)[2]),
    "the same by nats per UTF-8 byte of the choice",
    share=True,
)
CHOICE_NATS = Metric(
    "nats of the right choice",
    _mean(lambda item, result: result["nats"][item["answer"]]),
    "mean over questions of -log p of the right choice, its question given",
    bound=True,
    digits=2,
)

_cost = partial(Metric, cost=True)
PREMATURE = "share of the answers that ended below a quarter of the reference's length"
REPEAT = "length of the longest token sequence that an answer contains twice, as a share of the answer"
TIME = "wall-clock time per answer; that of a batch is shared by its answers and so has no error"
WRITING = [
    _cost("tokens", _recorded("num_tokens"), "tokens of an answer up to EOS, that included", digits=2),
    _cost("premature", _mean(_premature), PREMATURE, share=True),
    _cost("overrun", _mean(lambda _, result: not result["ended"]), "share of the answers without an end", share=True),
    _cost("longest repeat", _mean(lambda _, r: longest_repeat(r["ids"]) / max(len(r["ids"]), 1)), REPEAT),
    _cost("forward passes", _recorded("num_forward_passes"), "network calls per answer (NFE)", digits=2),
    _cost("edits", _gave_way, "written tokens that gave way to others, per answer", digits=2),
    _cost(SECONDS, _recorded("seconds"), TIME, digits=4),
]
DISTINCT = [  # of all answers together, not a ratio of sums over them: `results` computes them
    _cost(
        f"distinct-{n}",
        lambda item, result: UNMEASURED,
        f"distinct token {n}-grams / all of them, over all answers together; "
        "a resample would hold answers twice, so it has no interval",
    )
    for n in (1, 2)
]
METRICS = {  # format of rows -> metrics; the first is the quality that a frontier shows
    "text": [NATS, PERPLEXITY, BITS, *CHAIN_RULES],
    "chat": [NATS, PERPLEXITY, BITS, *CHAIN_RULES],
    "choices": [ACC, ACC_NORM, CHOICE_NATS],
    "questions": [EXACT, EDITS, *WRITING],
    "poems": [EXACT, REFERENCE_NATS, *WRITING],
    "open": [CHRF, REFERENCE_NATS, *WRITING],
}


def quality_of(form: str) -> Metric:
    """Return the metric that the frontier of a file of this format shows."""
    return METRICS[form][0]
