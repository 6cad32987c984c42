"""Numbers of the report: chrF, and what a difference between two models on the same items may be by chance."""

from collections import Counter
from collections.abc import Callable

import numpy as np

RESAMPLES = 10_000
SEED = 20_231  # of the resamples; the same for every interval, so that a report can be drawn again
COUNTS_AT_A_TIME = 2_000_000
CHRF_ORDER, CHRF_BETA = 6, 2


def resampled_sums(values: np.ndarray, resamples: int = RESAMPLES) -> np.ndarray:
    """Sums of the columns of `values` (N, K) over N rows drawn with replacement, `resamples` times over: (R, K).
    All columns share the draw, and so do all calls of one N."""
    generator, number = np.random.default_rng(SEED), len(values)
    sums, step = [], max(1, COUNTS_AT_A_TIME // number)
    for first in range(0, resamples, step):
        size = min(step, resamples - first)
        drawn = generator.integers(0, number, (size, number)) + np.arange(size)[:, None] * number
        sums.append(np.bincount(drawn.ravel(), minlength=size * number).reshape(size, number) @ values)
    return np.concatenate(sums)


def paired_interval(first: np.ndarray, second: np.ndarray, sums: np.ndarray | None = None) -> tuple[float, float]:
    """Percentile interval of 95 % of a difference of ratios, the items being drawn again.

    first, second: (N, 2), numerator and denominator of each item under either model, 0 and 0 where it has none; a mean
    has denominators 1. An item is drawn for both models or for neither, which is what makes the comparison paired.
    sums: (R, 4), `resampled_sums` of both side by side, if they are known.
    """
    return interval_of(resampled_sums(np.hstack([first, second])) if sums is None else sums, lambda ratio: ratio)


def interval_of(sums: np.ndarray, scale: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    """The interval of scale(first ratio) - scale(second ratio), given the sums (R, 4) of the resamples."""
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample may hold no item that counts
        difference = scale(sums[:, 0] / sums[:, 1]) - scale(sums[:, 2] / sums[:, 3])
    low, high = np.nanpercentile(difference, [2.5, 97.5]).tolist()
    return low, high


def chrf(reply: str, reference: str) -> float:
    """chrF2 of one reply (Popovic 2015), 0 to 100: F-score, recall counting twice, of precision and recall of character
    n-grams, n = 1 to 6, averaged over the n for which both texts have n-grams; white space does not count."""
    texts = ["".join(text.split()) for text in (reply, reference)]
    precision, recall = [], []
    for n in range(1, CHRF_ORDER + 1):
        made, wanted = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in texts)
        if made and wanted:
            shared = (made & wanted).total()
            precision.append(shared / made.total())
            recall.append(shared / wanted.total())
    if not any(precision):
        return 0.0
    p, r, weight = sum(precision) / len(precision), sum(recall) / len(recall), CHRF_BETA**2
    return 100 * (1 + weight) * p * r / (weight * p + r)
