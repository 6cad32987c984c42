"""Look at a file of data before training on it or asking its questions: what its rows hold, and which are bad.

    uv run python -m dataset.check dataset/pretrain_hq.jsonl

The file is read to its end by the same functions as in training, so that what is a bad row here is one there. Exit code
0: every row can be used; 1: some cannot, or nothing is left to train on; 2: the file cannot be read at all.
"""

import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from dataset.preferences import PreferenceData
from dataset.pretrain import PretrainData
from dataset.reading.files import DATA_HELP, data_files, is_plain_text, open_unpacked
from dataset.rows.kinds import WORDS, kinds_of_rows, note_on_others, notes_on_texts
from dataset.sft import SFTData
from dataset.survey import AllBadRows, Survey
from dataset.tokenizer import load_tokenizer
from model.ranges import check_ranges
from scripts.engine.cli import parse_args, run
from scripts.engine.files import require_output, write_json
from scripts.engine.loaded import CheckpointConfig

BAR = 40  # columns
UNKNOWN = "the rows are of no known format (README.md, Data), so they were read as documents"


@dataclass(frozen=True)
class CheckConfig:
    """The file to check."""

    file: Annotated[Path, f"training data: {DATA_HELP}"]
    kind: Annotated[
        Literal["auto", "pairs", "choices", "poems", "open", "chat", "questions", "text"],
        "what its rows are: pairs of replies, multiple choice, lines of poems, open questions, conversations, "
        "questions with answers, or documents; auto = by the fields of the first ones",
    ] = "auto"
    tokenizer_dir: Annotated[Path, "directory with tokenizer.json and tokenizer_config.json"] = Path(".")
    max_seq_len: Annotated[
        int | None, "tokens per row in training (none: the default of its command)", "at least 2"
    ] = None
    jsonl_field: Annotated[str, "field of a row that holds the document", "with rows of documents"] = "text"
    json: Annotated[Path | None, "also write the result to this file"] = None


@dataclass(frozen=True)
class EvaluationData:
    """A file that is evaluated."""

    eval_data: Path | None = None
    tokenizer_dir: Path = Path(".")
    max_seq_len: Annotated[int, "", "at least 2"] = CheckpointConfig.max_seq_len


class Kind(NamedTuple):
    """One kind of rows: the flags of its data, the commands that read it, and what these do."""

    flags: type
    commands: tuple[str, ...]
    verb: str = "Train on it"


PRETRAIN = ("scripts.train.train_pretrain", "scripts.train.diffusion --train --use-tokenizer")
SFT = ("scripts.train.train_sft_minimind --load-from weights/minimind_pretrain_state_dict.pt",)
DPO = ("scripts.train.train_dpo_minimind --load-from weights/minimind_sft_state_dict.pt",)
REPORT = ("scripts.eval.report --minimind-checkpoint weights/minimind_sft_state_dict.pt",)
LIKELIHOOD = ("scripts.eval.likelihood --checkpoint weights/minimind_sft_state_dict.pt",)
KINDS = {  # a file is of the first kind that most of its rows fit
    "pairs": Kind(PreferenceData, DPO),
    "choices": Kind(EvaluationData, (*LIKELIHOOD, *REPORT), "Ask it"),
    "poems": Kind(EvaluationData, REPORT, "Ask it"),
    "open": Kind(EvaluationData, REPORT, "Ask it"),
    "chat": Kind(SFTData, SFT),
    "questions": Kind(EvaluationData, REPORT, "Ask it"),
    "text": Kind(PretrainData, PRETRAIN),
}


