"""Statistics of evaluations: intervals and standard errors, chrF, edit distance, distinct n-grams, repetition, right
answers.

Everything here is a function of plain numbers, texts or token ids, and knows no model and no file.
"""

import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from statistics import fmean, stdev

import numpy as np

Z = 1.959964  # two-sided 95 % quantile of the normal distribution
# The same of Student's t for 1, 2, ... degrees of freedom. Beyond them NORMAL is used, which is at most 4 % too narrow.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
NORMAL = 1.96

RESAMPLES = 10_000
SEED = 20_231  # of the resamples; the same for every interval, so that a report can be drawn again
COUNTS_PER_CHUNK = 2_000_000  # bounds the memory of the bootstrap
CHRF_ORDER, CHRF_BETA = 6, 2


# -- errors and intervals ----------------------------------------------------------------------------------------------


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error, None for a single value."""
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def ratio_error(totals: np.ndarray, counts: np.ndarray) -> float:
    """Standard error of totals.sum() / counts.sum() over independently drawn items (delta method); NaN for one item."""
    if len(totals) < 2:
        return math.nan
    residuals = totals - counts * (totals.sum() / counts.sum())
    return float(np.sqrt((residuals**2).sum() * len(totals) / (len(totals) - 1)) / counts.sum())


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % score interval of a binomial share (Wilson 1927)."""
    centre = share + Z**2 / (2 * count)
    reach = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    scale = 1 + Z**2 / count
    return (centre - reach) / scale, (centre + reach) / scale


def t_interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """95 % t interval of a mean; no interval for a single value."""
    number = len(values)
    if number < 2:
        return None, None
    quantile = STUDENT[number - 2] if number - 2 < len(STUDENT) else NORMAL
    mean, half = fmean(values), quantile * stdev(values) / math.sqrt(number)
    return mean - half, mean + half


