"""Autoregressive and diffusion models on the same rows: likelihood, multiple choice, right answers, cost.

    uv run python -m scripts.eval.report --minimind-checkpoint weights/minimind_sft_state_dict.pt \\
        --diffusion-checkpoint weights/diffusion_sft_state_dict.pt --out weights/report
    uv run python -m scripts.eval.report --from weights/report/report.json

Writes report.json (every row's values), and report.md and pictures drawn from it. The rows of a file are one of

    choices     {"question", "choices", "answer": index from 0, letter or text}, and as ARC, MMLU, C-Eval, HellaSwag
                and others (dataset/rows/choice_formats.py)
    poems       {"prompt", "answer", "direction": "forward" or "backward", "question"}
    open        {"question", "reference"}
    questions   {"question", "answer"}; "final", or #### and the rest of the answer, is to be found instead of it;
                with "match": "whole" a right answer is that and nothing else (bundled:task_questions)
    chat        a conversation in any format of fine-tuning
    text        {"text"}

and may be told apart by "lang", "split" and "kind". Without --eval-data the bundled questions are asked. --system goes
before every question; conversations are scored as they stand in their file.
"""

import sys
from typing import Any

from dataset.tokenizer import PreTrainedTokenizerFast, load_tokenizer
from model.decoding.autoregressive import SamplingConfig
from model.decoding.decode import ContinuationConfig
from model.decoding.denoiser import DenoisingConfig
from scripts.engine.cli import TypedFlags, parse_args, run
from scripts.engine.files import require_output, write_json
from scripts.engine.likelihood.documents import facts_of_models
from scripts.engine.loaded import Loaded, circumstances, load_kind
from scripts.engine.prompts import PromptConfig, note_on_template, refuse_long_system
from scripts.engine.report.frontier import FrontierConfig, choose, measure_frontier, require_joint
from scripts.engine.report.measure import (
    ANSWERED,
    IN_WORDS,
    MeasureConfig,
    Setup,
    bundled_sources,
    measure,
    require_readable,
    sources_of,
)
from scripts.engine.report.page import FORMAT, PICTURES, draw, read_report
from scripts.engine.report.request import Request, check_flags, require_folder
from scripts.engine.report.results import AR, DIFFUSION, summary_of
from scripts.engine.runtime import RuntimeConfig, command_line

NAMES = {"autoregressive": AR, "diffusion": DIFFUSION}
NEEDS = {
    **dict.fromkeys((MeasureConfig, FrontierConfig, RuntimeConfig), "without --from"),
    PromptConfig: ("without --from", "with questions"),
    ContinuationConfig: ("without --from", f"with {IN_WORDS}"),
    SamplingConfig: ("without --from", "with --minimind-checkpoint", f"with {IN_WORDS}"),
    DenoisingConfig: ("without --from", "with --diffusion-checkpoint", f"with {IN_WORDS}"),
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Make the report, and return its `summary_of`."""
    groups = (Request, MeasureConfig, FrontierConfig, PromptConfig)
    groups += (ContinuationConfig, SamplingConfig, DenoisingConfig, RuntimeConfig)
    later = SamplingConfig, DenoisingConfig
    *configs, given = parse_args(__doc__, *groups, argv=argv, needs=NEEDS, later=later, max_new_tokens=64)
    request = configs[0]
    read = request.redraw, request.tokenizer_dir, *(path for _, path in request.checkpoints), *(request.eval_data or ())
    for name in ("report.md", *PICTURES) if request.redraw else ("report.md", *PICTURES, "report.json"):
        require_output(request.folder / name, "--out", *read)
    require_folder(request.folder)
    if request.redraw:
        given.refuse_idle(*configs)
        report = read_report(request.redraw)
    else:
        report = measured(configs, given, argv)
        write_json(request.folder / "report.json", report, indent=None)
    show = report["settings"]["show"] if request.show is None else request.show
    for path in draw(report, request.folder, show):
        print(path)
    return summary_of(report)


def measured(configs: list[Any], given: TypedFlags, argv: list[str] | None) -> dict[str, Any]:
    """The content of report.json."""
    request, measuring, frontier, prompting, continuation, sampling, denoising, runtime = configs
    sources = bundled_sources() if request.eval_data is None else sources_of(request.eval_data, measuring)
    forms = {(source.form, source.split) for source in sources}
    check_flags(given, request, forms, frontier, continuation.max_new_tokens, (sampling, denoising))
    tokenizer = load_tokenizer(request.tokenizer_dir)
    require_readable(sources, measuring, tokenizer)
    models = load_all(request, tokenizer, measuring.max_seq_len, runtime)
    given.refuse_without(facts_of_models(*models.values()))
    for loaded in models.values():
        if loaded.kind == "diffusion":
            denoising.fitted(loaded.model.config)  # refuses what does not go with its attention, before any work
    if "frontier_policies" in given:
        require_joint(frontier, denoising, models.values())
    for loaded in models.values() if {form for form, _ in forms} != {"text"} else ():
        if note := note_on_template(loaded, prompting.wraps(loaded)):
            print(note, file=sys.stderr)
        room = continuation.max_new_tokens if {form for form, _ in forms} & set(ANSWERED) else 0
        refuse_long_system(tokenizer, prompting.prompt("", loaded), room, measuring.max_seq_len)
    setup = Setup(models, tokenizer, measuring, prompting, continuation, sampling, denoising)
    sections = [measure(setup, source) for source in sources]
    section = choose(sections) if frontier.frontier_questions else None
    about = circumstances(command_line(__spec__.name, argv), runtime, tokenizer, None, models.values(), *configs[:-1])
    return {
        "report_format": FORMAT,
        **about,
        "data_sha256": {section["name"]: section["sha256"] for section in sections},
        "models": [
            {
                "name": name,
                "kind": NAMES[loaded.kind],
                **loaded.attention,
                **loaded.file,
                "chat_wrap": prompting.wraps(loaded),
            }
            for name, loaded in models.items()
        ],
        "sources": sections,
        "frontier": measure_frontier(setup, frontier, section) if section else None,
    }


def load_all(
    request: Request, tokenizer: PreTrainedTokenizerFast, max_length: int, runtime: RuntimeConfig
) -> dict[str, Loaded]:
    """name -> model; the name is kind and file name, and its folder if that is not enough."""
    stems = [f"{NAMES[kind]} {path.stem.removesuffix('_state_dict')}" for kind, path in request.checkpoints]
    models = {}
    for stem, (kind, path) in zip(stems, request.checkpoints, strict=True):
        name = stem if stems.count(stem) == 1 else f"{NAMES[kind]} {path}"
        models[name] = load_kind(path, kind, tokenizer, max_length, runtime)
    return models


if __name__ == "__main__":
    run(main)