def main(argv: list[str] | None = None) -> None:
    config, given = parse_args(__doc__, CheckConfig, argv=argv)
    files = data_files(config.file)
    for file in files:
        open_unpacked(file).close()  # a missing file gets its message here
    require_output(config.json, "--json", config.file, config.tokenizer_dir)
    chosen = "text" if config.kind == "auto" and "jsonl_field" in given else config.kind
    kinds = kinds_of_rows(files[0], tuple(KINDS), AllBadRows(), chosen, "--kind", config.jsonl_field)
    kind = kinds[0] if kinds else "text"
    in_fields = kind == "text" and not is_plain_text(files[0])
    given.refuse_without({"rows of documents": in_fields})
    flags = {"tokenizer_dir": config.tokenizer_dir}
    if in_fields:
        flags["jsonl_field"] = config.jsonl_field
    if config.max_seq_len is not None:
        flags["max_seq_len"] = config.max_seq_len
    source = "eval_data" if KINDS[kind].flags is EvaluationData else "data"
    data = KINDS[kind].flags(**{source: config.file}, **flags)  # which refuses what training would
    check_ranges(type(data), vars(data))
    tokenizer = load_tokenizer(data.tokenizer_dir)
    result = Survey(files, kind, tokenizer, data.max_seq_len, config.jsonl_field).result
    fault = fault_of(result)
    said = [note_on_others(files[0], kinds, "--kind", config.jsonl_field), "" if kinds else UNKNOWN]
    for file in files:
        of_file = f"{file.name}: " * (len(files) > 1)
        said += [f"{of_file}{line}" for line in notes_on_texts(file, kind, config.jsonl_field)]
    notes = [f"  note            {line}" for line in said if line]
    print("\n".join([*page(result), *notes]), end="\n\n")
    print("\n".join([fault or "Sound: every row can be used.", *training_commands(data, result)]))
    if config.json is not None:
        write_json(config.json, result)
    if fault:
        sys.exit(1)


# -- the page ----------------------------------------------------------------------------------------------------------

COUNTS = {  # names of the counts of a survey, in words
    "tokens": "tokens, BOS and EOS included",
    "longer": "documents longer than a row: they continue in the next, nothing is cut",
    "blank_rows": "documents of blanks alone",
    "several_replies": "conversations of several replies",
    "empty_replies": "empty replies, left out (of pairs: either reply)",
    "only_shown": "replies marked as not to be learnt",
    "wanted_end": "questions of which only the end of the answer is wanted, or a field of its own",
    "equal_replies": "pairs of equal replies, left out",
    "longer_chosen": "pairs whose chosen reply is the longer one",
    "spelling_rows": "rows that spell control tokens, which are text (in documents: except with --control-tokens)",
    "barred_rows": "rows that spell mask or padding (documents: bad with --control-tokens)",
}


def page(result: dict[str, Any]) -> list[str]:
    """Lines for people on the result of a Survey."""
    of_lines = "" if result["bad_unit"] == "rows" else f" of {result['lines']:,} lines"
    rows = f"{result['rows']:,}: {result['used_rows']:,} used, {result['empty_rows']:,} empty"
    rows += f", {result['bad_rows']:,} bad{of_lines}"
    in_lines = "" if result["lines"] is None else f"; {result['lines']:,} lines"
    copies = "".join(f"; row {copy} repeats row {original}" for copy, original in result["first_copies"])
    lines = [
        f"{result['file']}: {WORDS[result['kind']]}",
        f"  file            {result['bytes']:,} bytes, {result['unpacked_bytes']:,} unpacked{in_lines}",
        f"  SHA-256         {result['data_sha256'][:16]}...",
        f"  rows            {rows}",
        f"  copies          {result['copies']:,}{copies}",
    ]
    for name, counts in result["languages"].items():
        compression = f"{counts['characters'] / max(counts['text_tokens'], 1):.2f} characters per token"
        percentage = share(counts["rows"], result["used_rows"])
        lines.append(f"  language {name:6} {counts['rows']:,} rows ({percentage}), {compression}")
    lines += [f"  shortened       {text}" for text in shortened(result)]
    single = {name: count for name, count in result["counts"].items() if not name.startswith(SHORTENED)}
    lines += [f"  {count:14,}  {COUNTS.get(name, name)}" for name, count in single.items()]
    if result["control_tokens"]:
        names = ", ".join(f"{name} in {count:,}" for name, count in result["control_tokens"].items())
        lines.append(f"  control tokens  first in row {', '.join(map(str, result['first_spelling_rows']))}: {names}")
    if result["used_rows"]:
        lines += ["", *histogram(result)]
    if result["bad_rows"]:
        lines += ["", *bad_rows(result)]
    return lines


