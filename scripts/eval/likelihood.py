"""How likely a checkpoint of either kind finds the text of a file: nats per token, perplexity, bits per byte.

    uv run python -m scripts.eval.likelihood --checkpoint weights/diffusion_state_dict.pt --eval-data dataset/val.jsonl

Exact for an autoregressive model (chain rule), an upper bound for a diffusion model (LLaDA Eq. 6), over the same
tokens.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from scripts.engine.cli import parse_args, refuse_idle, run
from scripts.engine.evaluation import CheckpointConfig, as_json, circumstances, evaluate_file
from scripts.engine.run import require_writable
from scripts.engine.runtime import RuntimeConfig
from scripts.engine.windows import DataEvalConfig


@dataclass(frozen=True)
class Output:
    """Output."""

    json: Annotated[Path | None, "also write the result, with all it depends on, to this file"] = None


def main(argv: list[str] | None = None) -> None:
    output, checkpoint, data, runtime, given = parse_args(
        __doc__,
        Output,
        CheckpointConfig,
        DataEvalConfig,
        RuntimeConfig,
        argv=argv,
    )
    if data.eval_data is None:
        raise ValueError("--eval-data is missing: give a .jsonl or .txt file")
    if output.json:
        require_writable(output.json, "--json")
    model, tokenizer, _ = checkpoint.load(runtime)
    refuse_idle(given, val_fraction=(data.eval_split == "validation", "--eval-split validation"))
    refuse_idle(given, num_samples=(model.config.attention == "full", "a diffusion model"))
    result = evaluate_file(model, tokenizer, data, checkpoint.max_seq_len, runtime)
    print("\n".join(f"{name}: {value.line()}" for name, value in result.items()))
    if output.json:
        written = {
            "likelihood": as_json(result),
            **circumstances(runtime, tokenizer, data.eval_data, checkpoint, data),
        }
        text = json.dumps(written, indent=1)
        output.json.parent.mkdir(parents=True, exist_ok=True)
        output.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
