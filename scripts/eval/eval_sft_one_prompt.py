"""One prompt, answered by an autoregressive model, by a diffusion model, or by both side by side, and what each cost.

    uv run python -m scripts.eval.eval_sft_one_prompt --prompt "你好，请介绍你自己。" \\
        --minimind-checkpoint weights/minimind_sft_state_dict.pt \\
        --diffusion-checkpoint weights/diffusion_sft_state_dict.pt

Both get the same full prompt. Each model is warmed up, then timed; a trace is recorded in a further, untimed run, which
writes the same text. A prompt is put into the chat template if the checkpoints were trained on conversations.
"""

import json
import shutil
import sys
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from model.decoding.autoregressive import SamplingConfig
from model.decoding.decode import ContinuationConfig
from model.decoding.denoiser import DenoisingConfig
from scripts.engine.cli import parse_args, run
from scripts.engine.decoding.generation import (
    Generation,
    Sampler,
    generate,
    warm_up,
)
from scripts.engine.decoding.trace import RECORD
from scripts.engine.decoding.trace_terminal import on_screen, side_by_side
from scripts.engine.decoding.watching import Recorder, TraceConfig
from scripts.engine.files import require_output
from scripts.engine.flags import in_effect
from scripts.engine.loaded import Loaded, ModelsConfig, circumstances
from scripts.engine.prompts import Prompt, TypedPromptConfig, note_on_template, prompt_tokens
from scripts.engine.runtime import RuntimeConfig, command_line


@dataclass(frozen=True)
class Request:
    """Prompt and output."""

    prompt: Annotated[str | None, "what the user says"] = None
    json: Annotated[bool, "print one JSON object instead of text"] = False

    def __post_init__(self):
        if self.prompt is None:
            raise ValueError("--prompt is missing: give what the user says")


NEEDS = {SamplingConfig: "with --minimind-checkpoint", DenoisingConfig: "with --diffusion-checkpoint"}


def main(argv: list[str] | None = None) -> None:
    groups = Request, ModelsConfig, TypedPromptConfig, ContinuationConfig, SamplingConfig, DenoisingConfig, TraceConfig
    *configs, runtime, _ = parse_args(__doc__, *groups, RuntimeConfig, argv=argv, needs=NEEDS)
    request, models, prompting, continuation, sampling, denoising, tracing = configs
    require_output(tracing.file, "--trace", *models.checkpoints.values(), models.tokenizer_dir)
    loaded = models.load(runtime)
    tokenizer = next(iter(loaded.values())).tokenizer
    samplers: dict[str, Sampler] = {"autoregressive": sampling, "diffusion": denoising}
    if "diffusion" in loaded:
        samplers["diffusion"] = denoising.fitted(loaded["diffusion"].model.config)
    prompt = same_prompt(request.prompt, prompting, loaded)
    # Refused before any work.
    ids = prompt_tokens(tokenizer, prompt, continuation.max_new_tokens, models.max_seq_len)
    configs = request, models, prompting, continuation, *(samplers[kind] for kind in loaded)
    command = command_line(__spec__.name, argv)
    record = circumstances(command, runtime, tokenizer, None, loaded.values(), *configs)
    recorder, answers = Recorder(tokenizer, tracing.trace), {}
    for kind, model in loaded.items():
        warm_up(model, [prompt], continuation, samplers[kind])
        answers[kind] = generate(model, prompt, continuation, samplers[kind])
        title = {"title": f"{model.described}: {model.path}", "prompt": request.prompt, "system": prompt.system}
        if observe := recorder.observer(**title, **in_effect(samplers[kind]), **{RECORD: record}):
            generate(model, prompt, continuation, samplers[kind], observe)
    saved = recorder.write()
    if request.json:
        result = {
            "prompt": request.prompt,
            "chat_wrap": not isinstance(prompt.content, str),
            "prompt_tokens": len(ids),
            "answers": {kind: costs(answer) | loaded[kind].attention for kind, answer in answers.items()},
            **record,
        }
        print(json.dumps(result, ensure_ascii=False))
        sys.stderr.writelines(f"{line}\n" for line in saved)
    else:
        titles = [f"{model.described} ({model.path.name})" for model in loaded.values()]
        print("\n".join([report(request.prompt, titles, answers), *saved]))


def same_prompt(text: str, prompting: TypedPromptConfig, loaded: dict[str, Loaded]) -> Prompt:
    """The prompt that all models get. ValueError if, left to the checkpoints, they would get different ones."""
    prompts = [prompting.prompt(text, model) for model in loaded.values()]
    if any(prompt != prompts[0] for prompt in prompts):
        plain = next(model.path for model in loaded.values() if not prompting.wraps(model))
        raise ValueError(
            f"{plain} was not trained on conversations, the other checkpoint was; give --chat-wrap or --no-chat-wrap, "
            "so that both get the same prompt"
        )
    for model in loaded.values():
        if note := note_on_template(model, prompting.wraps(model)):
            print(note, file=sys.stderr)
    return prompts[0]


def costs(answer: Generation) -> dict[str, Any]:
    rates = {"tokens_per_second": answer.tokens_per_second, "tokens_per_pass": answer.tokens_per_pass}
    return asdict(answer) | rates


def report(prompt: str, titles: list[str], answers: dict[str, Generation]) -> str:
    """The answers under their titles, two of them side by side, and a table of costs."""
    texts = [g.text if g.text.strip() else "(nothing before EOS)" for g in answers.values()]
    columns = shutil.get_terminal_size((120, 24)).columns
    lines = [on_screen(prompt), "", *side_by_side(titles, texts, columns), ""]
    header = f"{'':<16}{'tokens':>8}{'ended':>8}{'passes':>8}{'tokens/pass':>13}{'seconds':>9}{'tokens/s':>10}"
    rows = [
        f"{kind:<16}{g.num_tokens:>8}{'yes' if g.ended else 'no':>8}{g.num_forward_passes:>8}"
        f"{g.tokens_per_pass:>13.2f}{g.seconds:>9.3f}{g.tokens_per_second:>10.1f}"
        for kind, g in answers.items()
    ]
    return "\n".join([*lines, header, *rows])


if __name__ == "__main__":
    run(main)