def share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "none"


SHORTENED = ("ar ", "diffusion ", "pairs ")  # what the counts of shortened rows begin with


def shortened(result: dict[str, Any]) -> Iterator[str]:
    """Lines on what each way of training shortens."""
    counts = Counter(result["counts"])
    for name in SHORTENED:
        rows, tokens = counts[f"{name}rows"], counts[f"{name}tokens"]
        if rows:
            cut = f"{counts[f'{name}shortened']:,} of {rows:,} rows ({share(counts[f'{name}shortened'], rows)})"
            losses = f"{counts[f'{name}cut_prompts']:,} beginnings of prompts, {counts[f'{name}cut_replies']:,} ends"
            lost = f"{share(counts[f'{name}lost'], tokens)} of tokens lost: {losses} of replies"
            yield f"{name}{cut} to {result['max_seq_len']} tokens, {lost}"


def histogram(result: dict[str, Any]) -> list[str]:
    """Rows by length, in tokens and in characters; each line covers lengths twice as long as the line before."""
    tokens: Counter[int] = Counter()
    for length, count in result["lengths"].items():
        tokens[int(length).bit_length()] += count
    characters = Counter({int(size): count for size, count in result["characters_by_bit_length"].items()})
    lines = [f"  {'length':>19}  by characters  rows by tokens"]
    for size in range(min(*tokens, *characters), max(*tokens, *characters) + 1):
        span = f"{2 ** (size - 1):,} to {2**size - 1:,}" if size else "0"
        bar = "#" * -(-tokens[size] * BAR // max(tokens.values()))
        lines.append(f"  {span:>19}  {characters[size]:13,}  {tokens[size]:14,} {bar}".rstrip())
    lengths, rows_up_to = [*result["lengths"]], np.cumsum([*result["lengths"].values()])
    half, most = (int(lengths[np.searchsorted(rows_up_to, part * rows_up_to[-1])]) for part in (0.5, 0.99))
    longest = result["longest"]
    limits = f"half of the rows have up to {half:,}, 99 % have up to {most:,}"
    return [*lines, f"  tokens: {limits}, longest {longest['tokens']:,} (row {longest['row']})"]


def bad_rows(result: dict[str, Any]) -> list[str]:
    reasons = [f"  {count:8,}  {reason}" for reason, count in result["bad_by_reason"].items()]
    first = [f"  {row}" for row in result["first_bad"]]
    return [f"bad {result['bad_unit']}: {result['bad_rows']:,}", *reasons, f"the first {len(first)}:", *first]


# -- what to do --------------------------------------------------------------------------------------------------------


def fault_of(result: dict[str, Any]) -> str:
    """A line on what is wrong with the file, "" if nothing is."""
    if result["bad_rows"]:
        remedy = "Correct them: without them there is nothing to train on."
        if has_content(result):
            remedy = "Correct or delete them, or leave them out with --on-bad-row skip."
        unit, number = result["bad_unit"], result["bad_rows"]
        return f"Bad {unit}: {number:,} ({share(number, result[unit])}). {remedy}"
    return "" if has_content(result) else "Nothing to train on."


def has_content(result: dict[str, Any]) -> bool:
    """Return whether the rows that can be used hold anything to learn from."""
    counts = Counter(result["counts"])
    if result["kind"] == "chat":
        return counts["replies"] > counts["empty_replies"]
    return result["used_rows"] > counts["equal_replies"] + counts["empty_replies"] + counts["blank_rows"]


def training_commands(data: Any, result: dict[str, Any]) -> list[str]:
    """The commands that train on the file, or ask its questions."""
    if not has_content(result):
        return []
    defaults = vars(type(data)())
    flags = {name: value for name, value in vars(data).items() if value != defaults[name]}
    if result["bad_rows"]:
        flags["on_bad_row"] = "skip"
    typed = " ".join(f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in flags.items())
    commands = [f"  uv run python -m {command} {typed}" for command in KINDS[result["kind"]].commands]
    return [f"{KINDS[result['kind']].verb}:", *commands]


if __name__ == "__main__":
    run(main)
