"""Pretrain a masked diffusion language model (LLaDA, arXiv:2502.09992); without --train, generate from one.

    uv run python -m scripts.train.diffusion --train --use-tokenizer --data dataset/pretrain_hq.jsonl \\
        --init-from-minimind weights/minimind_pretrain_state_dict.pt --run-name diffusion
    uv run python -m scripts.train.diffusion --use-tokenizer --run-name diffusion --prompt "Once upon a time"

Without --use-tokenizer it works on characters, with a vocabulary of those in --data, kept in
<save-dir>/<run>_tokenizer.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from dataset.jsonl import read_documents
from dataset.pretrain import PretrainData, PretrainDataset
from dataset.tokenizer import MASK_TOKEN, fingerprint, load_tokenizer, save_tokenizer, train_bpe, train_characters
from model.checkpoint import load_model
from model.config import ModelConfig
from model.decode import DenoisingConfig, SamplingConfig, decode_diffusion
from model.objective import MaskedDiffusion
from scripts.engine.cli import parse_args, run
from scripts.engine.generation import generate
from scripts.engine.optim import OptimConfig
from scripts.engine.run import RunConfig
from scripts.engine.runtime import RuntimeConfig
from scripts.engine.stage import StageConfigs, train_stage
from scripts.engine.trainer import TrainerConfig


@dataclass(frozen=True)
class DiffusionRun:
    """What to do."""

    train: Annotated[bool, "train; without it, generate from the run's weights"] = False
    prompt: Annotated[str, "beginning of the text to generate; after training, of the closing sample"] = ""
    use_tokenizer: Annotated[bool, "the tokenizer of --tokenizer-dir; without it, characters"] = False
    retrain_tokenizer: Annotated[bool, "train a byte-level BPE on --data first, into <save-dir>/<run>_tokenizer"] = (
        False
    )
    target_vocab_size: Annotated[int, "its entries, special tokens included"] = 6400
    mask_token: Annotated[str, "spelling of the mask token"] = MASK_TOKEN

    def __post_init__(self):
        if self.retrain_tokenizer and not (self.use_tokenizer and self.train):
            raise ValueError("--retrain-tokenizer needs --train and --use-tokenizer")


def main(argv: list[str] | None = None) -> None:
    what, data, sampling, denoising, objective, *configs = parse_args(
        __doc__,
        DiffusionRun,
        PretrainData,
        SamplingConfig,
        DenoisingConfig,
        MaskedDiffusion,
        ModelConfig,
        OptimConfig,
        TrainerConfig,
        RunConfig,
        RuntimeConfig,
        argv=argv,
        run_name="diffusion",
        learning_rate=4e-4,
    )
    configs = StageConfigs(*configs)
    refuse_unused(what, data, configs)
    tokenizer = find_tokenizer(what, data, configs)
    if what.train:
        model = train_stage(
            "scripts.train.diffusion",
            configs,
            objective,
            data,
            tokenizer,
            build=lambda: PretrainDataset(data, tokenizer),
        )
        if model is None:
            return
    else:
        model = load_model(configs.run.exported_path, configs.runtime.torch_device, tokenizer=fingerprint(tokenizer))
    print(
        generate(
            model, tokenizer, what.prompt, sampling, configs.runtime, data.max_seq_len, decode_diffusion, denoising
        ).report()
    )


def refuse_unused(what: DiffusionRun, data: PretrainData, configs: StageConfigs) -> None:
    """ValueError for flags that would be ignored."""
    training = {f.name for group in (MaskedDiffusion, ModelConfig, OptimConfig, TrainerConfig) for f in fields(group)}
    training |= {
        "data",
        "jsonl_field",
        "val_fraction",
        "packing",
        "load_from",
        "resume",
        "overwrite",
        "dry_run",
        "show_batch",
    }
    if not what.train and (idle := sorted(training & configs.given)):
        raise ValueError(f"--{idle[0].replace('_', '-')} is for training; add --train, or leave it out to generate")
    if data.jsonl_sep is not None and what.use_tokenizer:
        raise ValueError("--jsonl-sep is for character mode; leave it out with --use-tokenizer")
    for name, needed in (("target_vocab_size", "retrain_tokenizer"), ("tokenizer_dir", "use_tokenizer")):
        if name in configs.given and not getattr(what, needed):
            raise ValueError(f"--{name.replace('_', '-')} needs --{needed.replace('_', '-')}")


def find_tokenizer(what: DiffusionRun, data: PretrainData, configs: StageConfigs):
    """The tokenizer in --tokenizer-dir, or the run's own, which a new run makes from --data."""
    own: Path = configs.run.path("_tokenizer")
    if what.use_tokenizer and not what.retrain_tokenizer:
        return load_tokenizer(data.tokenizer_dir, what.mask_token)
    continuing = configs.run.resume != "never" and configs.run.state_path.exists()
    if not what.train or continuing:
        return load_tokenizer(own, what.mask_token)
    if data.data is None:
        raise ValueError("--data is missing: expected a .jsonl or .txt corpus")
    texts = read_documents(data.data, data.jsonl_field, data.separator)
    tokenizer = (
        train_bpe(texts, what.target_vocab_size, what.mask_token)
        if what.retrain_tokenizer
        else train_characters(texts, what.mask_token)
    )
    save_tokenizer(tokenizer, own)
    print(f"saved {own} ({len(tokenizer)} entries); give it to other commands with --tokenizer-dir")
    return tokenizer


if __name__ == "__main__":
    run(main)
