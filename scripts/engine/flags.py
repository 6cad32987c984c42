"""Flags: each is declared once, in the annotation of a dataclass field. After type and help come, in any order,

"--lr"                                another name
("--fast", 8)                         a switch without argument that stands for the value 8
"at least 1", "in [0, 1]", ...        the range of its values: model/ranges.py
"with --mask-schedule iid_t or wsd"   what it needs to have an effect: `Need`
"""

import argparse
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from dataset.corpus.bundled import with_bundled
from model.ranges import Range, is_range, parse_range

DATA = ("data", "eval_data", "file")  # fields that name files of data, which may be bundled: bundled:tasks


def spelling(field: str) -> str:
    return "--" + field.replace("_", "-")


@dataclass(frozen=True)
class Need:
    """What a flag needs to have an effect: something of another flag, or a fact that only the command knows.

        "with --early-stop-patience"          it is set: neither none, false, 0 nor an empty list
        "with --mask-schedule iid_t or wsd"   it is one of these; of a list, one element is
        "with --gen-temp above 0"             it is in this range
        "with --prompt or --infill"           one of both is set
        "without --streaming"                 the opposite, also of values and ranges
        "with a diffusion model"              the fact of this name

    TypeError for any other text.
    """

    text: str

    def __post_init__(self):
        if not re.match(r"(with|without) \S", self.text):
            raise TypeError(f"{self.text!r} is no need")
        _ = self.conditions

    @property
    def positive(self) -> bool:
        return self.text.startswith("with ")

    @property
    def rest(self) -> str:
        """The text after "with" or "without"."""
        return self.text.partition(" ")[2]

    @property
    def fact(self) -> str | None:
        return None if self.rest.startswith("--") else self.rest

    @property
    def conditions(self) -> dict[str, Range | list[str]]:
        """flag -> its range or its values, of which one must hold; no values: it is set. Empty for a fact."""
        conditions: dict[str, Range | list[str]] = {}
        for part in re.split(", | or ", self.rest) if self.fact is None else ():
            if part.startswith("--"):
                flag, _, value = part.partition(" ")
                in_range = re.match("(at least|above|at most|below|in) ", value)
                conditions[flag] = parse_range(value) if in_range else [value] if value else []
            else:
                conditions[flag] += [part]
        return conditions

    def holds(self, values: Callable[[str], Iterable[Any]]) -> bool:
        """values(flag): those that it has in this command; one that will do is enough."""
        conditions = self.conditions.items()
        if self.positive:
            return any(_meets(value, allowed) for flag, allowed in conditions for value in values(flag))
        return all(any(not _meets(value, allowed) for value in values(flag)) for flag, allowed in conditions)

    def refusal(self, name: str) -> str:
        return f"{spelling(name)} has no effect {'without' if self.positive else 'with'} {self.rest}; leave it out"


def _meets(value: Any, allowed: Range | list[str]) -> bool:
    if isinstance(allowed, Range):
        return value is not None and allowed.holds(value)
    if not allowed:
        return value not in (None, False, 0, ())
    return not {str(part) for part in (value if isinstance(value, tuple) else (value,))}.isdisjoint(allowed)


@dataclass(frozen=True)
class Flag:
    """The declaration of a flag."""

    name: str  # of the field
    kind: Any
    help: str
    default: Any
    aliases: tuple[str, ...] = ()
    switches: tuple[tuple[str, Any], ...] = ()
    ranges: tuple[str, ...] = ()
    needs: tuple[Need, ...] = ()

    @classmethod
    def declared(cls, name: str, hint: Any, default: Any) -> "Flag":
        """From the annotation of a field. TypeError for an extra that is none of those at the top of this file."""
        text, *extras = hint.__metadata__
        switches = tuple(extra for extra in extras if isinstance(extra, tuple))
        rules = [extra for extra in extras if not isinstance(extra, tuple)]
        aliases = tuple(rule for rule in rules if rule.startswith("--"))
        ranges = tuple(rule for rule in rules if is_range(rule))
        needs = tuple(Need(rule) for rule in rules if rule not in aliases and rule not in ranges)
        for rule in ranges:
            parse_range(rule)
        return cls(name, hint.__origin__, text, default, aliases, switches, ranges, needs)

    def add_to(self, section: Any) -> None:
        """Add it to a group of an argparse parser."""
        help = "; ".join([self.help, *self.ranges, *(need.text for need in self.needs)])
        options = _conversion(self.kind)
        if self.name in DATA:
            options["type"] = _of_data(options["type"])
        if self.default is MISSING:
            section.add_argument(self.name, help=help.replace("%", "%%"), **options | {"metavar": self.name.upper()})
            return
        names = dict.fromkeys([spelling(self.name), *self.aliases])
        help = f"{help} [{_shown(self.default)}]".replace("%", "%%")
        section.add_argument(*names, dest=self.name, help=help, **options)
        for switch, value in self.switches:
            help = f"as {spelling(self.name)} {value}"
            section.add_argument(switch, dest=self.name, action=_Switch, nargs=0, const=value, help=help)


