"""Use an autoregressive checkpoint: continue a prompt, or evaluate a file.

    uv run python -m scripts.eval.eval_minimind --checkpoint weights/minimind_pretrain_state_dict.pt \\
        --prompt "Once upon a time"
    uv run python -m scripts.eval.eval_minimind --checkpoint weights/minimind_pretrain_state_dict.pt \\
        --eval-data dataset/val.jsonl

The network's shape comes from the checkpoint; no flag describes it.
"""

import json
from dataclasses import asdict, dataclass
from typing import Annotated

from model.decode import ContinuationConfig, SamplingConfig
from scripts.engine.cli import parse_args, run
from scripts.engine.decoding.generation import generate
from scripts.engine.decoding.trace import RECORD
from scripts.engine.decoding.watching import Recorder, TraceConfig
from scripts.engine.files import require_output
from scripts.engine.flags import in_effect
from scripts.engine.likelihood.documents import evaluate_documents
from scripts.engine.likelihood.windows import DIFFUSION, DataEvalConfig
from scripts.engine.loaded import CheckpointConfig, circumstances, require_kind
from scripts.engine.prompts import TypedPromptConfig
from scripts.engine.runtime import RuntimeConfig, command_line


@dataclass(frozen=True)
class Request:
    """Prompt and output."""

    prompt: Annotated[str | None, "text to continue"] = None
    json: Annotated[bool, "print one JSON object instead of text"] = False


def main(argv: list[str] | None = None) -> None:
    request, checkpoint, data, prompting, continuation, sampling, tracing, runtime, given = parse_args(
        __doc__,
        Request,
        CheckpointConfig,
        DataEvalConfig,
        TypedPromptConfig,
        ContinuationConfig,
        SamplingConfig,
        TraceConfig,
        RuntimeConfig,
        argv=argv,
        needs=dict.fromkeys((TypedPromptConfig, ContinuationConfig, SamplingConfig, TraceConfig), "with --prompt"),
    )
    if request.prompt is None and data.eval_data is None:
        raise ValueError("nothing to do: give --prompt, --eval-data or both")
    given.refuse_without({DIFFUSION: False})
    require_output(tracing.file, "--trace", checkpoint.checkpoint, data.eval_data, checkpoint.tokenizer_dir)
    loaded = checkpoint.load(runtime)
    require_kind(loaded, "autoregressive")
    tokenizer, command = loaded.tokenizer, command_line(__spec__.name, argv)
    configs = checkpoint, data, prompting, continuation, sampling
    result = circumstances(command, runtime, tokenizer, data.eval_data, [loaded], *configs)
    if request.prompt is not None:
        prompt = prompting.prompt(request.prompt, loaded)
        recorder = Recorder(tokenizer, tracing.trace)
        info = {"prompt": request.prompt, "checkpoint": checkpoint.checkpoint, **in_effect(sampling), RECORD: result}
        made = generate(loaded, prompt, continuation, sampling, recorder.observer(**info))
        result["generation"] = asdict(made)
        saved = recorder.write()
        if not request.json:
            print("\n".join([made.report(), *saved]))
    if data.eval_data is not None:
        likelihood, record = evaluate_documents(loaded, data)
        result |= record
        if not request.json:
            print("\n".join(f"{name}: {value.line()}" for name, value in likelihood.items()))
    if request.json:
        print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    run(main)
