"""Command lines from config dataclasses, and the one place where a user's mistake becomes a sentence."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, replace
from typing import Any, NamedTuple, NoReturn

from model.files import is_out_of_memory
from model.ranges import check_ranges
from scripts.engine.flags import Flag, Need, flags_of

SHORT = {"length": "len", "sequence": "seq", "temperature": "temp", "dataset": "data", "output": "out"}  # as flags have

Needs = Mapping[type | str, str | tuple[str, ...]]


class TypedFlags(frozenset[str]):
    """The fields whose flags were typed; those without effect are refused."""

    configs: tuple[Any, ...]  # of the whole command
    needs: Mapping[str, tuple[Need, ...]]  # field -> what its flag needs
    fields: Mapping[str, str]  # flag, by any of its names -> its field

    def __new__(cls, names: Iterable[str], configs: tuple, needs: Mapping, fields: Mapping) -> "TypedFlags":
        typed = super().__new__(cls, names)
        typed.configs, typed.needs, typed.fields = configs, needs, fields
        return typed

    def refuse_idle(self, *configs: Any) -> None:
        """Raise ValueError for a typed flag of `configs` that has no effect beside the values of other flags.

        Several of the configs may be of one group, such as those of samplers that are tried one after the other: a flag
        has an effect if it has one in any of them.
        """
        for name in sorted(self):
            unmet = [self._unmet(name, config, configs) for config in configs if name in vars(config)]
            if unmet and all(unmet):
                raise ValueError(unmet[0].refusal(name))

    def refuse_without(self, facts: Mapping[str, bool]) -> None:
        """Raise ValueError for a typed flag that has no effect because one of these facts holds or does not hold."""
        for name in sorted(self):
            for need in self.needs[name]:
                if need.fact in facts and facts[need.fact] != need.positive:
                    raise ValueError(need.refusal(name))

    def _unmet(self, name: str, config: Any, configs: tuple[Any, ...]) -> Need | None:
        """The first need on other flags that does not hold for a flag of `config`."""

        def values(flag: str) -> list[Any]:
            """Its value in `config`, else those in `configs`, else that in the whole command."""
            field, places = self.fields[flag], (config,)
            for others in (configs, self.configs):
                places = places if any(field in vars(place) for place in places) else others
            return [vars(place)[field] for place in places if field in vars(place)]

        return next((need for need in self.needs[name] if need.fact is None and not need.holds(values)), None)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        typed = re.match("unrecognized arguments: ([-\u2013\u2014]+)([^ =]+)", message)  # also dashes of printed text
        near = meant(typed[2], self._option_string_actions) if typed else []
        advice = f"did you mean {' or '.join(near)}? " if near else ""
        file = re.match("unrecognized arguments: ([^-].*)", message)
        if file and os.path.exists(file[1].split(" ")[0]):  # a shell has spelled the pattern out
            advice = "a pattern that names several files goes between quotes; "
        _say(f"error: {message} ({advice}--help lists the flags)")
        self.exit(2)


def meant(typed: str, options: Mapping[str, Any]) -> list[str]:
    """Return up to three flags that may have been meant by one that does not exist, typed without its hyphens.

    First choice are those with a slip in some words, then those that have all of its words and one or two more. No
    advice is better than a flag that does something else. options: flag, by any of its names -> what it does.
    """
    asked = typed.split("-")
    words = {option: option.lstrip("-").split("-") for option in options}
    slips = [option for option, own in words.items() if "".join(own) == "".join(asked) or _slips(asked, own)]
    longer = [option for option, own in words.items() if len(own) <= len(asked) + 2 and _within(asked, own)]
    found = {options[option]: option for option in reversed(slips or longer)}  # of a flag's names the first
    return sorted(found.values()) if len(found) <= 3 else []


def _slips(words: list[str], others: list[str]) -> bool:
    """Return whether word for word they are almost the same."""
    ratios = (difflib.SequenceMatcher(None, *pair).ratio() for pair in zip(words, others, strict=False))
    return len(words) == len(others) and all(ratio >= 0.75 for ratio in ratios)


def _within(words: list[str], others: list[str]) -> bool:
    """Return whether all words are among the others, in their order."""
    left = iter(others)
    return all(any(other in (word, SHORT.get(word)) for other in left) for word in words)


def parse_args(
    description: str,
    *groups: type,
    argv: list[str] | None = None,
    needs: Needs | None = None,
    later: tuple[type, ...] = (),
    **defaults: Any,
) -> tuple:
    """Parse argv into one instance of each dataclass in `groups`, in order, and last the TypedFlags.

    A field `max_seq_len: Annotated[int, "help", ...]` becomes --max-seq-len INT; a bool becomes --flag/--no-flag; a
    Literal lists its choices; `tuple[X, ...]` is a list with commas; `X | None` may be left out; a field without
    default is positional; one without annotation is no flag. Underscores in flags read as hyphens.

    needs: what all flags of a group, or the flag of a field, need in this command, besides what they declare.
    later: groups whose needs the command checks itself, with TypedFlags.refuse_idle, since it knows more.
    defaults: those of fields in this command. A ValueError from a dataclass is reported as a usage error.
    """
    sections = _sections(groups, needs or {}, defaults)
    parser = _parser(description, sections)
    values = vars(parser.parse_args([_hyphens(a) for a in (sys.argv[1:] if argv is None else argv)]))
    try:
        configs = tuple(section.config(values) for section in sections)
        typed = TypedFlags(values, configs, *_rules(parser, sections))
        typed.refuse_idle(*(config for config in configs if type(config) not in later))
    except ValueError as error:
        parser.error(str(error))
    return (*configs, typed)


class _Section(NamedTuple):
    """A group of flags as a command has it."""

    group: type
    flags: list[Flag]
    needs: tuple[Need, ...]  # of all the flags

    @property
    def title(self) -> str:
        title = getattr(self.group, "title", None) or (self.group.__doc__ or "").partition("\n")[0].rstrip(".")
        return "; ".join([title, *(need.text for need in self.needs)])

    def config(self, values: Mapping[str, Any]) -> Any:
        settings = {flag.name: values.get(flag.name, flag.default) for flag in self.flags}
        check_ranges(self.group, settings)
        return self.group(**settings)


def _sections(groups: tuple[type, ...], needs: Needs, defaults: Mapping[str, Any]) -> list[_Section]:
    """TypeError for needs or defaults of unknown fields."""
    added = {key: tuple(map(Need, [text] if isinstance(text, str) else text)) for key, text in needs.items()}
    sections = []
    for group in groups:
        flags = [
            replace(flag, default=defaults.get(flag.name, flag.default), needs=(*added.get(flag.name, ()), *flag.needs))
            for flag in flags_of(group)
        ]
        sections.append(_Section(group, flags, added.get(group, ())))
    known = {*groups, *(flag.name for section in sections for flag in section.flags)}
    if unknown := {*added, *defaults} - known:
        raise TypeError(f"no such field: {sorted(map(str, unknown))}")
    return sections


def _parser(description: str, sections: list[_Section]) -> _Parser:
    command = re.search(r"python -m (\S+)", description)
    places = [flag.name.upper() for section in sections for flag in section.flags if flag.default is MISSING]
    parser = _Parser(
        usage=" ".join(["uv run python -m", command[1] if command else "MODULE", *places, "[FLAGS]"]),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for section in sections:
        arguments = parser.add_argument_group(section.title)
        for flag in section.flags:
            flag.add_to(arguments)
    return parser


def _rules(parser: _Parser, sections: list[_Section]) -> tuple[dict[str, tuple[Need, ...]], dict[str, str]]:
    """The needs of every flag's field, and the field of every flag. TypeError if needs are on flags that are none."""
    fields = {option: action.dest for action in parser._actions for option in action.option_strings}
    needs = {flag.name: (*section.needs, *flag.needs) for section in sections for flag in section.flags}
    if unknown := {flag for some in needs.values() for need in some for flag in need.conditions} - {*fields}:
        raise TypeError(f"needs name flags that this command does not have: {sorted(unknown)}")
    return needs, fields


def run(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> NoReturn:
    """Run a command and exit: 0 done, 2 with one sentence on stderr for a user's mistake, 130 for Ctrl-C."""
    # Text goes out as UTF-8 whatever the console's code page; Chinese output must not end a run.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        main(argv)
    except BrokenPipeError:  # the reader of our output has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError) as error:
        _say(f"error: {' '.join(str(error).split())}")
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _say("error: out of memory; lower the batch size (--help names it), --max-seq-len or the size of the model")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _say(sentence: str) -> None:
    """Print it on stderr; of the processes that torchrun started, one does."""
    if "WORLD_SIZE" in os.environ:  # torch takes seconds to load, which a wrong flag of one process does not
        from scripts.engine.runtime import first_to_say

        if not first_to_say(sentence):
            return
    print(sentence, file=sys.stderr)


def _hyphens(argument: str) -> str:
    """--some_flag and --some_flag=value with hyphens; anything else, such as a prompt, stays as it was typed."""
    return re.sub(r"^--[\w-]+(?==|$)", lambda flag: flag[0].replace("_", "-"), argument)
