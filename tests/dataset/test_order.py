"""Which rows a step sees: every row once per epoch, alike in length, and a function of (seed, step)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.order import STEPS_PER_WINDOW, LengthOrder, RowOrder

SIZES = st.tuples(st.integers(1, 70), st.integers(1, 9), st.integers(0, 3))


def by_length(num_rows: int, rows_per_step: int, seed: int, lengths: np.ndarray) -> LengthOrder:
    return LengthOrder(
        RowOrder(num_rows, seed).visits, lambda visits: lengths[visits % num_rows], num_rows, seed, rows_per_step
    )


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_every_epoch_visits_every_row_within_its_own_steps(sizes):
    num_rows, per_step, seed = sizes
    order = by_length(num_rows, per_step, seed, np.arange(num_rows) * 7 % 11)
    total = 3 * num_rows
    whole = order(0, -(-total // per_step) * per_step)
    assert len(set(whole.tolist())) == len(whole), "a visit came twice"
    for epoch in range(3):
        begin, end = (-(-e * num_rows // per_step) * per_step for e in (epoch, epoch + 1))
        inside = set(whole[:end].tolist()) - set(whole[:begin].tolist())
        # A row of this epoch may have completed the last step of the one before.
        expected = set(range(epoch * num_rows, (epoch + 1) * num_rows)) - set(whole[:begin].tolist())
        assert expected <= inside


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(0, 200), st.integers(1, 40))
def test_any_stretch_is_the_same_whoever_asks_for_it(sizes, start, count):
    num_rows, per_step, seed = sizes
    lengths = np.arange(num_rows) * 7 % 11
    whole = by_length(num_rows, per_step, seed, lengths)(0, 260)
    assert by_length(num_rows, per_step, seed, lengths)(start, count).tolist() == whole[start : start + count].tolist()


def test_the_rows_of_a_step_are_alike_in_length_and_steps_come_in_random_order():
    lengths = np.random.default_rng(0).integers(1, 500, 8000)
    order = by_length(8000, 16, 1, lengths)
    steps = lengths[order(0, 8000)].reshape(-1, 16)
    assert (steps.max(axis=1) - steps.min(axis=1)).mean() < 500 / STEPS_PER_WINDOW * 1.5
    firsts = steps[:STEPS_PER_WINDOW].mean(axis=1)
    assert abs(np.corrcoef(firsts, np.arange(STEPS_PER_WINDOW))[0, 1]) < 0.5, "sorted, not shuffled"


def test_the_seed_orders_the_steps_of_a_stream_which_has_no_order_of_its_own():
    orders = [LengthOrder(lambda start, n: np.arange(start, start + n), lambda v: v % 7, 2**62, s, 2) for s in (1, 2)]
    first, second = (order(0, 100).tolist() for order in orders)
    assert first != second and sorted(first) == sorted(second) == list(range(100))


@pytest.mark.parametrize("seed", [0, 1337])
def test_an_epoch_is_numpys_permutation_from_seed_and_epoch(seed):
    """Published runs depend on it; going back to an earlier epoch gives its order again."""
    epochs = [np.random.default_rng([seed, epoch]).permutation(50) for epoch in range(3)]
    order = RowOrder(50, seed)
    for start, count in ((0, 150), (20, 60), (0, 10)):
        assert order(start, count).tolist() == np.concatenate(epochs)[start : start + count].tolist()


@pytest.mark.parametrize("other", [{"seed": 2}, {"start": 320}])
def test_another_seed_and_another_epoch_group_the_rows_otherwise(other):
    lengths = np.random.default_rng(0).integers(1, 500, 320)
    first = by_length(320, 8, 1, lengths)(0, 320) % 320
    second = by_length(320, 8, other.get("seed", 1), lengths)(other.get("start", 0), 320) % 320
    assert sorted(first) == sorted(second) == list(range(320))
    groups = [{frozenset(step.tolist()) for step in entries.reshape(-1, 8)} for entries in (first, second)]
    assert len(groups[0] & groups[1]) == 0
