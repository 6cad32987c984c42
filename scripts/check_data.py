"""Look at a file of training data before training on it: what its rows hold, and which of them are bad.

    uv run python -m dataset.check dataset/pretrain_hq.jsonl

The file is read to its end by the same functions as in training, so that what is a bad row here is one there. Exit code
0: every row can be used; 1: some cannot, or nothing is left to train on; 2: the file cannot be read at all.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from dataset.jsonl import open_text, text_format
from dataset.preferences import PreferenceData
from dataset.pretrain import PretrainData
from dataset.sft import SFTData
from dataset.survey import Survey, kind_of_rows
from dataset.tokenizer import load_tokenizer
from scripts.engine.cli import parse_args, refuse_idle, run
from scripts.engine.files import require_output, write_json

BAR = 40  # columns


@dataclass(frozen=True)
class CheckConfig:
    """What is checked."""

    file: Annotated[Path, "training data: .jsonl or .txt, either may be .gz"]
    kind: Annotated[
        Literal["auto", "text", "chat", "pairs"],
        "what its rows are: documents, conversations or pairs of replies; auto = by the fields of the first ones",
    ] = "auto"
    tokenizer_dir: Annotated[Path, "directory with tokenizer.json and tokenizer_config.json"] = Path(".")
    max_seq_len: Annotated[int | None, "tokens per row in training (none: the default of its command)"] = None
    jsonl_field: Annotated[str, "field of a JSONL row that holds the document"] = "text"
    json: Annotated[Path | None, "also write what was found to this file"] = None


class Kind(NamedTuple):
    """What is trained on rows of one kind."""

    told: str
    flags: type  # of its data
    commands: tuple[str, ...]


SFT_START, DPO_START = "weights/minimind_pretrain_state_dict.pt", "weights/minimind_sft_state_dict.pt"
KINDS = {
    "text": Kind(
        "documents", PretrainData, ("scripts.train.train_pretrain", "scripts.train.diffusion --train --use-tokenizer")
    ),
    "chat": Kind("conversations", SFTData, (f"scripts.train.train_sft_minimind --load-from {SFT_START}",)),
    "pairs": Kind("pairs of replies", PreferenceData, (f"scripts.train.train_dpo_minimind --load-from {DPO_START}",)),
}


def main(argv: list[str] | None = None) -> None:
    config, given = parse_args(__doc__, CheckConfig, argv=argv)
    open_text(config.file).close()  # a missing file gets its message here
    require_output(config.json, "--json", config.file, config.tokenizer_dir)
    kind = config.kind
    if kind == "auto":
        kind = "text" if "jsonl_field" in given else kind_of_rows(config.file, config.jsonl_field)
    elif kind != "text" and text_format(config.file) == ".txt":
        raise ValueError(f"--kind {kind}: {config.file} is plain text; expected .jsonl")
    in_fields = kind == "text" and text_format(config.file) == ".jsonl"
    refuse_idle(given, jsonl_field=(in_fields, "JSONL rows of documents"))
    flags = {"tokenizer_dir": config.tokenizer_dir}
    if in_fields:
        flags["jsonl_field"] = config.jsonl_field
    if config.max_seq_len is not None:
        flags["max_seq_len"] = config.max_seq_len
    data = KINDS[kind].flags(data=config.file, **flags)  # which refuses what training would
    survey = Survey(config.file, kind, load_tokenizer(data.tokenizer_dir), data.max_seq_len, config.jsonl_field)
    found = survey.result
    print("\n".join(page(found)), end="\n\n")
    trouble = verdict(found)
    print("\n".join([*(trouble or ["Sound: every row can be used."]), *training(data, found)]))
    if config.json is not None:
        write_json(config.json, found)
    if trouble:
        sys.exit(1)


# -- what was found ----------------------------------------------------------------------------------------------------


def page(found: dict[str, Any]) -> list[str]:
    """Lines for people on what `Survey` found."""
    unpacked = f", {found['unpacked_bytes']:,} unpacked" if found["unpacked_bytes"] != found["bytes"] else ""
    lines = [
        f"{found['file']}: {KINDS[found['kind']].told}",
        fact("file", f"{found['bytes']:,} bytes{unpacked}; SHA-256 {found['data_sha256'][:16]}..."),
        fact("rows", rows(found)),
        fact("copies", copies(found)),
        *(
            fact(f"language {name}", language(counts, found["used_rows"]))
            for name, counts in found["languages"].items()
        ),
        *(fact(name, text) for name, text in DETAILS[found["kind"]](found)),
        fact("control tokens", control_tokens(found)),
    ]
    if found["used_rows"]:
        lines += ["", *histogram(found)]
    if found["bad_rows"]:
        lines += ["", f"bad rows: {found['bad_rows']:,}"]
        lines += [f"  {count:8,}  {reason}" for reason, count in found["bad_by_reason"].items()]
        shown = found["first_bad"]
        lines += [f"the first {len(shown)}:" if len(shown) < found["bad_rows"] else "one by one:"]
        lines += [f"  {row}" for row in shown]
    return lines


def fact(name: str, text: str) -> str:
    return f"  {name:15} {text}"


def share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def rows(found: dict[str, Any]) -> str:
    parts = [f"{found['used_rows']:,} used", f"{found['empty_rows']:,} empty", f"{found['bad_rows']:,} bad"]
    if text_format(Path(found["file"])) == ".txt":
        return f"{found['lines']:,} lines, cut into {found['used_rows']:,} documents; {parts[2]}"
    blank = found["lines"] - found["rows"]
    return f"{found['rows']:,}: {', '.join(parts)}" + (f"; blank lines: {blank:,}" if blank else "")


def copies(found: dict[str, Any]) -> str:
    examples = ", ".join(f"row {copy} repeats row {original}" for copy, original in found["first_copies"])
    more = ", ..." if found["copies"] > len(found["first_copies"]) else ""
    return f"{found['copies']:,}: {examples}{more}" if examples else "none"


def language(counts: dict[str, int], used_rows: int) -> str:
    compression = f"{counts['characters'] / max(counts['text_tokens'], 1):.2f} characters per token"
    return f"{counts['rows']:,} rows ({share(counts['rows'], used_rows)}), {compression}"


def control_tokens(found: dict[str, Any]) -> str:
    if not found["control_tokens"]:
        return "spelled in no row"
    names = ", ".join(f"{name} in {count:,}" for name, count in list(found["control_tokens"].items())[:5])
    where = ", ".join(map(str, found["first_spelling_rows"]))
    told = f"spelled in {found['counts']['spelling_rows']:,} rows, first in row {where}: {names}; text to training"
    if found["kind"] != "text":
        return told
    barred = found["counts"]["barred_rows"]
    told += ", unless it is told --control-tokens"
    return told + (f", to which rows that spell mask or padding are bad ({barred:,})" if barred else "")


def _of_text(found: dict[str, Any]) -> list[tuple[str, str]]:
    counts, limit = found["counts"], found["max_seq_len"]
    longer = share(counts.get("longer", 0), found["used_rows"])
    return [
        ("tokens", f"{counts.get('tokens', 0):,}, BOS and EOS included"),
        ("longer", f"{longer} of documents than {limit} tokens: they go on in the next row, nothing is cut"),
    ]


def _of_chat(found: dict[str, Any]) -> list[tuple[str, str]]:
    counts = found["counts"]
    roles = ", ".join(f"{counts.get(f'{role} messages', 0):,} of {role}" for role in ("system", "user", "assistant"))
    several, empty = counts.get("several_replies", 0), counts.get("empty_replies", 0)
    return [
        ("messages", roles),
        ("replies", f"{several:,} conversations have several; {empty:,} replies are empty and left out"),
        *((f"shortened, {told}", shortened(found, name)) for name, told in (("ar", "AR"), ("diffusion", "dLM"))),
    ]


def _of_pairs(found: dict[str, Any]) -> list[tuple[str, str]]:
    counts = found["counts"]
    longer = share(counts.get("longer_chosen", 0), found["used_rows"])
    return [
        ("replies", f"{counts.get('equal_replies', 0):,} pairs are equal and left out; {longer} chosen are the longer"),
        ("shortened", shortened(found, "pairs")),
    ]


DETAILS = {"text": _of_text, "chat": _of_chat, "pairs": _of_pairs}


def shortened(found: dict[str, Any], name: str) -> str:
    rows, tokens, lost, cut, prompts, replies = (
        found["counts"].get(f"{name} {what}", 0)
        for what in ("rows", "tokens", "lost", "shortened", "cut_prompts", "cut_replies")
    )
    told = f"{cut:,} of {rows:,} rows ({share(cut, rows)}) to {found['max_seq_len']} tokens, {share(lost, tokens)} of"
    return f"{told} tokens lost: {prompts:,} beginnings of prompts, {replies:,} ends of replies"


def histogram(found: dict[str, Any]) -> list[str]:
    """Rows by length, in tokens and in characters, each line twice as long as the one before."""
    tokens: dict[int, int] = {}
    for length, count in found["lengths"].items():
        tokens[int(length).bit_length()] = tokens.get(int(length).bit_length(), 0) + count
    characters = {int(size): count for size, count in found["characters_by_bit_length"].items()}
    highest = max(*tokens.values(), *characters.values())
    lines = [f"  {'length':>15}  {'rows by tokens':{BAR + 10}}rows by characters"]
    for size in range(min(*tokens, *characters), max(*tokens, *characters) + 1):
        span = f"{2 ** (size - 1):,} to {2**size - 1:,}" if size else "0"
        bars = [f"{part.get(size, 0):9,} {bar(part.get(size, 0), highest)}" for part in (tokens, characters)]
        lines.append(f"  {span:>15}  {bars[0]:{BAR + 10}}{bars[1]}".rstrip())
    longest = found["longest"]
    return [*lines, f"  {quantiles(found)}, longest {longest['tokens']:,} (row {longest['row']:,})"]


def bar(count: int, highest: int) -> str:
    return "#" * -(-count * (BAR - 2) // highest)


def quantiles(found: dict[str, Any]) -> str:
    told, below = [], 0
    wanted = [(0.5, "half of the rows"), (0.9, "90 %"), (0.99, "99 %")]
    for length, count in found["lengths"].items():
        below += count
        while wanted and below >= wanted[0][0] * found["used_rows"]:
            told.append(f"{wanted.pop(0)[1]} have up to {int(length):,}")
    return f"tokens: {', '.join(told)}"


# -- what to do --------------------------------------------------------------------------------------------------------


def verdict(found: dict[str, Any]) -> list[str]:
    """Lines on what is wrong, none if nothing is."""
    lines, learnt = [], has_content(found)
    if found["bad_rows"]:
        remedy = "Correct or delete them, or leave them out with --on-bad-row skip."
        remedy = remedy if learnt else "Correct them: without them there is nothing to train on."
        lines.append(f"Bad rows: {found['bad_rows']:,} ({share(found['bad_rows'], found['rows'])}). {remedy}")
    return lines if lines or learnt else ["Nothing to train on."]


def has_content(found: dict[str, Any]) -> bool:
    """Whether the rows that can be used hold anything to learn from."""
    counts = found["counts"]
    if found["kind"] == "chat":
        return counts.get("replies", 0) > counts.get("empty_replies", 0)
    return found["used_rows"] > counts.get("equal_replies", 0) + counts.get("blank_rows", 0)


def training(data: Any, found: dict[str, Any]) -> list[str]:
    """The commands that train on the file."""
    if not has_content(found):
        return []
    flags = {"data": data.data}
    for name in ("jsonl_field", "tokenizer_dir", "max_seq_len"):
        if hasattr(data, name) and getattr(data, name) != getattr(type(data), name):
            flags[name] = getattr(data, name)
    if found["bad_rows"]:
        flags["on_bad_row"] = "skip"
    typed = " ".join(f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in flags.items())
    commands = [f"  uv run python -m {command} {typed}" for command in KINDS[found["kind"]].commands]
    return ["Train on it:", *commands]


if __name__ == "__main__":
    run(main)
