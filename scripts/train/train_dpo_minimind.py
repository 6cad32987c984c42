"""Tune the autoregressive model on preferences: of two replies to one prompt it learns to find the chosen one likelier.

    uv run python -m scripts.train.train_dpo_minimind --data dataset/dpo.jsonl \\
        --load-from weights/minimind_sft_state_dict.pt --run-name minimind_dpo

DPO with exact log-likelihoods, summed over a reply and its EOS. How likely either reply has become is measured against
a frozen reference, by default the weights that tuning starts from. A row is a pair: --batch-size counts pairs.
Validation is the preference loss alone; ln 2 = 0.6931 is no preference.
"""

from dataset.preferences import PreferenceData
from model.preference import ExactDPO
from scripts.engine.cli import parse_args, run
from scripts.engine.training.config import GROUPS, StageConfigs
from scripts.engine.training.preferences import DEFAULTS, tune
from scripts.engine.training.stage import require_start


def main(argv: list[str] | None = None) -> None:
    data, objective, *configs = parse_args(
        __doc__,
        PreferenceData,
        ExactDPO,
        *GROUPS,
        argv=argv,
        run_name="minimind_dpo",
        **DEFAULTS,
    )
    configs = StageConfigs(*configs, argv)
    require_start(configs, "weights/minimind_sft_state_dict.pt")
    tune("scripts.train.train_dpo_minimind", configs, objective, data)


if __name__ == "__main__":
    run(main)
