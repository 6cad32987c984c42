"""Tune the diffusion model on preferences: of two replies to one prompt it learns to find the chosen one likelier.

    uv run python -m scripts.train.train_dpo_diffusion --data dataset/dpo.jsonl \\
        --load-from weights/diffusion_sft.pt --run-name diffusion_dpo

DPO with the lower bounds of LLaDA 1.5 (VRPO), for block checkpoints block by block (LLaDA 2.0). How likely either reply
has become is measured against a frozen reference, by default the weights that tuning starts from. A row is a pair:
--batch-size counts pairs. Validation is the preference loss alone; ln 2 = 0.6931 is no preference.
"""

from dataset.preferences import PreferenceData, PreferenceDataset
from dataset.tokenizer import load_tokenizer
from model.config import ModelConfig
from model.preference import DiffusionDPO
from scripts.engine.cli import parse_args, run
from scripts.engine.runtime import RuntimeConfig
from scripts.engine.training.optim import OptimConfig
from scripts.engine.training.reference import weights_digest, with_reference
from scripts.engine.training.run import RunConfig
from scripts.engine.training.stage import StageConfigs, require_start, train_stage
from scripts.engine.training.trainer_config import TrainerConfig


def main(argv: list[str] | None = None) -> None:
    data, objective, *configs = parse_args(
        __doc__,
        PreferenceData,
        DiffusionDPO,
        ModelConfig,
        OptimConfig,
        TrainerConfig,
        RunConfig,
        RuntimeConfig,
        argv=argv,
        run_name="diffusion_dpo",
        learning_rate=2e-5,
        lr_schedule="cosine",
        warmup_steps=10,
        batch_size=64,
        log_interval=10,
        eval_interval=20,
    )
    configs = StageConfigs(*configs, argv)
    require_start(configs, "weights/diffusion_sft_state_dict.pt")
    tokenizer = load_tokenizer(data.tokenizer_dir)
    objective = with_reference(objective, configs, tokenizer, data.max_seq_len)

    def build(config: ModelConfig) -> PreferenceDataset:
        dataset = PreferenceDataset(data, tokenizer, config.attention, config.block_size)
        dataset.meta["reference_sha256"] = weights_digest(objective.reference)
        return dataset

    train_stage("scripts.train.train_dpo_diffusion", configs, objective, data, tokenizer, build)


if __name__ == "__main__":
    run(main)
