"""Use a diffusion checkpoint: continue a prompt by iterative denoising, evaluate a file, or score a given response.

    uv run python -m scripts.eval.eval_diffusion --checkpoint weights/diffusion_state_dict.pt \\
        --prompt "Once upon a time"
    uv run python -m scripts.eval.eval_diffusion --checkpoint weights/diffusion_state_dict.pt \\
        --eval-data dataset/val.jsonl
    uv run python -m scripts.eval.eval_diffusion --checkpoint weights/diffusion_state_dict.pt \\
        --prompt "Two and two make" --cond-ll-response " four."

The network's shape comes from the checkpoint; no flag describes it.
"""

import json
from dataclasses import asdict, dataclass, fields
from typing import Annotated

from model.decode import DenoisingConfig, SamplingConfig, decode_diffusion
from scripts.engine.cli import parse_args, refuse_idle, run
from scripts.engine.evaluation import (
    CheckpointConfig,
    as_json,
    circumstances,
    evaluate_file,
    masked_cross_entropy,
    response_likelihood,
)
from scripts.engine.generation import generate
from scripts.engine.runtime import RuntimeConfig
from scripts.engine.windows import DataEvalConfig


@dataclass(frozen=True)
class Request:
    """What to do."""

    prompt: Annotated[str | None, "text to continue, or the condition of --cond-ll-response"] = None
    cond_ll_response: Annotated[
        str | None, "instead of generating, the log-likelihood of this response to --prompt"
    ] = None
    cond_ll_nmc: Annotated[int, "masks drawn for it; one is exact for a response of one token"] = 64
    eval_mask_ratio: Annotated[
        float | None, "with --eval-data: also the cross-entropy with this share of the tokens masked"
    ] = None
    json: Annotated[bool, "print one JSON object instead of text"] = False

    def __post_init__(self):
        if self.cond_ll_response is not None and self.prompt is None:
            raise ValueError("--cond-ll-response needs --prompt (which may be empty)")
        if self.cond_ll_nmc < 1:
            raise ValueError(f"--cond-ll-nmc must be at least 1, not {self.cond_ll_nmc}")
        if self.eval_mask_ratio is not None and not 0 < self.eval_mask_ratio <= 1:
            raise ValueError(f"--eval-mask-ratio must be in (0, 1], not {self.eval_mask_ratio}")


def main(argv: list[str] | None = None) -> None:
    request, checkpoint, data, sampling, denoising, runtime, given = parse_args(
        __doc__,
        Request,
        CheckpointConfig,
        DataEvalConfig,
        SamplingConfig,
        DenoisingConfig,
        RuntimeConfig,
        argv=argv,
    )
    if request.prompt is None and data.eval_data is None:
        raise ValueError("nothing to do: give --prompt, --eval-data or both")
    generating = request.prompt is not None and request.cond_ll_response is None, "a --prompt to continue"
    refuse_idle(given, **{f.name: generating for f in (*fields(SamplingConfig), *fields(DenoisingConfig))})
    reading = data.eval_data is not None, "--eval-data"
    refuse_idle(
        given,
        **dict.fromkeys(("jsonl_field", "eval_split", "eval_batch_size", "eval_max_batches", "num_samples"), reading),
    )
    scoring = request.cond_ll_response is not None, "--cond-ll-response"
    held_out = data.eval_split == "validation", "--eval-split validation"
    refuse_idle(given, eval_mask_ratio=reading, cond_ll_nmc=scoring, val_fraction=held_out)
    model, tokenizer, _ = checkpoint.load(runtime)
    if model.config.attention != "full":
        raise ValueError(f"{checkpoint.checkpoint} is autoregressive; use scripts.eval.eval_minimind")
    result = circumstances(runtime, tokenizer, data.eval_data, checkpoint, data, sampling, denoising)
    lines = []
    if request.cond_ll_response is not None:
        score = response_likelihood(
            model,
            tokenizer,
            request.prompt,
            request.cond_ll_response,
            request.cond_ll_nmc,
            checkpoint.max_seq_len,
            runtime,
        )
        result["conditional"] = score
        error = score["mask_standard_error"]  # none for a single mask
        shown = "" if error is None else f" +- {error:.4f}"
        lines.append(
            f"log p(response | prompt) >= {score['log_likelihood']:.4f}{shown} nats "
            f"({score['tokens']} tokens, {request.cond_ll_nmc} masks)"
        )
    elif request.prompt is not None:
        made = generate(
            model, tokenizer, request.prompt, sampling, runtime, checkpoint.max_seq_len, decode_diffusion, denoising
        )
        result["generation"] = asdict(made)
        lines.append(made.report())
    if data.eval_data is not None:
        likelihood = evaluate_file(model, tokenizer, data, checkpoint.max_seq_len, runtime)
        result["likelihood"] = as_json(likelihood)
        lines += [f"{name}: {value.line()}" for name, value in likelihood.items()]
    if request.eval_mask_ratio is not None:
        loss = masked_cross_entropy(model, tokenizer, data, checkpoint.max_seq_len, request.eval_mask_ratio, runtime)
        result["masked_cross_entropy"] = {"mask_ratio": request.eval_mask_ratio, "nats_per_masked_token": loss}
        lines.append(f"at a mask ratio of {request.eval_mask_ratio}: {loss:.4f} nats per masked token (no likelihood)")
    print(json.dumps(result, ensure_ascii=False) if request.json else "\n".join(lines))


if __name__ == "__main__":
    run(main)
