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

import json
import sys
from dataclasses import asdict, dataclass
from typing import Annotated

from model.decode import ContinuationConfig, DenoisingConfig
from scripts.engine.cli import parse_args, run
from scripts.engine.decoding.generation import (
    Generation,
    Observe,
    generate,
    infill,
    note_on_blanks,
)
from scripts.engine.decoding.trace import RECORD
from scripts.engine.decoding.watching import Recorder, TraceConfig
from scripts.engine.files import require_output
from scripts.engine.flags import in_effect
from scripts.engine.likelihood.documents import (
    as_trained,
    evaluate_documents,
    facts_of_models,
    masked_cross_entropy,
    response_likelihood,
    response_line,
)
from scripts.engine.likelihood.windows import DRAWN_MASKS, DataEvalConfig
from scripts.engine.loaded import CheckpointConfig, Loaded, circumstances, require_kind
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

    @property
    def generating(self) -> bool:
        return self.infill is not None or (self.prompt is not None and self.cond_ll_response is None)


def main(argv: list[str] | None = None) -> None:
    groups = Request, CheckpointConfig, DataEvalConfig, TypedPromptConfig, ContinuationConfig, DenoisingConfig
    written = "with --prompt or --infill", "without --cond-ll-response"
    needs = {
        TypedPromptConfig: "with --prompt or --infill",
        **dict.fromkeys((ContinuationConfig, DenoisingConfig, TraceConfig), written),
        **dict.fromkeys(("max_new_tokens", "gen_eos"), "without --infill"),  # blanks have a length and no end
    }
    configs = parse_args(__doc__, *groups, TraceConfig, RuntimeConfig, argv=argv, needs=needs)
    request, checkpoint, data, prompting, continuation, denoising, tracing, runtime, given = configs
    if request.prompt is None and request.infill is None and data.eval_data is None:
        raise ValueError("nothing to do: give --prompt, --infill or --eval-data")
    require_output(tracing.file, "--trace", checkpoint.checkpoint, data.eval_data, checkpoint.tokenizer_dir)
    loaded = checkpoint.load(runtime)
    require_kind(loaded, "diffusion")
    model, tokenizer, command = loaded.model, loaded.tokenizer, command_line(__spec__.name, argv)
    given.refuse_without(facts_of_models(loaded))
    denoising = denoising.fitted(model.config)
    configs = checkpoint, data, prompting, continuation, denoising
    result = loaded.attention | circumstances(command, runtime, tokenizer, data.eval_data, [loaded], *configs)
    lines = [f"{checkpoint.checkpoint}: {loaded.described}"] if model.config.block_size else []
    if request.cond_ll_response is not None:
        prompt = prompting.prompt(request.prompt, loaded)
        score = response_likelihood(loaded, prompt, request.cond_ll_response, request.cond_ll_nmc)
        result["conditional"] = score
        lines.append(response_line(loaded, score, request.cond_ll_nmc))
    elif request.generating:
        recorder = Recorder(tokenizer, tracing.trace)
        info = {"prompt": request.infill or request.prompt, "checkpoint": checkpoint.checkpoint}
        observe = recorder.observer(**info | in_effect(denoising) | {RECORD: result})
        made = write(request, prompting, loaded, continuation, denoising, observe)
        result["generation"] = asdict(made)
        lines += [made.report(), *recorder.write()]
    if data.eval_data is not None:
        likelihood, record = evaluate_documents(loaded, data)
        result |= record
        lines += [f"{name}: {value.line()}" for name, value in likelihood.items()]
    if request.eval_mask_ratio is not None:
        loss = masked_cross_entropy(loaded, as_trained(data, loaded), request.eval_mask_ratio)
        result["masked_cross_entropy"] = {"mask_ratio": request.eval_mask_ratio, "nats_per_masked_token": loss}
        lines.append(f"at a mask ratio of {request.eval_mask_ratio}: {loss:.4f} nats per masked token (no likelihood)")
    print(json.dumps(result, ensure_ascii=False) if request.json else "\n".join(lines))


def write(
    request: Request,
    prompting: TypedPromptConfig,
    loaded: Loaded,
    continuation: ContinuationConfig,
    denoising: DenoisingConfig,
    observe: Observe | None,
) -> Generation:
    """Continue the prompt, or fill the blanks."""
    if request.infill is None:
        return generate(loaded, prompting.prompt(request.prompt, loaded), continuation, denoising, observe)
    if note := note_on_blanks(loaded):
        print("note:", note, file=sys.stderr)
    blanks = prompting.blanks(request.infill, request.blank_tokens, request.prompt, loaded)
    return infill(loaded, blanks, continuation, denoising, observe)


if __name__ == "__main__":
    run(main)
