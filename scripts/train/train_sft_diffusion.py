"""Fine-tune the diffusion model on conversations (LLaDA Eq. 5): it learns to fill in a reply, given all before it.

    uv run python -m scripts.train.train_sft_diffusion --data dataset/sft_mini_512.jsonl \\
        --load-from weights/diffusion_from_ar_eq3_state_dict.pt --run-name diffusion_sft

A conversation of several turns becomes one row for each reply, whose prompt is never masked nor scored. Behind the
reply stand its EOS and a random number of further ones: the empty end of the canvas on which the decoder writes.
"""

from dataclasses import replace

from dataset.sft import DiffusionSFTData, SFTDataset
from dataset.tokenizer import load_tokenizer
from model.config import ModelConfig
from model.objective import MaskedDiffusion
from scripts.engine.cli import parse_args, run
from scripts.engine.optim import SFTOptimConfig
from scripts.engine.run import RunConfig
from scripts.engine.runtime import RuntimeConfig
from scripts.engine.stage import StageConfigs, require_start, train_stage
from scripts.engine.trainer import TrainerConfig


def main(argv: list[str] | None = None) -> None:
    data, objective, *configs = parse_args(
        __doc__,
        DiffusionSFTData,
        MaskedDiffusion,
        ModelConfig,
        SFTOptimConfig,
        TrainerConfig,
        RunConfig,
        RuntimeConfig,
        argv=argv,
        run_name="diffusion_sft",
        learning_rate=3e-4,
        warmup_steps=100,
        variable_length_prob=0.0,
    )
    configs = StageConfigs(*configs)
    require_start(configs, "weights/diffusion_from_ar_eq3_state_dict.pt")
    if objective.variable_length_prob:
        raise ValueError("--variable-length-prob would cut replies off their prompts; leave it out in fine-tuning")
    if objective.mask_schedule == "random":
        raise ValueError("--mask-schedule random is fixed_count where every row counts the same; leave it out")
    tokenizer = load_tokenizer(data.tokenizer_dir)
    train_stage(
        "scripts.train.train_sft_diffusion",
        configs,
        replace(objective, sequence_mean=True),
        data,
        tokenizer,
        build=lambda: SFTDataset(data, tokenizer, all_replies=False, rows_per_step=configs.trainer.rows_per_step),
    )


if __name__ == "__main__":
    run(main)
