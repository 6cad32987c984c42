"""Fine-tune the autoregressive model on conversations: it learns every reply and the EOS that ends it.

    uv run python -m scripts.train.train_sft_minimind --data dataset/sft_mini_512.jsonl \\
        --load-from weights/minimind_pretrain_state_dict.pt --run-name minimind_sft

All replies of a conversation are learnt in one row; prompts are never scored. Writes what pretraining writes.
"""

from dataset.sft import SFTData, SFTDataset
from dataset.tokenizer import load_tokenizer
from model.objective import NextToken
from scripts.engine.cli import parse_args, run
from scripts.engine.training.config import SFT_GROUPS, StageConfigs
from scripts.engine.training.stage import Stage, require_start


def main(argv: list[str] | None = None) -> None:
    data, *configs = parse_args(
        __doc__,
        SFTData,
        *SFT_GROUPS,
        argv=argv,
        run_name="minimind_sft",
        learning_rate=3e-4,
        warmup_steps=100,
        needs={"lr_stable_ratio": "without --final-decay-ratio"},
    )
    configs = StageConfigs(*configs, argv)
    require_start(configs, "weights/minimind_pretrain_state_dict.pt")
    tokenizer = load_tokenizer(data.tokenizer_dir)
    objective = NextToken(sequence_mean=True)
    stage = Stage("scripts.train.train_sft_minimind", configs, objective, data, tokenizer, chat=True)
    with stage.opened():
        stage.train(stage.build(SFTDataset, all_replies=True, rows_per_step=configs.trainer.rows_per_step))


if __name__ == "__main__":
    run(main)
