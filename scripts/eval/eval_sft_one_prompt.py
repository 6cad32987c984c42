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
from pathlib import Path
from typing import Annotated

from dataset.tokenizer import load_tokenizer
from model.decode import ContinuationConfig, DenoisingConfig, SamplingConfig
from scripts.engine.cli import parse_args, run
from scripts.engine.decoding.generation import (
    Generation,
    generate,
    warm_up,
)
from scripts.engine.decoding.trace import RECORD
from scripts.engine.decoding.trace_terminal import on_screen, side_by_side
from scripts.engine.decoding.watching import Recorder, TraceConfig
from scripts.engine.files import require_output
from scripts.engine.flags import in_effect
from scripts.engine.loaded import KINDS, Loaded, circumstances, load_kind
from scripts.engine.prompts import Prompt, TypedPromptConfig, note_on_template, prompt_tokens
from scripts.engine.runtime import RuntimeConfig, command_line

RATES = ("tokens_per_second", "tokens_per_pass")


@dataclass(frozen=True)
class Request:
    """Prompt, models and output."""

    prompt: Annotated[str | None, "what the user says"] = None
    minimind_checkpoint: Annotated[Path | None, "autoregressive model"] = None
    diffusion_checkpoint: Annotated[Path | None, "diffusion model"] = None
    tokenizer_dir: Annotated[Path, "directory with tokenizer.json and tokenizer_config.json"] = Path(".")
    max_seq_len: Annotated[int, "longest sequence the models are given, in tokens", "--seq-len", "at least 2"] = 512
    json: Annotated[bool, "print one JSON object instead of text"] = False

    def __post_init__(self):
        if self.prompt is None:
            raise ValueError("--prompt is missing: give what the user says")
        if self.minimind_checkpoint is None and self.diffusion_checkpoint is None:
            raise ValueError("give --minimind-checkpoint, --diffusion-checkpoint or both")

    @property
    def checkpoints(self) -> dict[str, Path]:
        """kind -> file"""
        both = zip(KINDS, (self.minimind_checkpoint, self.diffusion_checkpoint), strict=True)
        return {kind: path for kind, path in both if path is not None}


def main(argv: list[str] | None = None) -> None:
    groups = Request, TypedPromptConfig, ContinuationConfig, SamplingConfig, DenoisingConfig, TraceConfig
    needs = {SamplingConfig: "with --minimind-checkpoint", DenoisingConfig: "with --diffusion-checkpoint"}
    *groups, runtime, _ = parse_args(__doc__, *groups, RuntimeConfig, argv=argv, needs=needs)
    request, prompting, continuation, sampling, denoising, tracing = groups
    configs = dict(zip(KINDS, (sampling, denoising), strict=True))
    require_output(tracing.file, "--trace", *request.checkpoints.values(), request.tokenizer_dir)
    tokenizer = load_tokenizer(request.tokenizer_dir)
    loaded = {
        kind: load_kind(path, kind, tokenizer, request.max_seq_len, runtime)
        for kind, path in request.checkpoints.items()
    }
    if "diffusion" in loaded:
        configs["diffusion"] = denoising.fitted(loaded["diffusion"].model.config)
    put = same_prompt(request, prompting, loaded)
    ids = prompt_tokens(tokenizer, put, continuation.max_new_tokens, request.max_seq_len)  # refused before any work
    recorder, made = Recorder(tokenizer, tracing.trace), {}
    used = request, prompting, continuation, *map(configs.get, loaded)
    about = circumstances(command_line(__spec__.name, argv), runtime, tokenizer, None, loaded.values(), *used)
    for kind, one in loaded.items():
        warm_up(one, [put], continuation, configs[kind])
        made[kind] = generate(one, put, continuation, configs[kind])
        info = {"title": f"{one.described}: {request.checkpoints[kind]}", "prompt": request.prompt}
        info |= in_effect(configs[kind]) | {RECORD: about}
        if observe := recorder.observer(**info):
            generate(one, put, continuation, configs[kind], observe)
    saved = recorder.write()
    if request.json:
        result = {
            "prompt": request.prompt,
            "chat_wrap": not isinstance(put.content, str),
            "prompt_tokens": len(ids),
            "answers": {
                kind: asdict(answer) | {rate: getattr(answer, rate) for rate in RATES} | loaded[kind].attention
                for kind, answer in made.items()
            },
            **about,
        }
        print(json.dumps(result, ensure_ascii=False))
        sys.stderr.writelines(f"{line}\n" for line in saved)
    else:
        titles = [f"{one.described} ({request.checkpoints[kind].name})" for kind, one in loaded.items()]
        print("\n".join([report(request.prompt, titles, made), *saved]))


def same_prompt(request: Request, prompting: TypedPromptConfig, loaded: dict[str, Loaded]) -> Prompt:
    """The prompt as every model gets it; ValueError if by default they would get different ones."""
    wraps = {kind: prompting.wraps(one) for kind, one in loaded.items()}
    if len(set(wraps.values())) > 1:
        plain = next(request.checkpoints[kind] for kind, wrap in wraps.items() if not wrap)
        raise ValueError(
            f"{plain} was not trained on conversations, the other checkpoint was; give --chat-wrap or --no-chat-wrap, "
            "so that both get the same prompt"
        )
    for kind, one in loaded.items():
        if note := note_on_template(one, wraps[kind]):
            print(note, file=sys.stderr)
    return prompting.prompt(request.prompt, next(iter(loaded.values())))


def report(prompt: str, titles: list[str], made: dict[str, Generation]) -> str:
    """The answers, titled, side by side where there are two, and a table of costs."""
    answers = [g.text if g.text.strip() else "(nothing before EOS)" for g in made.values()]
    columns = shutil.get_terminal_size((120, 24)).columns
    lines = [on_screen(prompt), "", *side_by_side(titles, answers, columns), ""]
    header = f"{'':<16}{'tokens':>8}{'ended':>8}{'passes':>8}{'tokens/pass':>13}{'seconds':>9}{'tokens/s':>10}"
    rows = [
        f"{kind:<16}{g.num_tokens:>8}{'yes' if g.ended else 'no':>8}{g.num_forward_passes:>8}"
        f"{g.tokens_per_pass:>13.2f}{g.seconds:>9.3f}{g.tokens_per_second:>10.1f}"
        for kind, g in made.items()
    ]
    return "\n".join([*lines, header, *rows])


if __name__ == "__main__":
    run(main)
