"""Command lines from config dataclasses, and the one place where a user's mistake becomes a sentence."""

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        typed = re.match("unrecognized arguments: (--[^ =]+)", message)
        near = difflib.get_close_matches(typed[1], self._option_string_actions, n=1) if typed else []
        meant = f"did you mean {near[0]}? " if near else ""
        _say(f"error: {message} ({meant}--help lists the flags)")
        self.exit(2)


def parse_args(description: str, *groups: type, argv: list[str] | None = None, **defaults: Any) -> tuple:
    """Parse argv into one instance of each dataclass in `groups`, in order, and last the frozenset of the fields typed.

    A field `max_seq_len: Annotated[int, "help", *aliases]` becomes --max-seq-len INT; a bool becomes --flag/--no-flag;
    a Literal lists its choices; `tuple[X, ...]` is a list with commas; `X | None` may be left out; a field without
    default is positional; one without help text is not a flag. An alias may be a pair ("--flag", value): a switch
    without argument that stands for the value, unless the field's own flag says another. Underscores in flags read as
    hyphens. `defaults` override field defaults for this command. ValueError from a dataclass's own checks is reported
    as a usage error.
    """
    command = re.search(r"python -m (\S+)", description)
    module = command[1] if command else "MODULE"
    places = [f.name.upper() for group in groups for f in fields(group) if f.default is MISSING]
    parser = _Parser(
        usage=" ".join(["uv run python -m", module, *places, "[FLAGS]"]),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for group in groups:
        title = (group.__doc__ or group.__name__).partition("\n")[0].partition(";")[0].rstrip(".")
        section = parser.add_argument_group(title)
        for name, kind, text, aliases, switches in _flags(group):
            default = defaults.pop(name, group.__dataclass_fields__[name].default)
            if default is MISSING:
                section.add_argument(
                    name, help=text.replace("%", "%%"), **_conversion(kind) | {"metavar": name.upper()}
                )
            else:
                _add_flag(section, name, kind, text, aliases, switches, default)
            parser.set_defaults(**{"default:" + name: default})
    if defaults:
        raise TypeError(f"no such field: {sorted(defaults)}")
    values = vars(parser.parse_args([_hyphens(a) for a in (sys.argv[1:] if argv is None else argv)]))
    for name in [name for name in values if name.startswith("switch:")]:
        values.setdefault(name.removeprefix("switch:"), values.pop(name))
    given = frozenset(name for name in values if not name.startswith("default:"))
    try:
        made = [group(**{n: values.get(n, values["default:" + n]) for n, *_ in _flags(group)}) for group in groups]
    except ValueError as error:
        parser.error(str(error))
    return (*made, given)


def _add_flag(
    section: Any, name: str, kind: Any, text: str, aliases: list[str], switches: list[tuple[str, Any]], default: Any
) -> None:
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    shown = "none" if default is None else shown
    section.add_argument(
        *dict.fromkeys(["--" + name.replace("_", "-"), *aliases]),
        dest=name,
        default=argparse.SUPPRESS,
        help=f"{text} [{shown}]".replace("%", "%%"),
        **_conversion(kind),
    )
    for flag, value in switches:
        hint = f"as --{name.replace('_', '-')} {value}"
        section.add_argument(
            flag, dest="switch:" + name, action="store_const", const=value, default=argparse.SUPPRESS, help=hint
        )


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
        from model.checkpoint import is_out_of_memory

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
        from scripts.engine.training.distributed import first_to_say

        if not first_to_say(sentence):
            return
    print(sentence, file=sys.stderr)


def refuse_idle(given: frozenset[str], **needs: tuple[bool, str]) -> None:
    """needs: field=(whether it has an effect, what it takes). ValueError for a typed flag that would be ignored."""
    for name, (used, condition) in needs.items():
        if name in given and not used:
            raise ValueError(f"--{name.replace('_', '-')} has no effect without {condition}; leave it out")


def _hyphens(argument: str) -> str:
    """--some_flag and --some_flag=value with hyphens; anything else, such as a prompt, stays as it was typed."""
    return re.sub(r"^--[\w-]+(?==|$)", lambda flag: flag[0].replace("_", "-"), argument)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


_finite.__name__ = "number"  # argparse names it to the user


def _listed(member: type) -> Callable[[str], tuple]:
    def convert(text: str) -> tuple:
        return tuple((_finite if member is float else member)(part) for part in text.split(","))

    convert.__name__ = "list of numbers with commas"
    return convert


def _conversion(kind: Any) -> dict[str, Any]:
    kinds = [t for t in get_args(kind) if t is not type(None)] if type(None) in get_args(kind) else [kind]
    if kinds[0] is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kinds[0]) is Literal:
        return {"choices": get_args(kinds[0]), "type": type(get_args(kinds[0])[0])}
    if get_origin(kinds[0]) is tuple:
        member = get_args(kinds[0])[0]
        return {"type": _listed(member), "metavar": f"{member.__name__.upper()},..."}
    return {"type": _finite if kinds[0] is float else kinds[0], "metavar": kinds[0].__name__.upper()}


def _flags(group: type) -> list[tuple[str, Any, str, list[str], list[tuple[str, Any]]]]:
    """(name, type, help, aliases, switches) of each annotated field."""
    hints = get_type_hints(group, include_extras=True)
    found = []
    for name, hint in hints.items():
        if hasattr(hint, "__metadata__"):
            text, *more = hint.__metadata__
            aliases, switches = ([m for m in more if isinstance(m, kind)] for kind in (str, tuple))
            found.append((name, hint.__origin__, text, aliases, switches))
    return found
