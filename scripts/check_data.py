"""Look at a file of training data before training on it: what its rows hold, and which of them are bad.

    uv run python -m dataset.check dataset/pretrain_hq.jsonl

The file is read to its end by the same functions as in training, so that what is a bad row here is one there. Exit code
0: every row can be used; 1: some cannot, or nothing is left to train on; 2: the file cannot be read at all.
"""

import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from dataset.formats import ROLES
from dataset.jsonl import open_text, text_format
from dataset.preferences import PreferenceData
from dataset.pretrain import PretrainData
from dataset.sft import SFTData
from dataset.survey import Survey, kind_of_rows
from dataset.tokenizer import load_tokenizer
from model.ranges import check_ranges
from scripts.engine.cli import parse_args, run
from scripts.engine.files import require_output, write_json

BAR = 40  # columns


@dataclass(frozen=True)
class CheckConfig:
    """The file to check."""

    file: Annotated[Path, "training data: .jsonl or .txt, either may be .gz"]
    kind: Annotated[
        Literal["auto", "text", "chat", "pairs"],
        "what its rows are: documents, conversations or pairs of replies; auto = by the fields of the first ones",
    ] = "auto"
    tokenizer_dir: Annotated[Path, "directory with tokenizer.json and tokenizer_config.json"] = Path(".")
    max_seq_len: Annotated[
        int | None, "tokens per row in training (none: the default of its command)", "at least 2"
    ] = None
    jsonl_field: Annotated[str, "field of a JSONL row that holds the document", "with JSONL rows of documents"] = "text"
    json: Annotated[Path | None, "also write the result to this file"] = None


class Kind(NamedTuple):
    """One kind of rows: in words, the flags of its data, and the commands that train on it."""

    words: str
    flags: type
    commands: tuple[str, ...]


