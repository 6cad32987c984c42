"""Pretrain the autoregressive model: next-token prediction on packed text.

    uv run python -m scripts.train.train_pretrain --data dataset/pretrain_hq.jsonl --run-name minimind_pretrain

Writes weights/<run>.pt (everything needed to continue), <run>_state_dict.pt (for the stages that follow),
<run>_best.pt, <run>_log.jsonl and <run>_loss.png.
"""

from dataset.pretrain import PretrainData, PretrainDataset
from dataset.tokenizer import load_tokenizer
from model.objective import NextToken
from scripts.engine.cli import parse_args, run
from scripts.engine.training.config import GROUPS, StageConfigs
from scripts.engine.training.stage import Stage


def main(argv: list[str] | None = None) -> None:
    data, *configs = parse_args(
        __doc__,
        PretrainData,
        *GROUPS,
        argv=argv,
        run_name="minimind_pretrain",
    )
    configs = StageConfigs(*configs, argv)
    configs.given.refuse_without({"character mode": False})
    tokenizer = load_tokenizer(data.tokenizer_dir)
    stage = Stage("scripts.train.train_pretrain", configs, NextToken(), data, tokenizer)
    with stage.opened():
        stage.train(stage.build(PretrainDataset))


if __name__ == "__main__":
    run(main)
