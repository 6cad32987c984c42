"""scripts/engine/statistics.py: intervals against enumeration and theory, measures of texts against values by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.engine.statistics import (
    STUDENT,
    chrf,
    difference_interval,
    distinct,
    edit_distance,
    is_correct,
    longest_repeat,
    paired_interval,
    ratio_error,
    resampled_sums,
    t_interval,
)

ids = st.lists(st.integers(0, 2), max_size=14)


def means(values: np.ndarray) -> np.ndarray:
    """(N,) -> (N, 2), the columns of a mean."""
    return np.stack([values, np.ones(len(values))], axis=1).astype(float)


def test_resamples_of_three_items_are_the_27_there_are_each_as_often_as_chance_has_it():
    values = np.array([[1.0, 5.0], [2.0, 50.0], [10.0, 500.0]])
    found = [tuple(row) for row in resampled_sums(values).tolist()]
    expected: dict[tuple, int] = {}
    for drawn in itertools.product(range(3), repeat=3):
        total = tuple(values[list(drawn)].sum(axis=0).tolist())
        expected[total] = expected.get(total, 0) + 1
    assert set(found) == expected.keys() and len(found) == 10_000
    for total, ways in expected.items():
        share = ways / 27
        assert found.count(total) / 10_000 == pytest.approx(share, abs=4.5 * math.sqrt(share * (1 - share) / 10_000))


def test_the_interval_of_three_items_is_that_of_all_27_resamples():
    first, second = np.array([[1.0, 2], [8, 3], [3, 9]]), np.array([[4.0, 2], [1, 3], [7, 9]])
    all_of_them = []
    for drawn in itertools.product(range(3), repeat=3):
        (a, b), (c, d) = first[list(drawn)].sum(axis=0), second[list(drawn)].sum(axis=0)
        all_of_them.append(a / b - c / d)
    assert paired_interval(first, second) == pytest.approx(np.percentile(all_of_them * 400, [2.5, 97.5]), abs=1e-9)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        shared = draw.normal(size=60)
        first, second = shared + draw.normal(0.3, 0.5, 60), shared + draw.normal(0, 0.5, 60)
        sums = resampled_sums(np.hstack([means(first), means(second)]), 400)
        low, high = difference_interval(sums)
        covered += low <= 0.3 <= high
    assert 0.90 <= covered / 400 <= 0.98


def test_pairing_makes_the_interval_of_items_that_are_hard_for_both_narrow():
    draw = np.random.default_rng(1)
    hard = draw.normal(0, 1, 200)
    first, second = hard + draw.normal(0, 0.1, 200), hard + draw.normal(0, 0.1, 200)
    paired = paired_interval(means(first), means(second))
    strangers = paired_interval(means(first), means(draw.permutation(second)))
    assert (paired[1] - paired[0]) < 0.2 * (strangers[1] - strangers[0])


def test_numerator_and_denominator_are_drawn_together():
    """Models of 3 and of 2 nats in every token differ by 1 whatever documents are drawn."""
    tokens = np.array([1.0, 100, 7, 30])
    first, second = np.stack([3 * tokens, tokens], axis=1), np.stack([2 * tokens, tokens], axis=1)
    assert paired_interval(first, second) == pytest.approx((1, 1))
    sums = resampled_sums(np.hstack([first, second]))
    assert difference_interval(sums, np.exp) == pytest.approx((math.e**3 - math.e**2,) * 2)


def test_an_item_that_was_not_measured_counts_in_neither_sum():
    first, second = means(np.array([1.0, 5, 2])), means(np.array([0.0, 2, 2]))
    missing = np.vstack([first, np.zeros((30, 2))]), np.vstack([second, np.zeros((30, 2))])
    low, high = paired_interval(*missing)
    assert 0 <= low < high <= 3 and not math.isnan(low)


def test_a_difference_of_nothing_is_surely_nothing_and_an_interval_is_the_same_every_time():
    values = means(np.random.default_rng(2).normal(size=50))
    assert paired_interval(values, values) == (0, 0)
    other = means(np.random.default_rng(3).normal(size=50))
    assert paired_interval(values, other) == paired_interval(values, other)


@pytest.mark.parametrize(
    "reply, reference, precision, recall",
    [
        ("the cat", "the cat", 1, 1),
        ("the\ncat ", "thecat", 1, 1),  # white space does not count
        ("ab", "abc", 1, (2 / 3 + 1 / 2) / 2),  # no trigram in the reply: two orders count
        ("aaa", "a", 1 / 3, 1),  # an n-gram is found as often as it is there
        ("一只小猫", "一只猫", (3 / 4 + 1 / 3 + 0) / 3, (1 + 1 / 2 + 0) / 3),
        ("xyz", "abc", 0, 0),
    ],
)
def test_chrf_is_the_f_score_by_hand(reply, reference, precision, recall):
    expected = 100 * 5 * precision * recall / (4 * precision + recall) if precision else 0
    assert chrf(reply, reference) == pytest.approx(expected)


def test_chrf_of_no_reply_is_nothing_and_it_counts_recall_twice():
    assert chrf("", "abc") == chrf(" ", "abc") == 0
    assert chrf("abcdef", "abc") > chrf("abc", "abcdef")


@pytest.mark.parametrize(
    ("reply", "answer", "expected"),
    [
        ("7 + 5 = 12.", "12", True),
        ("7 + 5 = 112.", "12", False),
        ("7 + 5 = 12。", "12", True),
        ("The opposite is COLD!", "cold", True),
        ("scold", "cold", False),
        ("巴黎是法国的首都。", "法国", True),
        ("法兰西", "法国", False),
        ("2 + 11 = 13.", "2", False),
        ("18 of 20", "18", False),
        ("9 * 2 = $18.", "18", True),
        ("18 - 3 = 15", "18", False),
        ("It is 1,800.00 in all.", "1800", True),
        ("none", "18", False),
        ("H2O", "2", False),
        ("No. 4", "4", True),
        ("5-4", "-4", False),
        ("7 - 4", "4", True),
        ("答案是-4。", "-4", True),
        ("一共是１２个", "12", True),
        ("1/2", "2", False),
        ("0.5", "1/2", True),
        ("1/0", "1/0", False),
        ("9" * 5000, "9", False),
        ("v. 4.0.1", "1", False),
    ],
)
def test_an_answer_counts_if_it_stands_as_a_word(reply, answer, expected):
    assert is_correct(reply, answer) is expected


def test_numbers_of_the_question_answer_it_only_if_there_is_no_other():
    assert is_correct("9 comes before 10.", "9", "What comes before 10?")
    assert not is_correct("9 comes before 10.", "10", "What comes before 10?")
    assert not is_correct("2 + 11 = 13.", "2", "What is 2 + 11?") and is_correct("7 - 0 = 7.", "7", "7 - 0 = ?")
    assert not is_correct("5 - 1 = 5", "4", "5 - 1 = ?")


FOUR = ["4", "4.", "4.0", "$4", "４", "+4", "4 %", "4.00", "8/2", "4kg", "4。"]
OTHER = ["4.5", "-4", "4,000", "0.4", ".4", "1/4", "14", "44", "40", "−4", "－4", "４０", "4,004", "x4", "5-4.5"]


@pytest.mark.parametrize("around", ["{}", "It is {} ", "2 + 2 = {}", "两个，即{}元", "7 and 8 give\n{}!", "({})"])
def test_a_number_is_compared_as_a_number(around):
    assert [text for text in FOUR if not is_correct(around.format(text), "4")] == []
    assert [text for text in OTHER if is_correct(around.format(text), "4")] == []


@given(st.decimals(allow_nan=False, allow_infinity=False, places=2), st.decimals(-9, 9, places=1), st.booleans())
def test_the_last_number_decides_however_it_is_written(number, other, grouped):
    written = f"{number:,}" if grouped else f"{number:f}"
    assert is_correct(f"{other} and so {written}.", str(number)) and is_correct(f"{written} = {written}", str(number))
    assert is_correct(f"{number:f}, {other:f}", f"{number:f}") == (number == other)


def test_an_answer_that_is_to_be_given_whole_is_right_alone():
    assert is_correct("1, 2, 3.", "1, 2, 3.", whole=True) and is_correct(" 1,\n2, 3.", "1, 2, 3.", whole=True)
    for other in ("1, 2, 3. 4", "It is 1, 2, 3.", "1, 2, 3", "1,2,3.", ""):
        assert not is_correct(other, "1, 2, 3.", whole=True)
    assert is_correct("It is 4.", "4") and not is_correct("It is 4.", "4", whole=True)


@given(st.text("ab \n", max_size=6), st.text("ab ", max_size=6))
def test_the_edit_distance_is_that_of_trying_every_edit(reply, answer):
    def edits(one: str, other: str) -> int:
        if not one or not other:
            return len(one + other)
        ways = edits(one[1:], other) + 1, edits(one, other[1:]) + 1, edits(one[1:], other[1:]) + (one[0] != other[0])
        return min(ways)

    one, other = (" ".join(text.split()) for text in (reply, answer))
    assert edit_distance(reply, answer) == edits(one, other) / max(len(one), len(other), 1)


@given(ids)
def test_the_longest_repeat_is_that_of_trying_every_sequence(tokens):
    spans = [tuple(tokens[i:j]) for i in range(len(tokens)) for j in range(i + 1, len(tokens) + 1)]
    assert longest_repeat(tokens) == max((len(s) for s in spans if spans.count(s) > 1), default=0)


@given(st.lists(ids, min_size=1, max_size=4), st.integers(1, 3))
def test_distinct_n_is_the_share_of_different_n_grams_of_all_texts(texts, n):
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text)) if i + n <= len(text)]
    assert distinct(texts, n) == (len(set(grams)) / len(grams) if grams else None)


def test_the_ratio_error_is_what_a_bootstrap_finds():
    draw = np.random.default_rng(0)
    counts = draw.integers(5, 200, 400).astype(float)
    totals = counts * draw.normal(3, 0.5, 400) + draw.normal(0, 20, 400)
    samples = draw.integers(0, 400, (4000, 400))
    ratios = totals[samples].sum(axis=1) / counts[samples].sum(axis=1)
    assert ratio_error(totals, counts) == pytest.approx(ratios.std(), rel=0.05)


def test_the_ratio_error_of_equal_counts_is_the_textbook_one_and_of_one_document_unknown():
    totals = np.array([1.0, 4.0, 2.5, 7.0])
    expected = (totals / 3).std(ddof=1) / math.sqrt(4)
    assert ratio_error(totals, np.full(4, 3.0)) == pytest.approx(expected)
    assert math.isnan(ratio_error(np.array([1.0]), np.array([2.0])))


def test_the_quantiles_are_those_of_student_s_distribution():
    for freedom, quantile in enumerate(STUDENT, start=1):
        x = np.linspace(0, quantile, 200_001)
        scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
        density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        assert np.trapezoid(density, x) == pytest.approx(0.475, abs=3e-5)


def test_a_mean_of_one_value_has_no_interval():
    assert t_interval([2.0]) == (None, None)