PRETRAIN = ("scripts.train.train_pretrain", "scripts.train.diffusion --train --use-tokenizer")
SFT = ("scripts.train.train_sft_minimind --load-from weights/minimind_pretrain_state_dict.pt",)
DPO = ("scripts.train.train_dpo_minimind --load-from weights/minimind_sft_state_dict.pt",)
KINDS = {
    "text": Kind("documents", PretrainData, PRETRAIN),
    "chat": Kind("conversations", SFTData, SFT),
    "pairs": Kind("pairs of replies", PreferenceData, DPO),
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
    given.refuse_without({"JSONL rows of documents": in_fields})
    flags = {"tokenizer_dir": config.tokenizer_dir}
    if in_fields:
        flags["jsonl_field"] = config.jsonl_field
    if config.max_seq_len is not None:
        flags["max_seq_len"] = config.max_seq_len
    data = KINDS[kind].flags(data=config.file, **flags)  # which refuses what training would
    check_ranges(type(data), vars(data))
    tokenizer = load_tokenizer(data.tokenizer_dir)
    result = Survey(config.file, kind, tokenizer, data.max_seq_len, config.jsonl_field).result
    fault = fault_of(result)
    print("\n".join(page(result)), end="\n\n")
    print("\n".join([fault or "Sound: every row can be used.", *training_commands(data, result)]))
    if config.json is not None:
        write_json(config.json, result)
    if fault:
        sys.exit(1)


# -- the page ----------------------------------------------------------------------------------------------------------


def page(result: dict[str, Any]) -> list[str]:
    """Lines for people on the result of a Survey."""
    unpacked = f", {result['unpacked_bytes']:,} unpacked" if result["unpacked_bytes"] != result["bytes"] else ""
    facts = [
        ("file", f"{result['bytes']:,} bytes{unpacked}; SHA-256 {result['data_sha256'][:16]}..."),
        ("rows", rows(result)),
        ("copies", copies(result)),
        *languages(result),
        *DETAILS[result["kind"]](result),
        ("control tokens", control_tokens(result)),
    ]
    lines = [f"{result['file']}: {KINDS[result['kind']].words}", *(f"  {name:15} {text}" for name, text in facts)]
    if result["used_rows"]:
        lines += ["", *histogram(result)]
    if result["bad_rows"]:
        lines += ["", *bad_rows(result)]
    return lines


def share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def rows(result: dict[str, Any]) -> str:
    bad = f"{result['bad_rows']:,} bad"
    if text_format(Path(result["file"])) == ".txt":
        return f"{result['lines']:,} lines, cut into {result['used_rows']:,} documents; {bad}"
    blank = result["lines"] - result["rows"]
    counts = f"{result['rows']:,}: {result['used_rows']:,} used, {result['empty_rows']:,} empty, {bad}"
    return counts + (f"; blank lines: {blank:,}" if blank else "")


def copies(result: dict[str, Any]) -> str:
    examples = ", ".join(f"row {copy} repeats row {original}" for copy, original in result["first_copies"])
    rest = ", ..." if result["copies"] > len(result["first_copies"]) else ""
    return f"{result['copies']:,}: {examples}{rest}" if examples else "none"


def languages(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, counts in result["languages"].items():
        compression = f"{counts['characters'] / max(counts['text_tokens'], 1):.2f} characters per token"
        percentage = share(counts["rows"], result["used_rows"])
        yield f"language {name}", f"{counts['rows']:,} rows ({percentage}), {compression}"


def control_tokens(result: dict[str, Any]) -> str:
    if not result["control_tokens"]:
        return "spelled in no row"
    names = ", ".join(f"{name} in {count:,}" for name, count in list(result["control_tokens"].items())[:5])
    first = ", ".join(map(str, result["first_spelling_rows"]))
    counts = result["counts"]
    text = f"spelled in {counts['spelling_rows']:,} rows, first in row {first}: {names}; text to training"
    if result["kind"] == "text":
        text += ", except with --control-tokens"
        if counts["barred_rows"]:
            text += f", where rows that spell mask or padding are bad ({counts['barred_rows']:,})"
    return text


def _of_text(result: dict[str, Any]) -> list[tuple[str, str]]:
    counts = Counter(result["counts"])
    longer = share(counts["longer"], result["used_rows"])
    limit = f"{result['max_seq_len']} tokens: they continue in the next row, nothing is cut"
    return [
        ("tokens", f"{counts['tokens']:,}, BOS and EOS included"),
        ("longer", f"{longer} of documents than {limit}"),
    ]


def _of_chat(result: dict[str, Any]) -> list[tuple[str, str]]:
    counts = Counter(result["counts"])
    several = f"{counts['several_replies']:,} conversations have several"
    return [
        ("messages", ", ".join(f"{counts[f'{role} messages']:,} of {role}" for role in ROLES)),
        ("replies", f"{several}; {counts['empty_replies']:,} replies are empty and left out"),
        ("shortened, AR", shortened(result, "ar")),
        ("shortened, dLM", shortened(result, "diffusion")),
    ]


def _of_pairs(result: dict[str, Any]) -> list[tuple[str, str]]:
    counts = Counter(result["counts"])
    longer = share(counts["longer_chosen"], result["used_rows"])
    return [
        ("replies", f"{counts['equal_replies']:,} pairs are equal and left out; {longer} chosen are the longer"),
        ("shortened", shortened(result, "pairs")),
    ]


DETAILS = {"text": _of_text, "chat": _of_chat, "pairs": _of_pairs}


def shortened(result: dict[str, Any], name: str) -> str:
    names = ("rows", "tokens", "lost", "shortened", "cut_prompts", "cut_replies")
    rows, tokens, lost, cut, prompts, replies = (result["counts"].get(f"{name} {count}", 0) for count in names)
    limit = f"{cut:,} of {rows:,} rows ({share(cut, rows)}) to {result['max_seq_len']} tokens"
    losses = f"{share(lost, tokens)} of tokens lost: {prompts:,} beginnings of prompts, {replies:,} ends of replies"
    return f"{limit}, {losses}"


def histogram(result: dict[str, Any]) -> list[str]:
    """Rows by length, in tokens and in characters; each line covers lengths twice as long as the line before."""
    tokens: Counter[int] = Counter()
    for length, count in result["lengths"].items():
        tokens[int(length).bit_length()] += count
    characters = Counter({int(size): count for size, count in result["characters_by_bit_length"].items()})
    highest = max(*tokens.values(), *characters.values())
    lines = [f"  {'length':>15}  {'rows by tokens':{BAR + 10}}rows by characters"]
    for size in range(min(*tokens, *characters), max(*tokens, *characters) + 1):
        span = f"{2 ** (size - 1):,} to {2**size - 1:,}" if size else "0"
        bars = [f"{part[size]:9,} {'#' * -(-part[size] * (BAR - 2) // highest)}" for part in (tokens, characters)]
        lines.append(f"  {span:>15}  {bars[0]:{BAR + 10}}{bars[1]}".rstrip())
    longest = result["longest"]
    return [*lines, f"  tokens: {quantiles(result)}, longest {longest['tokens']:,} (row {longest['row']:,})"]


def quantiles(result: dict[str, Any]) -> str:
    lengths, rows_up_to = [*result["lengths"]], np.cumsum([*result["lengths"].values()])
    parts = {0.5: "half of the rows", 0.9: "90 %", 0.99: "99 %"}
    limits = {part: lengths[np.searchsorted(rows_up_to, part * rows_up_to[-1])] for part in parts}
    return ", ".join(f"{words} have up to {int(limits[part]):,}" for part, words in parts.items())


def bad_rows(result: dict[str, Any]) -> list[str]:
    reasons = [f"  {count:8,}  {reason}" for reason, count in result["bad_by_reason"].items()]
    first = result["first_bad"]
    heading = f"the first {len(first)}:" if len(first) < result["bad_rows"] else "one by one:"
    return [f"bad rows: {result['bad_rows']:,}", *reasons, heading, *(f"  {row}" for row in first)]


# -- what to do --------------------------------------------------------------------------------------------------------


def fault_of(result: dict[str, Any]) -> str:
    """A line on what is wrong with the file, "" if nothing is."""
    if result["bad_rows"]:
        remedy = "Correct them: without them there is nothing to train on."
        if has_content(result):
            remedy = "Correct or delete them, or leave them out with --on-bad-row skip."
        return f"Bad rows: {result['bad_rows']:,} ({share(result['bad_rows'], result['rows'])}). {remedy}"
    return "" if has_content(result) else "Nothing to train on."


def has_content(result: dict[str, Any]) -> bool:
    """Whether the rows that can be used hold anything to learn from."""
    counts = Counter(result["counts"])
    if result["kind"] == "chat":
        return counts["replies"] > counts["empty_replies"]
    return result["used_rows"] > counts["equal_replies"] + counts["blank_rows"]


def training_commands(data: Any, result: dict[str, Any]) -> list[str]:
    """The commands that train on the file."""
    if not has_content(result):
        return []
    flags = {
        field.name: getattr(data, field.name)
        for field in fields(data)
        if field.name in ("data", "jsonl_field", "tokenizer_dir", "max_seq_len")
        if getattr(data, field.name) != field.default
    }
    if result["bad_rows"]:
        flags["on_bad_row"] = "skip"
    typed = " ".join(f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in flags.items())
    commands = [f"  uv run python -m {command} {typed}" for command in KINDS[result["kind"]].commands]
    return ["Train on it:", *commands]


if __name__ == "__main__":
    run(main)
