"""Answer the prompts of a conversation file with either kind of model, with one or several samplers, and compare.

    uv run python -m scripts.eval.eval_sft --eval-data dataset/sft_val.jsonl \\
        --minimind-checkpoint weights/minimind_sft_state_dict.pt \\
        --diffusion-checkpoint weights/diffusion_sft_state_dict.pt \\
        --policies low_confidence,threshold --steps 16,64 --json weights/answers.json

Prompts are put into the chat template. Prints a table with one line per sampler, the references first, and some answers
unedited.
"""

import json
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated

from dataset.tokenizer import load_tokenizer
from model.decode import ContinuationConfig, DenoisingConfig, SamplingConfig
from model.remasking import POLICIES
from scripts.engine.answers import answer_all, figures_of, note_on_template, questions_of, references, samples, table
from scripts.engine.cli import parse_args, refuse_idle, run
from scripts.engine.evaluation import circumstances, load_kind
from scripts.engine.generation import idle_sampling_flags
from scripts.engine.run import require_writable
from scripts.engine.runtime import RuntimeConfig

ADAPTIVE = ("threshold", "factor")


@dataclass(frozen=True)
class Request:
    """What to do."""

    eval_data: Annotated[Path | None, "conversations: JSONL, may be .gz"] = None
    minimind_checkpoint: Annotated[Path | None, "autoregressive model"] = None
    diffusion_checkpoint: Annotated[Path | None, "diffusion model"] = None
    tokenizer_dir: Annotated[Path, "directory with tokenizer.json and tokenizer_config.json"] = Path(".")
    max_seq_len: Annotated[int, "longest sequence the models are given, in tokens", "--seq-len"] = 512
    prompts_per_language: Annotated[int, "prompts answered in each language"] = 50
    batch_size: Annotated[int, "prompts answered together; 1 for the speed of a single user"] = 1
    policies: Annotated[str | None, "comma-separated: try these policies instead of --gen-remasking"] = None
    steps: Annotated[str | None, "comma-separated: try these step counts instead of --gen-steps"] = None
    show: Annotated[int, "answers of each model printed per language"] = 3
    json: Annotated[Path | None, "write everything, each answer included, to this file"] = None

    def __post_init__(self):
        if self.eval_data is None:
            raise ValueError("--eval-data is missing: give a .jsonl file of conversations")
        if self.minimind_checkpoint is None and self.diffusion_checkpoint is None:
            raise ValueError("give --minimind-checkpoint, --diffusion-checkpoint or both")
        for name in ("prompts_per_language", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.show < 0:
            raise ValueError(f"--show must not be negative, not {self.show}")
        unknown = [name for name in _parts(self.policies) if name not in POLICIES]
        if unknown:
            raise ValueError(f"--policies: {unknown[0]!r} is not one of {', '.join(POLICIES)}")
        if not all(part.isdecimal() and int(part) for part in _parts(self.steps)):
            raise ValueError(f"--steps {self.steps}: expected positive numbers, separated by commas")

    def samplers(self, denoising: DenoisingConfig) -> dict[str, DenoisingConfig]:
        """name -> settings, for every policy and step count asked for; a policy that commits by confidence takes as
        many steps as it needs, and is tried once."""
        policies = _parts(self.policies) or [denoising.gen_remasking]
        steps = [int(part) for part in _parts(self.steps)] or [denoising.gen_steps]
        return {
            policy if adaptive else f"{policy}, {count} steps": replace(
                denoising, gen_remasking=policy, gen_steps=denoising.gen_steps if adaptive else count
            )
            for policy in policies
            for adaptive in [policy in ADAPTIVE]
            for count in steps
        }


def _parts(names: str | None) -> list[str]:
    """What stands between the commas."""
    return [] if names is None else [name.strip() for name in names.split(",")]


def main(argv: list[str] | None = None) -> None:
    request, continuation, sampling, denoising, runtime, given = parse_args(
        __doc__, Request, ContinuationConfig, SamplingConfig, DenoisingConfig, RuntimeConfig, argv=argv
    )
    check_flags(request, sampling, denoising, given)
    if request.json:
        require_writable(request.json, "--json")
    tokenizer = load_tokenizer(request.tokenizer_dir)
    paths = {"causal": request.minimind_checkpoint, "full": request.diffusion_checkpoint}
    loaded = {
        kind: load_kind(path, kind, tokenizer, request.max_seq_len, runtime) for kind, path in paths.items() if path
    }
    for kind, one in loaded.items():
        if note := note_on_template(paths[kind], one, wraps=True):
            print(note, file=sys.stderr)
    samplers = {"AR": ("causal", sampling)} if "causal" in loaded else {}
    if "full" in loaded:
        samplers |= {name: ("full", config) for name, config in request.samplers(denoising).items()}
    room = continuation.max_new_tokens, request.max_seq_len
    questions, counts = questions_of(request.eval_data, tokenizer, request.prompts_per_language, *room)
    answers = {"reference": references(tokenizer, questions)}
    for name, (kind, config) in samplers.items():
        answers[name] = answer_all(
            loaded[kind], questions, name, request.batch_size, continuation, config, runtime, request.max_seq_len
        )
    figures = figures_of(tokenizer, answers, questions)
    fitting = ", ".join(f"{count} {name}" for name, count in counts.items() if name != "rows")
    print(f"{request.eval_data}: {counts['rows']} rows, of which these fit: {fitting}")
    print("\n".join([*table(figures), *samples(answers, questions, request.show)]))
    if request.json:
        result = {
            "questions": [asdict(question) for question in questions],
            "fitting": counts,
            "samplers": {name: asdict(config) for name, (_, config) in samplers.items()},
            "figures": figures,
            "answers": {name: [asdict(answer) for answer in made] for name, made in answers.items()},
            **circumstances(runtime, tokenizer, request.eval_data, request, continuation),
        }
        request.json.parent.mkdir(parents=True, exist_ok=True)
        request.json.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def check_flags(request: Request, sampling: SamplingConfig, denoising: DenoisingConfig, given: frozenset[str]) -> None:
    """ValueError for typed flags that would be ignored."""
    for config, path, flag in (
        (sampling, request.minimind_checkpoint, "--minimind-checkpoint"),
        (denoising, request.diffusion_checkpoint, "--diffusion-checkpoint"),
    ):
        refuse_idle(given, **dict.fromkeys((f.name for f in fields(config)), (path is not None, flag)))
    diffusion = request.diffusion_checkpoint is not None, "--diffusion-checkpoint"
    refuse_idle(given, policies=diffusion, steps=diffusion)
    configs = list(request.samplers(denoising).values())
    adaptive = [config.gen_remasking in ADAPTIVE for config in configs]
    refuse_idle(
        given,
        gen_remasking=(request.policies is None, "one policy: --policies names several"),
        gen_steps=(request.steps is None or any(adaptive), "one step count: --steps names several"),
        steps=(not all(adaptive), "a policy other than threshold and factor, which take as many as they need"),
    )
    needs = [idle_sampling_flags(config) for config in configs]
    used = {name: (any(need[name][0] for need in needs), condition) for name, (_, condition) in needs[0].items()}
    refuse_idle(given, **idle_sampling_flags(sampling), **used)


if __name__ == "__main__":
    run(main)
