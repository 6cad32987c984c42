"""Answer the prompts of a conversation file with either kind of model, with one or several samplers, and compare.

    uv run python -m scripts.eval.eval_sft --eval-data dataset/sft_val.jsonl \\
        --minimind-checkpoint weights/minimind_sft_state_dict.pt \\
        --diffusion-checkpoint weights/diffusion_sft_state_dict.pt \\
        --policies low_confidence,threshold --steps 16,64 --json weights/answers.json

Prompts are put into the chat template. Prints a table with one line per sampler, the references first, and some answers
unedited.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from dataset.bad_rows import BadRows, OnBadRow
from dataset.tokenizer import load_tokenizer
from model.decode import ContinuationConfig, DenoisingConfig, SamplingConfig
from scripts.engine.cli import parse_args, run
from scripts.engine.decoding.answers import (
    answer_all,
    figures_of,
    judge,
    questions_of,
    references,
    samples,
    table,
)
from scripts.engine.decoding.samplers import ADAPTIVE, SamplerGrid
from scripts.engine.files import require_output, write_json
from scripts.engine.likelihood.windows import report_skipped
from scripts.engine.loaded import KINDS, circumstances, load_for_use, load_kind
from scripts.engine.prompts import Prompt, note_on_template
from scripts.engine.runtime import RuntimeConfig, command_line


@dataclass(frozen=True)
class Request:
    """Conversations, models and output."""

    eval_data: Annotated[Path | None, "conversations: JSONL, may be .gz"] = None
    minimind_checkpoint: Annotated[Path | None, "autoregressive model"] = None
    diffusion_checkpoint: Annotated[Path | None, "diffusion model"] = None
    tokenizer_dir: Annotated[Path, "directory with tokenizer.json and tokenizer_config.json"] = Path(".")
    max_seq_len: Annotated[int, "longest sequence the models are given, in tokens", "--seq-len", "at least 2"] = 512
    prompts_per_language: Annotated[int, "prompts answered in each language", "at least 1"] = 50
    batch_size: Annotated[int, "prompts answered together; 1 for the speed of a single user", "at least 1"] = 1
    judge: Annotated[
        Path | None, "an autoregressive checkpoint: also tell how many nats per token it gives the answers"
    ] = None
    on_bad_row: OnBadRow = "error"
    show: Annotated[int, "answers of each model printed per language", "at least 0"] = 3
    json: Annotated[Path | None, "write everything, each answer included, to this file"] = None

    def __post_init__(self):
        if self.eval_data is None:
            raise ValueError("--eval-data is missing: give a .jsonl file of conversations")
        if self.minimind_checkpoint is None and self.diffusion_checkpoint is None:
            raise ValueError("give --minimind-checkpoint, --diffusion-checkpoint or both")


NEEDS = {
    SamplingConfig: "with --minimind-checkpoint",
    **dict.fromkeys((SamplerGrid, DenoisingConfig), "with --diffusion-checkpoint"),
    "gen_remasking": "without --policies",
    "gen_steps": "with a sampler whose steps --steps does not set",
    "gen_confidence_threshold": "without --thresholds",
}


def main(argv: list[str] | None = None) -> None:
    groups = Request, SamplerGrid, ContinuationConfig, SamplingConfig, DenoisingConfig, RuntimeConfig
    request, grid, continuation, sampling, denoising, runtime, given = parse_args(
        __doc__, *groups, argv=argv, needs=NEEDS, later=(SamplerGrid, DenoisingConfig)
    )
    tried = grid.samplers(denoising).values()
    given.refuse_idle(grid, *tried)
    set_by_steps = all(config.gen_remasking not in ADAPTIVE for config in tried)
    given.refuse_without({"a sampler whose steps --steps does not set": not (grid.steps and set_by_steps)})
    read = request.eval_data, request.minimind_checkpoint, request.diffusion_checkpoint, request.judge
    require_output(request.json, "--json", *read, request.tokenizer_dir)
    tokenizer = load_tokenizer(request.tokenizer_dir)
    paths = dict(zip(KINDS, (request.minimind_checkpoint, request.diffusion_checkpoint), strict=True))
    loaded = {
        kind: load_kind(path, kind, tokenizer, request.max_seq_len, runtime) for kind, path in paths.items() if path
    }
    critic = load_for_use(request.judge, tokenizer, request.max_seq_len, runtime) if request.judge else None
    if critic and not critic.model.config.autoregressive:
        raise ValueError(f"--judge {request.judge} is {critic.described}; give an autoregressive checkpoint")
    for kind, one in loaded.items():
        if one.model.config.block_size:
            print(f"{paths[kind]}: {one.described}", file=sys.stderr)
        if note := note_on_template(one, wraps=True):
            print(note, file=sys.stderr)
    samplers = {"AR": ("autoregressive", sampling)} if "autoregressive" in loaded else {}
    if "diffusion" in loaded:
        fitted = denoising.fitted(loaded["diffusion"].model.config)
        samplers |= {name: ("diffusion", config) for name, config in grid.samplers(fitted).items()}
    room = continuation.max_new_tokens, request.max_seq_len
    bad = BadRows(request.on_bad_row)
    questions, counts = questions_of(request.eval_data, tokenizer, request.prompts_per_language, *room, bad)
    skipped = report_skipped(request.eval_data, bad)
    prompts = [Prompt(question.messages) for question in questions]
    answers = {"reference": references(tokenizer, questions)}
    for name, (kind, config) in samplers.items():
        answers[name] = answer_all(loaded[kind], prompts, continuation, config, request.batch_size, name)
    if critic:
        answers = {name: judge(critic, questions, made) for name, made in answers.items()}
    figures = figures_of(tokenizer, answers, questions)
    fitting = ", ".join(f"{count} {name}" for name, count in counts.items() if name != "rows")
    print(f"{request.eval_data}: {counts['rows']} rows, of which these fit: {fitting}")
    print("\n".join([*table(figures), *samples(answers, questions, request.show)]))
    if request.json:
        about = command_line(__spec__.name, argv), runtime, tokenizer, request.eval_data
        judged = [*loaded.values(), *([critic] if critic else [])]
        result = {
            "models": {kind: one.attention for kind, one in loaded.items()},
            "questions": [asdict(question) for question in questions],
            "fitting": counts,
            **skipped,
            "samplers": {name: asdict(config) for name, (_, config) in samplers.items()},
            "figures": figures,
            "answers": {name: [asdict(answer) for answer in made] for name, made in answers.items()},
            **circumstances(*about, judged, request, grid, continuation),
        }
        write_json(request.json, result)


if __name__ == "__main__":
    run(main)
