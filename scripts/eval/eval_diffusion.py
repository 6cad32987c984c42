"""Use a diffusion checkpoint: continue a prompt by denoising, fill blanks, evaluate a file, or score a response.

    uv run python -m scripts.eval.eval_diffusion --checkpoint weights/diffusion_state_dict.pt \\
        --prompt "Once upon a time"
    uv run python -m scripts.eval.eval_diffusion --checkpoint weights/diffusion_state_dict.pt \\
        --infill "Once upon a time there was ___, and in the end ___."
    uv run python -m scripts.eval.eval_diffusion --checkpoint weights/diffusion_state_dict.pt \\
        --eval-data dataset/val.jsonl
    uv run python -m scripts.eval.eval_diffusion --checkpoint weights/diffusion_state_dict.pt \\
        --prompt "Two and two make" --cond-ll-response " four."

The network's shape comes from the checkpoint, and so do its blocks, if it has any; no flag describes them.
"""

import sys
from dataclasses import dataclass
from typing import Annotated

from model.decoding.decode import ContinuationConfig
from model.decoding.denoiser import DenoisingConfig
from scripts.engine.cli import parse_args, run
from scripts.engine.decoding.command import Output
from scripts.engine.decoding.generation import note_on_blanks
from scripts.engine.decoding.watching import TraceConfig
from scripts.engine.files import require_output
from scripts.engine.likelihood.documents import (
    as_trained,
    facts_of_models,
    masked_cross_entropy,
    response_likelihood,
    response_line,
)
from scripts.engine.likelihood.windows import DRAWN_MASKS, DataEvalConfig
from scripts.engine.loaded import CheckpointConfig, circumstances, require_kind
from scripts.engine.prompts import TypedPromptConfig
from scripts.engine.runtime import RuntimeConfig, command_line


@dataclass(frozen=True)
class Request:
    """Prompt, response and output."""

    prompt: Annotated[str | None, "text to continue, or the condition of --cond-ll-response"] = None
    infill: Annotated[str | None, "text whose blanks (___) are filled; in the chat template a reply to --prompt"] = None
    blank_tokens: Annotated[int, "tokens in place of each blank", "at least 1", "with --infill"] = 8
    cond_ll_response: Annotated[
        str | None, "instead of generating, the log-likelihood of this response to --prompt"
    ] = None
    cond_ll_nmc: Annotated[
        int,
        "masks drawn for it; one is exact for a response of one token",
        "at least 1",
        "with --cond-ll-response",
        f"with {DRAWN_MASKS}",
    ] = 64
    eval_mask_ratio: Annotated[
        float | None, "also the cross-entropy with this share of the tokens masked", "in (0, 1]", "with --eval-data"
    ] = None
    json: Annotated[bool, "print one JSON object instead of text"] = False

    def __post_init__(self):
        if self.cond_ll_response is not None and self.prompt is None:
            raise ValueError("--cond-ll-response needs --prompt (which may be empty)")
        if self.cond_ll_response is not None and self.infill is not None:
            raise ValueError("--cond-ll-response scores a response, --infill writes one; give one of them")


WRITTEN = "with --prompt or --infill", "without --cond-ll-response"
NEEDS = {
    TypedPromptConfig: "with --prompt or --infill",
    **dict.fromkeys((ContinuationConfig, DenoisingConfig, TraceConfig), WRITTEN),
    **dict.fromkeys(("max_new_tokens", "gen_eos"), "without --infill"),  # blanks have a length and no end
}


def main(argv: list[str] | None = None) -> None:
    groups = Request, CheckpointConfig, DataEvalConfig, TypedPromptConfig, ContinuationConfig, DenoisingConfig
    *configs, runtime, given = parse_args(__doc__, *groups, TraceConfig, RuntimeConfig, argv=argv, needs=NEEDS)
    request, checkpoint, data, prompting, continuation, denoising, tracing = configs
    if request.prompt is None and request.infill is None and data.eval_data is None:
        raise ValueError("nothing to do: give --prompt, --infill or --eval-data")
    require_output(tracing.file, "--trace", checkpoint.checkpoint, data.eval_data, checkpoint.tokenizer_dir)
    loaded = checkpoint.load(runtime, "diffusion")
    require_kind(loaded, "diffusion")
    given.refuse_without(facts_of_models(loaded))
    denoising = denoising.fitted(loaded.model.config)
    configs = checkpoint, data, prompting, continuation, denoising
    command = command_line(__spec__.name, argv)
    record = circumstances(command, runtime, loaded.tokenizer, data.eval_data, [loaded], *configs)
    output = Output(loaded, loaded.attention | record, request.json)
    if loaded.model.config.block_size:
        output.add({}, f"{checkpoint.checkpoint}: {loaded.described}")
    if request.cond_ll_response is not None:
        prompt = prompting.prompt(request.prompt, loaded)
        score = response_likelihood(loaded, prompt, request.cond_ll_response, request.cond_ll_nmc)
        output.add({"conditional": score}, response_line(loaded, score, request.cond_ll_nmc))
    elif request.infill is not None:
        if note := note_on_blanks(loaded):
            print("note:", note, file=sys.stderr)
        blanks = prompting.blanks(request.infill, request.blank_tokens, request.prompt, loaded)
        output.generation(blanks, continuation, denoising, tracing.trace)
    elif request.prompt is not None:
        output.generation(prompting.prompt(request.prompt, loaded), continuation, denoising, tracing.trace)
    if data.eval_data is not None:
        output.documents(data)
    if request.eval_mask_ratio is not None:
        ratio = request.eval_mask_ratio
        loss = masked_cross_entropy(loaded, as_trained(data, loaded), ratio)
        line = f"at a mask ratio of {ratio}: {loss:.4f} nats per masked token (no likelihood)"
        output.add({"masked_cross_entropy": {"mask_ratio": ratio, "nats_per_masked_token": loss}}, line)
    output.finish()


if __name__ == "__main__":
    run(main)
