"""Pretrain a masked diffusion language model (LLaDA, arXiv:2502.09992); without --train, generate from one.

    uv run python -m scripts.train.diffusion --train --use-tokenizer --data dataset/pretrain_hq.jsonl \\
        --init-from-minimind weights/minimind_pretrain_state_dict.pt --run-name diffusion
    uv run python -m scripts.train.diffusion --use-tokenizer --run-name diffusion --prompt "Once upon a time"

Without --use-tokenizer it works on characters, with a vocabulary of those in --data, kept in
<save-dir>/<run>_tokenizer.
"""

from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated

from dataset.pretrain import DiffusionPretrainData, PretrainDataset
from dataset.reading.bad_rows import BadRows
from dataset.reading.documents import read_documents
from dataset.spelling import check_blanks
from dataset.tokenizer import (
    MASK_TOKEN,
    PreTrainedTokenizerFast,
    fingerprint,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
    train_characters,
)
from model.checkpoint import load_model
from model.config import ModelConfig
from model.decoding.decode import ContinuationConfig
from model.decoding.denoiser import DenoisingConfig
from model.forward_process import EPS_IN_BAND
from model.masked_diffusion import MaskedDiffusion
from scripts.engine.cli import parse_args, run
from scripts.engine.decoding.generation import generate
from scripts.engine.loaded import Loaded
from scripts.engine.prompts import Prompt, prompt_tokens
from scripts.engine.training.config import GROUPS, StageConfigs, TrainerConfig
from scripts.engine.training.optim import OptimConfig
from scripts.engine.training.run import RunConfig, continues
from scripts.engine.training.stage import Stage


@dataclass(frozen=True)
class DiffusionRun:
    """Training or generation, and the run's own tokenizer."""

    train: Annotated[bool, "train; without it, generate from the run's weights"] = False
    prompt: Annotated[str, "beginning of the text to generate; after training, of the closing sample"] = ""
    use_tokenizer: Annotated[bool, "the tokenizer of --tokenizer-dir; without it, characters"] = False
    retrain_tokenizer: Annotated[
        bool,
        "train a byte-level BPE on --data first, into <save-dir>/<run>_tokenizer",
        "with --train",
        "with --use-tokenizer",
    ] = False
    target_vocab_size: Annotated[
        int, "its entries, special tokens included", "at least 1", "with --retrain-tokenizer"
    ] = 6400
    mask_token: Annotated[str, "spelling of the mask token", "with a tokenizer that is trained here"] = MASK_TOKEN


GENERATION = {"tokenizer_dir", "max_seq_len", "run_name", "save_dir", "weights_path"}  # uses these fields, too
ONLY_TRAINING = (
    *(MaskedDiffusion, ModelConfig, OptimConfig, TrainerConfig),
    *(f.name for group in (DiffusionPretrainData, RunConfig) for f in fields(group) if f.name not in GENERATION),
)


def main(argv: list[str] | None = None) -> None:
    what, data, continuation, denoising, objective, *configs = parse_args(
        __doc__,
        DiffusionRun,
        DiffusionPretrainData,
        ContinuationConfig,
        DenoisingConfig,
        MaskedDiffusion,
        *GROUPS,
        argv=argv,
        run_name="diffusion",
        learning_rate=4e-4,
        needs=dict.fromkeys(ONLY_TRAINING, "with --train")
        | {"tokenizer_dir": ("with --use-tokenizer", "without --retrain-tokenizer")},
    )
    configs = StageConfigs(*configs, argv)
    configs.given.refuse_without(
        {
            "a tokenizer that is trained here": what.retrain_tokenizer or not what.use_tokenizer,
            "character mode": not what.use_tokenizer,
            EPS_IN_BAND: objective.eps_has_effect,
        }
    )
    tokenizer, is_new = find_tokenizer(what, data, configs)
    prompt = Prompt(what.prompt)
    if "max_new_tokens" not in configs.given:  # the default gives way to a short canvas, a typed number does not
        room = data.max_seq_len - len(prompt_tokens(tokenizer, prompt, 1, data.max_seq_len))
        continuation = replace(continuation, max_new_tokens=min(continuation.max_new_tokens, room))
    # A prompt that does not fit is refused before the training, not after it.
    prompt_tokens(tokenizer, prompt, continuation.max_new_tokens, data.max_seq_len)
    if what.train:
        stage = Stage("scripts.train.diffusion", configs, objective, data, tokenizer)
        with stage.opened():
            denoising.fitted(stage.model.config)  # what does not go with the weights to come is refused before training
            keep = partial(save_own, tokenizer, configs.run.path("_tokenizer")) if is_new else lambda: None
            size = stage.model.config.block_size
            configs.given.refuse_without({"block diffusion": size > 0})
            model = stage.train(stage.build(PretrainDataset, block_size=size), before=keep)
        if model is None:
            return
    else:
        model = load_model(configs.run.exported_path, configs.runtime.torch_device, tokenizer=fingerprint(tokenizer))
        model.set_context(data.max_seq_len)
    loaded = Loaded(model, tokenizer, configs.runtime, data.max_seq_len)
    print(generate(loaded, prompt, continuation, denoising).report())


def find_tokenizer(
    what: DiffusionRun, data: DiffusionPretrainData, configs: StageConfigs
) -> tuple[PreTrainedTokenizerFast, bool]:
    """Return the tokenizer in --tokenizer-dir, or the run's own, and whether it is new, made from --data."""
    own = configs.run.path("_tokenizer")
    if what.use_tokenizer and not what.retrain_tokenizer:
        return load_tokenizer(data.tokenizer_dir), False
    if not what.train or (not configs.run.previewing and continues(configs.run)):
        tokenizer = load_tokenizer(own)
        for name, value in (("mask_token", tokenizer.mask_token), ("target_vocab_size", len(tokenizer))):
            if name in configs.given and getattr(what, name) != value:
                raise ValueError(
                    f"{own} has a {name.replace('_', ' ')} of {value}; leave out --{name.replace('_', '-')}"
                )
        return tokenizer, False
    bad = BadRows(data.on_bad_row)
    texts = (
        text
        for file in data.files
        for text in read_documents(file, data.jsonl_field, bad, check_blanks, separator=data.separator)
    )
    if what.retrain_tokenizer:
        return train_bpe(texts, what.target_vocab_size, what.mask_token), True
    return train_characters(texts, what.mask_token), True


def save_own(tokenizer: PreTrainedTokenizerFast, own: Path) -> None:
    save_tokenizer(tokenizer, own)
    print(f"saved {own} ({len(tokenizer)} entries); give it to other commands with --tokenizer-dir")


if __name__ == "__main__":
    run(main)
