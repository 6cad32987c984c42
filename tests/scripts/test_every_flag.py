"""What holds for every flag of every command: its help, its range, what it needs to have an effect."""

import itertools
import math
from typing import Any, Literal, get_args, get_origin

import pytest

from model.ranges import parse_range
from scripts.engine import cli
from scripts.engine.flags import Flag, Need, spelling
from tests.scripts.commands import COMMANDS, module_of

CHECKPOINTS = ["--minimind-checkpoint", "a.pt", "--diffusion-checkpoint", "b.pt"]
REQUIRED = {  # what a command asks for before anything else
    "scripts.eval.eval_sft": [*CHECKPOINTS, "--eval-data", "chats.jsonl"],
    "scripts.eval.eval_sft_one_prompt": [*CHECKPOINTS, "--prompt", "a"],
    "scripts.eval.report": CHECKPOINTS,
    "dataset.check": ["text.jsonl"],
}
BESIDE = {"--cond-ll-response": ["--prompt", "a"], "--streaming": ["--steps-per-epoch", "9"]}  # what a flag asks for


def call(command: str) -> tuple[tuple[type, ...], dict[str, Any]]:
    """The groups that a command parses its arguments into, and what it changes of them."""
    calls = []

    def parse_args(description, *groups, argv=None, later=(), **options):
        calls.append((groups, options))
        raise KeyboardInterrupt

    module = module_of(command)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "parse_args", parse_args)
        module.main([])
    return calls[0]


def flags(command: str) -> list[Flag]:
    groups, options = call(command)
    return [flag for section in cli._sections(groups, options.pop("needs", {}), options) for flag in section.flags]


def types(flag: Flag) -> set[Any]:
    """The types of its values, and of the elements of its lists."""
    kinds = [kind for kind in get_args(flag.kind) or (flag.kind,) if get_origin(flag.kind) is not Literal]
    return {*kinds, *itertools.chain.from_iterable(get_args(kind) for kind in kinds if get_origin(kind) is tuple)}


def outside(flag: Flag, rule: str) -> list[str]:
    """Values that are not in a range of a flag."""
    numbers = parse_range(rule)
    if numbers.rising:
        return ["0.2,0.1", "0.1,0.1"] if float in types(flag) else ["2,1", "1,1"]
    bounds = [(numbers.low, numbers.open_low, -1), (numbers.high, numbers.open_high, 1)]
    values = [bound if is_open else bound + step for bound, is_open, step in bounds if math.isfinite(bound)]
    return [*map(str, values), "nan", "inf", "-inf"] if float in types(flag) else [str(int(v)) for v in values]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_has_a_range_and_every_flag_a_help(name):
    for flag in flags(name):
        assert flag.help and not flag.help.startswith(("--", "with ", "without ", "at least", "above", "in (", "in ["))
        assert flag.ranges or not types(flag) & {int, float}, flag.name


@pytest.mark.parametrize("name", COMMANDS)
def test_a_number_outside_its_range_is_refused_and_nothing_is_written(name, refused):
    for flag in flags(name):
        for value in itertools.chain.from_iterable(outside(flag, rule) for rule in flag.ranges):
            argv = [*REQUIRED.get(name, []), f"{spelling(flag.name)}={value}"]
            refused(module_of(name), argv, spelling(flag.name))


def typed(flag: Flag) -> list[list[str]]:
    """Ways to type a flag, some of which mean that it is set, and some that it is not."""
    option, kinds = spelling(flag.name), types(flag)
    choices = [choice for kind in (flag.kind, *kinds) if get_origin(kind) is Literal for choice in get_args(kind)]
    if bool in kinds:
        return [[option, *BESIDE.get(option, [])], [f"--no-{flag.name.replace('_', '-')}"]]
    if kinds & {int, float}:
        default = ",".join(map(str, flag.default)) if isinstance(flag.default, tuple) else flag.default
        return [[f"{option}={value}"] for value in (default, 1, 0.5, 0, 20)]
    return [[f"{option}={value}", *BESIDE.get(option, [])] for value in choices or ["x.jsonl"]]


def outcomes(command: str, flag: Flag, need: Need) -> set[bool]:
    """Whether the flag is refused for this need alone, over many command lines."""
    groups, options = call(command)
    others = {option: other for other in flags(command) for option in (spelling(other.name), *other.aliases)}
    beside = itertools.chain([[]], *(typed(others[option]) for option in need.conditions))
    refused = set()
    for parts in itertools.product(([], REQUIRED.get(command, [])), typed(flag), beside):
        try:
            *_, given = cli.parse_args("", *groups, argv=list(itertools.chain(*parts)), later=groups, **options)
        except SystemExit:  # for another reason
            continue
        given.needs = dict.fromkeys(given, ()) | {flag.name: (need,)}
        try:
            given.refuse_idle(*given.configs)
            refused.add(False)
        except ValueError as error:
            assert str(error) == need.refusal(flag.name)
            refused.add(True)
    return refused


def needs_on_flags() -> dict[tuple[str, str], tuple[str, Flag, Need]]:
    """Every need on other flags, once: (field, need) -> command, flag, need."""
    return {
        (flag.name, need.text): (command, flag, need)
        for command in COMMANDS
        for flag in flags(command)
        for need in flag.needs
        if need.fact is None
    }


def test_every_need_can_be_met_and_a_flag_is_refused_where_it_is_not():
    needs = needs_on_flags()
    assert len(needs) > 60
    assert not [key for key, declared in needs.items() if outcomes(*declared) != {True, False}]
