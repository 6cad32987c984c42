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

from model.decode import SamplingConfig, decode_autoregressive
from scripts.engine.cli import parse_args, refuse_idle, run
from scripts.engine.evaluation import CheckpointConfig, as_json, circumstances, evaluate_file
from scripts.engine.generation import generate
from scripts.engine.runtime import RuntimeConfig
from scripts.engine.windows import DataEvalConfig


@dataclass(frozen=True)
class Request:
    """What to do."""

    prompt: Annotated[str | None, "text to continue"] = None
    json: Annotated[bool, "print one JSON object instead of text"] = False


def main(argv: list[str] | None = None) -> None:
    request, checkpoint, data, sampling, runtime, given = parse_args(
        __doc__,
        Request,
        CheckpointConfig,
        DataEvalConfig,
        SamplingConfig,
        RuntimeConfig,
        argv=argv,
    )
    if request.prompt is None and data.eval_data is None:
        raise ValueError("nothing to do: give --prompt, --eval-data or both")
    prompted, read = (request.prompt is not None, "--prompt"), (data.eval_data is not None, "--eval-data")
    refuse_idle(given, max_new_tokens=prompted, temperature=prompted, top_k=prompted, gen_seed=prompted)
    refuse_idle(given, jsonl_field=read, eval_split=read, eval_batch_size=read, eval_max_batches=read)
    refuse_idle(
        given,
        val_fraction=(data.eval_split == "validation", "--eval-split validation"),
        num_samples=(False, "a diffusion model"),
    )
    model, tokenizer, _ = checkpoint.load(runtime)
    if model.config.attention != "causal":
        raise ValueError(f"{checkpoint.checkpoint} was trained by diffusion; use scripts.eval.eval_diffusion")
    result = circumstances(runtime, tokenizer, data.eval_data, checkpoint, data, sampling)
    if request.prompt is not None:
        made = generate(
            model, tokenizer, request.prompt, sampling, runtime, checkpoint.max_seq_len, decode_autoregressive
        )
        result["generation"] = asdict(made)
        if not request.json:
            print(made.report())
    if data.eval_data is not None:
        likelihood = evaluate_file(model, tokenizer, data, checkpoint.max_seq_len, runtime)
        result["likelihood"] = as_json(likelihood)
        if not request.json:
            print("\n".join(f"{name}: {value.line()}" for name, value in likelihood.items()))
    if request.json:
        print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    run(main)
