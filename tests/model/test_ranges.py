"""Ranges in annotations: what they let through."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from model.ranges import check_ranges, parse_range


@pytest.mark.parametrize(
    "text, inside, outside",
    [
        ("at least 1", [1, 7, 1.5, None], [0, -1, 0.99, math.inf, math.nan]),
        ("above 0", [1e-9, None], [0, 0.0, -1, math.inf, math.nan]),
        ("at most 8", [8, -3], [8.5, 9, -math.inf]),
        ("below 1", [0.99], [1, 1.0]),
        ("in [0, 1]", [0, 1, 0.5], [-0.1, 1.1, math.nan]),
        ("in (0, 0.5)", [0.25], [0, 0.5]),
        ("in [0, 2^32)", [0, 2**32 - 1], [2**32, -1]),
        ("at least 1", [(1, 2), ()], [(1, 0), (math.inf,)]),
        ("rising", [(1, 2), (0.5,), None], [(2, 1), (1, 1)]),
    ],
)
def test_what_a_range_holds(text, inside, outside):
    values = parse_range(text)
    assert [values.holds(value) for value in inside] == [True] * len(inside)
    assert [values.holds(value) for value in outside] == [False] * len(outside)


@pytest.mark.parametrize("text", ["at least", "at least one", "in [0, 1", "in [0,1]", "positive", ""])
def test_what_is_no_range_is_a_fault_of_the_program(text):
    with pytest.raises(TypeError):
        parse_range(text)


@dataclass(frozen=True)
class Shape:
    hidden_size: Annotated[int | None, "width", "--width", "at least 1", "with --deep"] = 8
    activation: Annotated[Literal["relu", "silu"], "activation"] = "silu"
    attention: Literal["causal", "full"] = "causal"

    def __post_init__(self):
        check_ranges(Shape, vars(self))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"hidden_size": 0}, "--hidden-size must be at least 1, not 0"),
        ({"activation": "tanh"}, "--activation must be one of relu, silu, not tanh"),
        ({"attention": "block"}, "attention must be one of causal, full, not block"),
    ],
)
def test_a_value_out_of_its_range_is_named(values, words):
    Shape(hidden_size=None)
    with pytest.raises(ValueError) as error:
        Shape(**values)
    assert str(error.value) == words
