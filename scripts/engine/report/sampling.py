"""How the answers of a report were sampled, in words."""

from dataclasses import fields
from typing import Any

from model.config import ModelConfig
from model.decode import ContinuationConfig, DenoisingConfig, SamplingConfig

ENDS = {"free": "like any token", "confidence": "after all other tokens of its block", "never": "never"}


CACHES = {
    "none": "nothing is kept from one forward pass to the next",
    "block": "keys and values of finished blocks are kept, which is exact",
    "prefix": "keys and values before a block are kept as they were in its first step, an approximation",
    "dual": "keys and values around a block are kept as they were in its first step, an approximation",
}


def sampler_of(report: dict[str, Any], model: dict[str, Any]) -> SamplingConfig | DenoisingConfig:
    """The settings that a model of the report answered with. ValueError: they do not go with its attention."""
    decoding = ModelConfig(attention=model["attention"], block_size=model["block_size"])
    if decoding.autoregressive:
        return _made(report, SamplingConfig)
    return _made(report, DenoisingConfig).fitted(decoding)


def _made(report: dict[str, Any], kind: type) -> Any:
    return kind(**{field.name: report["settings"][field.name] for field in fields(kind)})


def sampling_of(report: dict[str, Any], model: dict[str, Any]) -> str:
    """What the answers of a model were drawn with."""
    length, config = _made(report, ContinuationConfig).max_new_tokens, sampler_of(report, model)
    if isinstance(config, SamplingConfig):
        parts = ["one token after the other", *_draw(config), f"at most {length} new tokens"]
    else:
        block = config.gen_block_size or length
        parts = [
            f"policy {config.gen_remasking}{_policy(config)}",
            f"{config.gen_steps} {'step' if config.gen_steps == 1 else 'steps'}",
            "one block" if block >= length else f"blocks of {block} tokens from left to right",
            f"canvas of {length} masked tokens, as many as may be written",
            *_draw(config),
            f"EOS kept {ENDS[config.gen_eos]}",
            CACHES[config.gen_cache],
        ]
        parts += [f"classifier-free guidance {config.gen_cfg_scale:g}"] if config.gen_cfg_scale else []
    return "; ".join(parts)


def cap_of(settings: dict[str, Any]) -> str:
    """The most that a step of a policy without a schedule keeps."""
    return (
        f"at most {settings['gen_cap_start_ratio']:g} to {settings['gen_cap_end_ratio']:g} of a block's masked tokens "
        f"per step, and {settings['gen_max_decode_per_step']} tokens"
    )


def _policy(config: DenoisingConfig) -> str:
    if config.gen_remasking not in ("threshold", "factor"):
        return ""
    value = config.gen_confidence_threshold if config.gen_remasking == "threshold" else config.gen_factor
    return f" {value:g}, keeping {cap_of(vars(config))}"


def _draw(config: SamplingConfig | DenoisingConfig) -> list[str]:
    draw = config.draw
    if draw.temperature:
        words = f"temperature {draw.temperature:g}"
        words += f", top-k {draw.top_k}" if draw.top_k else ""
        words += f", top-p {draw.top_p:g}" if draw.top_p < 1 else ""
    else:
        words = "the likeliest token (temperature 0)"
    if not draw.repeat_penalty:
        return [words, "no repetition penalty"]
    return [words, f"repetition penalty {draw.repeat_penalty:g} within {draw.repeat_window} tokens"]