def resampled_sums(values: np.ndarray, resamples: int = RESAMPLES) -> np.ndarray:
    """Bootstrap: column sums of `values` (N, K) over N rows drawn with replacement, `resamples` times: (R, K).

    All columns share the draw, and so do all calls with the same N.
    """
    generator, number = np.random.default_rng(SEED), len(values)
    sums, chunk = [], max(1, COUNTS_PER_CHUNK // number)
    for first in range(0, resamples, chunk):
        size = min(chunk, resamples - first)
        # Row numbers of resample r are shifted by r * N, so that one bincount counts the rows of all resamples.
        drawn = generator.integers(0, number, (size, number)) + np.arange(size)[:, None] * number
        times_drawn = np.bincount(drawn.ravel(), minlength=size * number).reshape(size, number)
        sums.append(times_drawn @ values)
    return np.concatenate(sums)


def paired_interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the difference of two ratios of sums, by a paired bootstrap over items.

    first, second: (N, 2), numerator and denominator of each item under either model, 0 and 0 if it was not measured; a
    mean has denominators 1. A resample holds an item for both models or for neither, which makes the comparison paired.
    """
    return difference_interval(resampled_sums(np.hstack([first, second])))


def difference_interval(
    sums: np.ndarray, scale: Callable[[np.ndarray], np.ndarray] = lambda ratio: ratio
) -> tuple[float, float]:
    """95 % percentile interval of scale(first ratio) - scale(second ratio), from the sums (R, 4) of the resamples."""
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample may hold no measured item
        difference = scale(sums[:, 0] / sums[:, 1]) - scale(sums[:, 2] / sums[:, 3])
    low, high = np.nanpercentile(difference, [2.5, 97.5]).tolist()
    return low, high


# -- texts -------------------------------------------------------------------------------------------------------------


# A number: a sign that no digit, letter or bracket precedes (5-4 holds no -4), digits that no letter precedes (H2),
# in thousands or not, a decimal part, and the denominator of a fraction.
NUMBER = re.compile(
    r"(?P<sign>(?<![\da-zA-Z)\]])[-+−－＋])?(?<![\da-zA-Z])(?<!\d[.．])"
    r"(?P<value>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:[.．]\d+)?|(?<![\da-zA-Z.．])[.．]\d+)(?:/(?P<parts>\d+))?"
)


def is_correct(reply: str, answer: str, question: str = "", whole: bool = False) -> bool:
    """Return whether a reply to the question gives the answer, or if `whole` is it and nothing else, blanks aside.

    If the answer is a number, the last number of the reply must equal it, where numbers that the question holds count
    only if there is no other: "2 + 11 = 13." answers 13, not 2 or 11, and "9 comes before 10." answers 9 if 10 was
    asked about. 4.0, 4., $4, 4 % and full-width digits are 4, and 4,000 is 4000; 4.5, -4, 0.4 and 1/4 are not 4. Any
    other answer must stand in the reply as words of its own, in upper or lower case.
    """
    if whole:
        return reply.split() == answer.split()
    if number := NUMBER.fullmatch(answer.strip().lstrip("$€£¥￥").rstrip(".。")):
        asked, replied = (list(map(_value, NUMBER.finditer(text))) for text in (question, reply))
        said = [value for value in replied if value not in asked] or replied
        return bool(said) and said[-1] == _value(number)
    pattern = r"(?<![a-z0-9])" + re.escape(answer.lower()) + r"(?![a-z0-9])"
    return re.search(pattern, reply.lower(), re.ASCII) is not None


def _value(number: re.Match[str]) -> Decimal:
    value = Decimal(number["value"].replace(",", "").replace("．", "."))
    value = -value if number["sign"] in ("-", "−", "－") else value
    parts = Decimal(number["parts"] or 1)
    return value / parts if parts else Decimal("NaN")  # which equals nothing


def chrf(reply: str, reference: str) -> float:
    """chrF2 of one reply (Popovic 2015), 0 to 100.

    F-score of character n-gram precision and recall, n = 1 to 6, averaged over the n for which both texts have n-grams;
    recall counts twice, white space is ignored.
    """
    reply, reference = ("".join(text.split()) for text in (reply, reference))
    precisions, recalls = [], []
    for n in range(1, CHRF_ORDER + 1):
        written = Counter(reply[i : i + n] for i in range(len(reply) - n + 1))
        expected = Counter(reference[i : i + n] for i in range(len(reference) - n + 1))
        if written and expected:
            shared = (written & expected).total()
            precisions.append(shared / written.total())
            recalls.append(shared / expected.total())
    if not any(precisions):
        return 0.0
    precision, recall, weight = sum(precisions) / len(precisions), sum(recalls) / len(recalls), CHRF_BETA**2
    return 100 * (1 + weight) * precision * recall / (weight * precision + recall)


def edit_distance(reply: str, answer: str) -> float:
    """Characters to insert, delete or replace to turn one text into the other (Levenshtein 1966) / length of the longer
    one, 0 to 1; runs of white space count as one blank."""
    reply, answer = (" ".join(text.split()) for text in (reply, answer))
    costs = list(range(len(answer) + 1))  # of each beginning of the answer, from the beginning of the reply so far
    for place, written in enumerate(reply, start=1):
        left, diagonal = place, place - 1
        costs[0] = place
        for end, wanted in enumerate(answer, start=1):
            left = min(left + 1, costs[end] + 1, diagonal + (written != wanted))
            diagonal, costs[end] = costs[end], left
    return costs[-1] / max(len(reply), len(answer), 1)


def distinct(texts: Sequence[Sequence[int]], n: int) -> float | None:
    """Distinct token n-grams / all n-grams, over all texts together; None if no text has n tokens."""
    counts = Counter(tuple(ids[i : i + n]) for ids in texts for i in range(len(ids) - n + 1))
    return len(counts) / counts.total() if counts else None


def longest_repeat(ids: Sequence[int]) -> int:
    """Length of the longest sequence that occurs twice; the two occurrences may overlap."""

    def never_twice(length: int) -> bool:
        spans = [tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)]
        return len(set(spans)) == len(spans)

    # If a sequence occurs twice, so do its beginnings: bisection finds the first length that never occurs twice.
    return bisect_left(range(1, len(ids)), True, key=never_twice)
