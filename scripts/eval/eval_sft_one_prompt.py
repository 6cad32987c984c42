"""One prompt, answered by an autoregressive model, by a diffusion model, or by both side by side, and what each cost.

    uv run python -m scripts.eval.eval_sft_one_prompt --prompt "你好，请介绍你自己。" \\
        --minimind-checkpoint weights/minimind_sft_state_dict.pt \\
        --diffusion-checkpoint weights/diffusion_sft_state_dict.pt

Both get the same full prompt. Each model is warmed up, then timed; a trace is recorded in a further, untimed run, which
writes the same text.
"""

import json
import shutil
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated

from dataset.tokenizer import load_tokenizer
from model.decode import ContinuationConfig, DenoisingConfig, SamplingConfig
from scripts.engine.cli import parse_args, refuse_idle, run
from scripts.engine.evaluation import Loaded, circumstances, load_kind
from scripts.engine.generation import Generation, PromptConfig, generate, idle_sampling_flags, prompt_tokens
from scripts.engine.runtime import RuntimeConfig
from scripts.engine.trace_terminal import side_by_side
from scripts.engine.watching import Recorder, TraceConfig

KINDS = {"autoregressive": "causal", "diffusion": "full"}
WARM_UP = 4  # tokens or steps


@dataclass(frozen=True)
class Request:
    """What to do."""

    prompt: Annotated[str | None, "what the user says"] = None
    minimind_checkpoint: Annotated[Path | None, "autoregressive model"] = None
    diffusion_checkpoint: Annotated[Path | None, "diffusion model"] = None
    tokenizer_dir: Annotated[Path, "directory with tokenizer.json and tokenizer_config.json"] = Path(".")
    max_seq_len: Annotated[int, "longest sequence the models are given, in tokens", "--seq-len"] = 512
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
    request, prompting, continuation, sampling, denoising, tracing, runtime, given = parse_args(
        __doc__,
        Request,
        PromptConfig,
        ContinuationConfig,
        SamplingConfig,
        DenoisingConfig,
        TraceConfig,
        RuntimeConfig,
        argv=argv,
    )
    configs = dict(zip(KINDS, (sampling, denoising), strict=True))
    for kind, flag in zip(KINDS, ("--minimind-checkpoint", "--diffusion-checkpoint"), strict=True):
        names = [f.name for f in fields(configs[kind])]
        refuse_idle(given, **dict.fromkeys(names, (kind in request.checkpoints, flag)))
        refuse_idle(given, **idle_sampling_flags(configs[kind]))
    tokenizer = load_tokenizer(request.tokenizer_dir)
    loaded = {
        kind: load_kind(path, KINDS[kind], tokenizer, request.max_seq_len, runtime)
        for kind, path in request.checkpoints.items()
    }
    recorder, made = Recorder(tokenizer, tracing.trace), {}
    for kind, one in loaded.items():
        put = prompting.put(request.prompt, one)
        more = continuation, configs[kind], runtime, request.max_seq_len
        made[kind] = timed(one, put, *more)
        info = {"title": f"{kind}: {request.checkpoints[kind]}", "prompt": request.prompt, **asdict(configs[kind])}
        if observe := recorder.observer(**info):
            generate(one.model, tokenizer, put, *more, observe)
    saved = recorder.write()
    if request.json:
        settings = circumstances(runtime, tokenizer, None, request, prompting, continuation, *configs.values())
        results = {kind: asdict(generation) for kind, generation in made.items()}
        print(json.dumps({"prompt": request.prompt, "answers": results, **settings}, ensure_ascii=False))
    else:
        print("\n".join([report(request, made), *saved]))


def timed(
    loaded: Loaded, put, continuation: ContinuationConfig, config, runtime: RuntimeConfig, max_length: int
) -> Generation:
    """The answer, after a short run that is not timed."""
    prompt_tokens(loaded.tokenizer, put, continuation.max_new_tokens, max_length)  # refused before any work
    short = replace(continuation, max_new_tokens=min(continuation.max_new_tokens, WARM_UP))
    generate(loaded.model, loaded.tokenizer, put, short, config, runtime, max_length)
    return generate(loaded.model, loaded.tokenizer, put, continuation, config, runtime, max_length)


def report(request: Request, made: dict[str, Generation]) -> str:
    """The answers, side by side where there are two, and a table of costs."""
    titles = [f"{kind} ({request.checkpoints[kind].name})" for kind in made]
    answers = [generation.text for generation in made.values()]
    columns = shutil.get_terminal_size((120, 24)).columns
    lines = [request.prompt, "", *side_by_side(titles, answers, columns), ""]
    header = f"{'':<16}{'tokens':>8}{'ended':>8}{'passes':>8}{'tokens/pass':>13}{'seconds':>9}{'tokens/s':>10}"
    rows = [
        f"{kind:<16}{g.num_tokens:>8}{'yes' if g.ended else 'no':>8}{g.num_forward_passes:>8}"
        f"{g.num_tokens / g.num_forward_passes:>13.2f}{g.seconds:>9.3f}{g.num_tokens / g.seconds:>10.1f}"
        for kind, g in made.items()
    ]
    return "\n".join([*lines, header, *rows])


if __name__ == "__main__":
    run(main)