class _Switch(argparse.Action):
    """Stands for a value, unless the flag itself gives another one."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        vars(namespace).setdefault(self.dest, self.const)


@cache
def flags_of(group: type) -> tuple[Flag, ...]:
    """The flags of a dataclass: its annotated fields."""
    hints = get_type_hints(group, include_extras=True)
    defaults = {field.name: field.default for field in fields(group)}
    return tuple(Flag.declared(n, hint, defaults[n]) for n, hint in hints.items() if get_origin(hint) is Annotated)


def in_effect(config: Any) -> dict[str, Any]:
    """The settings of a group that have an effect beside the others of the group."""
    flags, values = flags_of(type(config)), vars(config)
    fields = {option: flag.name for flag in flags for option in (spelling(flag.name), *flag.aliases)}

    def holds(need: Need) -> bool:
        return not need.conditions.keys() <= fields.keys() or need.holds(lambda option: [values[fields[option]]])

    return {flag.name: values[flag.name] for flag in flags if all(map(holds, flag.needs))}


def settings_of(*groups: Any) -> dict[str, Any]:
    """Flags and their values, in types that JSON and a checkpoint hold; fields that are no flags are left out."""
    return {flag.name: _plain(getattr(group, flag.name)) for group in groups for flag in flags_of(type(group))}


def defaults_of(*groups: Any) -> dict[str, Any]:
    """The flags of settings_of, with their default values."""
    return {flag.name: _plain(flag.default) for group in groups for flag in flags_of(type(group))}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return str(value) if isinstance(value, Path) else value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


_finite.__name__ = "number"  # argparse names it to the user


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return "none" if default is None else str(default)


def _of_data(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a parser of files of data, of which some may be bundled."""

    def of_data(text: str) -> Any:
        try:
            return convert(with_bundled(text))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return of_data


def _elements(member: Any) -> Callable[[str], tuple]:
    """Return a parser of comma lists of `member`."""
    options = _conversion(member)
    choices = options.get("choices")

    def convert(text: str) -> tuple:
        values = []
        for part in map(str.strip, text.split(",")):
            try:
                values.append(options["type"](part))
            except ValueError:
                part = ""
            if not part:
                raise argparse.ArgumentTypeError(f"{text!r} is no list of {plural} with commas")
            if choices and values[-1] not in choices:
                raise argparse.ArgumentTypeError(f"{part!r} is not one of {', '.join(map(str, choices))}")
        return tuple(values)

    plural = {int: "whole numbers", float: "numbers", Path: "files"}.get(member, "names")
    return convert


def _conversion(kind: Any) -> dict[str, Any]:
    """Return argparse's keyword arguments for a type."""
    kinds = [member for member in get_args(kind) if member is not type(None)]
    if type(None) in get_args(kind):
        kind = kinds[0]
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind), "type": type(get_args(kind)[0])}
    if get_origin(kind) is tuple:
        member = get_args(kind)[0]
        choices = ",".join(map(str, get_args(member)))
        return {
            "type": _elements(member),
            "metavar": f"{{{choices}}},..." if choices else f"{member.__name__.upper()},...",
        }
    return {"type": _finite if kind is float else kind, "metavar": kind.__name__.upper()}
