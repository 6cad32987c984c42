"""How likely a checkpoint of any kind finds the text of a file, or the replies of conversations, or which of several
answers: nats per token, perplexity, bits per byte, accuracy.

    uv run python -m scripts.eval.likelihood --checkpoint weights/diffusion_state_dict.pt --eval-data dataset/val.jsonl

Exact for an autoregressive model (chain rule), an upper bound for a diffusion model (LLaDA Eq. 6; in blocks, LLaDA 2.0
Eq. 1), over the same tokens; with --chain-rule-documents also its own exact chain rules. The rows of a file are one of

    choices   {"question": ..., "choices": [...], "answer": index from 0, letter or text}, and as ARC, MMLU, C-Eval,
              HellaSwag and others (dataset/rows/choice_formats.py): the likeliest choice, by nats (acc) and by nats per
              byte (acc_norm)
    chat      a conversation in any format of fine-tuning (dataset/rows/formats.py): every reply and its EOS, given all
              before it in the chat template
    text      {"text": ...}: every token of the document and its EOS; by a model that was trained on whole blocks with
              the EOS that fill the last one, while other diffusion models are told where a document ends
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from dataset.reading.bad_rows import BadRows
from dataset.rows.kinds import kinds_of_rows, note_on_explanations, note_on_others, refuse_unknown
from scripts.engine.cli import parse_args, run
from scripts.engine.files import require_output, write_json
from scripts.engine.likelihood.chain_rules import ChainRuleConfig, side_by_side
from scripts.engine.likelihood.choices import evaluate_choices
from scripts.engine.likelihood.documents import (
    as_json,
    as_trained,
    document_record,
    document_windows,
    ends_given,
    evaluate_replies,
    facts_of_models,
    likelihoods_of,
)
from scripts.engine.likelihood.windows import DIFFUSION, WHOLE_ROWS, DataEvalConfig, report_skipped
from scripts.engine.loaded import AnyCheckpointConfig, Loaded, circumstances
from scripts.engine.prompts import PromptConfig
from scripts.engine.runtime import RuntimeConfig, command_line


@dataclass(frozen=True)
class Output:
    """Output."""

    json: Annotated[Path | None, "also write the result, with all it depends on, to this file"] = None


@dataclass(frozen=True)
class RowsConfig(PromptConfig, ChainRuleConfig):
    """What the rows are, and how questions are put."""

    eval_format: Annotated[
        Literal["auto", "text", "chat", "choices"], "what the rows are; auto = by the fields of the first ones"
    ] = "auto"
    canvas: Annotated[
        int,
        "tokens that a reply and its EOS stand on; what they leave is filled with EOS and scored, so "
        "that the length of the reply is not given away; 0 = give it away. That of a model in blocks ends with a block",
        "at least 0",
        f"with {DIFFUSION}",
        "with conversations",
        f"with {WHOLE_ROWS}",
    ] = 128


def main(argv: list[str] | None = None) -> None:
    groups = Output, AnyCheckpointConfig, DataEvalConfig, RowsConfig, RuntimeConfig
    needs = dict.fromkeys(("chat_wrap", "system"), "with multiple choice")
    output, checkpoint, data, rows, runtime, given = parse_args(__doc__, *groups, argv=argv, needs=needs)
    if data.eval_data is None:
        raise ValueError("--eval-data is missing: give a file of rows or plain text")
    require_output(output.json, "--json", data.eval_data, checkpoint.checkpoint, checkpoint.tokenizer_dir)
    loaded, bad = checkpoint.load_any(runtime), BadRows(data.on_bad_row)
    form = format_of(data, rows.eval_format)
    facts = {"rows of text": form == "text", "conversations": form == "chat", "multiple choice": form == "choices"}
    facts["text or conversations"] = form != "choices"
    given.refuse_without(facts_of_models(loaded) | facts)
    print(f"{checkpoint.checkpoint}: {loaded.described}\n{data.eval_data}: rows of {form}", file=sys.stderr)
    lines, result = EVALUATE[form](loaded, data, rows, bad)
    result |= report_skipped(data.eval_data, bad)
    print("\n".join(lines))
    if output.json:
        command = command_line(__spec__.name, argv)
        configs = checkpoint, data, rows
        record = circumstances(command, runtime, loaded.tokenizer, data.eval_data, [loaded], *configs)
        write_json(output.json, {"format": form, **loaded.attention, **result, **record})


def format_of(data: DataEvalConfig, eval_format: str) -> str:
    """The format given, or with "auto" that of the first rows. ValueError if a text file is given another format."""
    bad = BadRows(data.on_bad_row)
    kinds = kinds_of_rows(data.eval_data, tuple(EVALUATE), bad, eval_format, field=data.jsonl_field)
    form = kinds[0] if kinds else refuse_unknown(data.eval_data, tuple(EVALUATE))
    note = note_on_explanations(data.eval_data) if form == "choices" else ""
    for line in (note_on_others(data.eval_data, kinds, "--eval-format", data.jsonl_field), note):
        print(line, end="\n" if line else "", file=sys.stderr)
    return form


Report = tuple[list[str], dict[str, Any]]  # lines, and the record for the result file


def of_text(loaded: Loaded, data: DataEvalConfig, rows: RowsConfig, bad: BadRows) -> Report:
    data = as_trained(data, loaded)
    documents, windows = document_windows(loaded, data, bad)
    likelihoods = likelihoods_of(loaded, documents, windows, data)
    rules, record = side_by_side(loaded, documents, windows, data, rows.chain_rule_documents, "documents")
    lines = [*(f"{name}: {value.line()}" for name, value in likelihoods.items()), *rules]
    if ends_given(loaded):
        lines += ["given where each document ends, which an autoregressive model is not"]
    return lines, document_record(likelihoods, data, loaded) | record


def of_chat(loaded: Loaded, data: DataEvalConfig, rows: RowsConfig, bad: BadRows) -> Report:
    likelihoods, replies = evaluate_replies(loaded, data, rows.canvas, bad)
    counts = {"scored": len(replies.windows), "too_long": replies.too_long, "empty": replies.empty}
    summary = (
        f"{counts['scored']:,} replies scored; {replies.too_long:,} left out: they do not fit --max-seq-len "
        f"{loaded.max_length}; {replies.empty:,} empty"
    )
    if loaded.kind == "diffusion":
        counts["unfilled"] = replies.unfilled
        summary += f"; {replies.unfilled:,} scored on a canvas of just their length"
    lines = [f"{name}: {value.line('conversations')}" for name, value in likelihoods.items()]
    scored, number = (replies.conversations, replies.windows), rows.chain_rule_documents
    more, rules = side_by_side(loaded, *scored, data, number, "conversations")
    return [*lines, *more, summary], {"likelihood": as_json(likelihoods), "replies": counts, **rules}


def of_choices(loaded: Loaded, data: DataEvalConfig, rows: RowsConfig, bad: BadRows) -> Report:
    wrap = rows.wraps(loaded)
    accuracies, too_long = evaluate_choices(loaded, data, rows.asking(loaded), bad)
    summary = (
        f"asked {'in the chat template' if wrap else 'as plain text'}; {too_long:,} questions left out, too long for "
        f"--max-seq-len {loaded.max_length}"
    )
    lines = [f"{name}: {value.line()}" for name, value in accuracies.items()]
    record = {name: asdict(value) for name, value in accuracies.items()}
    return [*lines, summary], {"accuracy": record, "chat_wrap": wrap, "too_long": too_long}


EVALUATE = {"choices": of_choices, "chat": of_chat, "text": of_text}  # a row is of the first kind that it fits

if __name__ == "__main__":
    run(main)
