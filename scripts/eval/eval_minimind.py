"""Use an autoregressive checkpoint: continue a prompt, or evaluate a file.

    uv run python -m scripts.eval.eval_minimind --checkpoint weights/minimind_pretrain_state_dict.pt \\
        --prompt "Once upon a time"
    uv run python -m scripts.eval.eval_minimind --checkpoint weights/minimind_pretrain_state_dict.pt \\
        --eval-data dataset/val.jsonl

The network's shape comes from the checkpoint; no flag describes it.
"""

from dataclasses import dataclass
from typing import Annotated

from model.decoding.autoregressive import SamplingConfig
from model.decoding.decode import ContinuationConfig
from scripts.engine.cli import parse_args, run
from scripts.engine.decoding.command import Output
from scripts.engine.decoding.watching import TraceConfig
from scripts.engine.files import require_output
from scripts.engine.likelihood.windows import DataEvalConfig
from scripts.engine.loaded import CheckpointConfig, circumstances, require_kind
from scripts.engine.prompts import TypedPromptConfig
from scripts.engine.runtime import RuntimeConfig, command_line


@dataclass(frozen=True)
class Request:
    """Prompt and output."""

    prompt: Annotated[str | None, "text to continue"] = None
    json: Annotated[bool, "print one JSON object instead of text"] = False


def main(argv: list[str] | None = None) -> None:
    writing = TypedPromptConfig, ContinuationConfig, SamplingConfig, TraceConfig
    groups = Request, CheckpointConfig, DataEvalConfig, *writing, RuntimeConfig
    *configs, runtime, given = parse_args(__doc__, *groups, argv=argv, needs=dict.fromkeys(writing, "with --prompt"))
    request, checkpoint, data, prompting, continuation, sampling, tracing = configs
    if request.prompt is None and data.eval_data is None:
        raise ValueError("nothing to do: give --prompt, --eval-data or both")
    given.refuse_without({"a diffusion model": False})
    require_output(tracing.file, "--trace", checkpoint.checkpoint, data.eval_data, checkpoint.tokenizer_dir)
    loaded = checkpoint.load(runtime, "autoregressive")
    require_kind(loaded, "autoregressive")
    configs = checkpoint, data, prompting, continuation, sampling
    command = command_line(__spec__.name, argv)
    record = circumstances(command, runtime, loaded.tokenizer, data.eval_data, [loaded], *configs)
    output = Output(loaded, record, request.json)
    if request.prompt is not None:
        output.generation(prompting.prompt(request.prompt, loaded), continuation, sampling, tracing.trace)
    if data.eval_data is not None:
        output.documents(data)
    output.finish()


if __name__ == "__main__":
    run(main)
