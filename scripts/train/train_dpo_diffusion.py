"""Tune the diffusion model on preferences: of two replies to one prompt it learns to find the chosen one likelier.

    uv run python -m scripts.train.train_dpo_diffusion --data dataset/dpo.jsonl \\
        --load-from weights/diffusion_sft.pt --run-name diffusion_dpo

DPO with the lower bounds of LLaDA 1.5 (VRPO), for block checkpoints block by block (LLaDA 2.0). How likely either reply
has become is measured against a frozen reference, by default the weights that tuning starts from. A row is a pair:
--batch-size counts pairs. Validation is the preference loss alone; ln 2 = 0.6931 is no preference.
"""

from dataset.preferences import PreferenceData
from model.preference import DiffusionDPO
from scripts.engine.cli import parse_args, run
from scripts.engine.training.config import GROUPS, StageConfigs
from scripts.engine.training.preferences import DEFAULTS, tune
from scripts.engine.training.stage import require_start


def main(argv: list[str] | None = None) -> None:
    data, objective, *configs = parse_args(
        __doc__,
        PreferenceData,
        DiffusionDPO,
        *GROUPS,
        argv=argv,
        run_name="diffusion_dpo",
        **DEFAULTS,
    )
    configs = StageConfigs(*configs, argv)
    require_start(configs, "weights/diffusion_sft_state_dict.pt")
    tune("scripts.train.train_dpo_diffusion", configs, objective, data)


if __name__ == "__main__":
    run(main)
