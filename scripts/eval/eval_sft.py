"""Answer the prompts of a conversation file with either kind of model, with one or several samplers, and compare.

    uv run python -m scripts.eval.eval_sft --eval-data dataset/sft_val.jsonl \\
        --minimind-checkpoint weights/minimind_sft_state_dict.pt \\
        --diffusion-checkpoint weights/diffusion_sft_state_dict.pt \\
        --policies low_confidence,threshold --steps 16,64 --json weights/answers.json

Prompts are put into the chat template, behind --system if they have no system prompt of their own. Prints a table with
one line per sampler, the references first, and some answers unedited.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from dataset.reading.bad_rows import BadRows, OnBadRow
from dataset.tokenizer import PreTrainedTokenizerFast
from model.decoding.autoregressive import SamplingConfig
from model.decoding.decode import ContinuationConfig
from model.decoding.denoiser import DenoisingConfig
from scripts.engine.cli import parse_args, run
from scripts.engine.decoding.answers import (
    answer_all,
    figures_of,
    judge,
    note_on_systems,
    questions_of,
    references,
    samples,
    table,
)
from scripts.engine.decoding.generation import Sampler
from scripts.engine.decoding.samplers import ADAPTIVE, SamplerGrid
from scripts.engine.files import require_output, write_json
from scripts.engine.likelihood.windows import report_skipped
from scripts.engine.loaded import Loaded, ModelsConfig, circumstances, load_for_use
from scripts.engine.prompts import Prompt, SystemConfig, note_on_template, refuse_long_system
from scripts.engine.runtime import RuntimeConfig, command_line


@dataclass(frozen=True)
class Request:
    """Conversations and output."""

    eval_data: Annotated[Path | None, "a file of conversations"] = None
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


NEEDS = {
    SamplingConfig: "with --minimind-checkpoint",
    **dict.fromkeys((SamplerGrid, DenoisingConfig), "with --diffusion-checkpoint"),
    "gen_remasking": "without --policies",
    "gen_steps": "with a sampler whose steps --steps does not set",
    "gen_confidence_threshold": "without --thresholds",
}


def main(argv: list[str] | None = None) -> None:
    groups = Request, ModelsConfig, SystemConfig, SamplerGrid, ContinuationConfig, SamplingConfig, DenoisingConfig
    *configs, runtime, given = parse_args(
        __doc__, *groups, RuntimeConfig, argv=argv, needs=NEEDS, later=(SamplerGrid, DenoisingConfig)
    )
    request, models, systems, grid, continuation, sampling, denoising = configs
    tried = grid.samplers(denoising).values()
    given.refuse_idle(grid, *tried)
    set_by_steps = all(config.gen_remasking not in ADAPTIVE for config in tried)
    given.refuse_without({"a sampler whose steps --steps does not set": not (grid.steps and set_by_steps)})
    inputs = request.eval_data, *models.checkpoints.values(), request.judge, models.tokenizer_dir
    require_output(request.json, "--json", *inputs)
    loaded = models.load(runtime)
    tokenizer = next(iter(loaded.values())).tokenizer
    critic = load_judge(request.judge, tokenizer, models.max_seq_len, runtime) if request.judge else None
    for model in loaded.values():
        if model.model.config.block_size:
            print(f"{model.path}: {model.described}", file=sys.stderr)
        if note := note_on_template(model, wraps=True):
            print(note, file=sys.stderr)
    samplers: dict[str, tuple[str, Sampler]] = {}
    if "autoregressive" in loaded:
        samplers["AR"] = "autoregressive", sampling
    if "diffusion" in loaded:
        fitted = denoising.fitted(loaded["diffusion"].model.config)
        samplers |= {name: ("diffusion", config) for name, config in grid.samplers(fitted).items()}
    bad = BadRows(request.on_bad_row)
    room = continuation.max_new_tokens, models.max_seq_len
    refuse_long_system(tokenizer, Prompt(systems.opened([{"role": "user", "content": ""}])), *room)
    questions, counts = questions_of(request.eval_data, tokenizer, request.prompts_per_language, room, bad, systems)
    skipped = report_skipped(request.eval_data, bad)
    if note := note_on_systems(questions, systems.system):
        print(f"{request.eval_data}: {note}", file=sys.stderr)
    prompts = [Prompt(question.messages) for question in questions]
    answers = {"reference": references(tokenizer, questions)}
    for name, (kind, sampler) in samplers.items():
        answers[name] = answer_all(loaded[kind], prompts, continuation, sampler, request.batch_size, name)
    if critic:
        answers = {name: judge(critic, questions, written) for name, written in answers.items()}
    figures = figures_of(tokenizer, answers, questions)
    fitting = ", ".join(f"{count} {name}" for name, count in counts.items() if name != "rows")
    print(f"{request.eval_data}: {counts['rows']} rows, of which these fit: {fitting}")
    print("\n".join([*table(figures), *samples(answers, questions, request.show)]))
    if request.json:
        command = command_line(__spec__.name, argv)
        checkpoints = [*loaded.values(), *([critic] if critic else [])]
        configs = request, models, systems, grid, continuation
        record = {
            "models": {kind: model.attention for kind, model in loaded.items()},
            "questions": [asdict(question) for question in questions],
            "fitting": counts,
            **skipped,
            "samplers": {name: asdict(sampler) for name, (_, sampler) in samplers.items()},
            "figures": figures,
            "answers": {name: [asdict(answer) for answer in written] for name, written in answers.items()},
            **circumstances(command, runtime, tokenizer, request.eval_data, checkpoints, *configs),
        }
        write_json(request.json, record)


def load_judge(path: Path, tokenizer: PreTrainedTokenizerFast, max_length: int, runtime: RuntimeConfig) -> Loaded:
    loaded = load_for_use(path, tokenizer, max_length, runtime, "autoregressive")
    if not loaded.model.config.autoregressive:
        raise ValueError(f"--judge {path} is {loaded.described}; give an autoregressive checkpoint")
    return loaded


if __name__ == "__main__":
    run(main)
