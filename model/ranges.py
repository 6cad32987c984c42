"""Ranges of settings, declared beside them: `dropout: Annotated[float, "what it does", "in [0, 1)"]`.

The first string says what the setting does. Each further one that begins neither with "--" (another name of the flag)
nor with "with" or "without" (what it needs to have an effect, see scripts/engine/cli.py) is a range:

    "at least 1"   "above 0"   "at most 8"   "below 1"   "in [0, 1]"   "in (0, 0.5)"   "in [0, 2^32)"   "rising"

Of a tuple every element lies in the range. A number is finite. None is always allowed.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

NUMBER = r"-?\d+(?:\.\d+)?(?:\^\d+)?"


@dataclass(frozen=True)
class Range:
    """An interval of numbers; with `rising` also an order of the elements of a tuple."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = True  # so that no number is infinite
    open_high: bool = True
    rising: bool = False

    def holds(self, value: Any) -> bool:
        if isinstance(value, tuple):
            return all(map(self.holds, value)) and (not self.rising or list(value) == sorted(set(value)))
        if value is None or self.rising:
            return True
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below


def parse_range(text: str) -> Range:
    """TypeError if `text` is no range."""
    if text == "rising":
        return Range(rising=True)
    if bound := re.fullmatch(rf"(at least|above|at most|below) ({NUMBER})", text):
        value = _number(bound[2])
        is_open = bound[1] in ("above", "below")
        if bound[1] in ("at least", "above"):
            return Range(low=value, open_low=is_open)
        return Range(high=value, open_high=is_open)
    if interval := re.fullmatch(rf"in ([\[(])({NUMBER}), ({NUMBER})([\])])", text):
        return Range(_number(interval[2]), _number(interval[3]), interval[1] == "(", interval[4] == ")")
    raise TypeError(f"{text!r} is no range")


def _number(text: str) -> float:
    base, _, exponent = text.partition("^")
    return float(base) ** int(exponent or 1)


def is_range(rule: Any) -> bool:
    """Return whether an extra of an annotation is a range, not another name of the flag or a need."""
    return isinstance(rule, str) and not rule.startswith(("--", "with ", "without "))


@cache
def _checks(group: type) -> list[tuple[str, str, str, Range | tuple[Any, ...]]]:
    """(field, its name for a user, range in words, range or choices) of every field of a dataclass that has one."""
    checks: list[tuple[str, str, str, Range | tuple[Any, ...]]] = []
    for name, hint in get_type_hints(group, include_extras=True).items():
        kind, rules, shown = hint, (), name
        if get_origin(hint) is Annotated:
            kind, rules, shown = hint.__origin__, hint.__metadata__[1:], "--" + name.replace("_", "-")
        checks += [(name, shown, rule, parse_range(rule)) for rule in rules if is_range(rule)]
        if get_origin(kind) is Literal:
            checks.append((name, shown, "one of " + ", ".join(map(str, get_args(kind))), get_args(kind)))
    return checks


def check_ranges(group: type, values: Mapping[str, Any]) -> None:
    """Raise ValueError if one of `values`, fields of the dataclass `group` by name, is out of range or no choice."""
    for name, shown, words, allowed in _checks(group):
        value = values.get(name)
        if name in values and not (allowed.holds(value) if isinstance(allowed, Range) else value in allowed):
            value = ",".join(map(str, value)) if isinstance(value, tuple) else value
            raise ValueError(f"{shown} must be {words}, not {value}")
