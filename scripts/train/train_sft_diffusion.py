"""Fine-tune the diffusion model on conversations (LLaDA Eq. 5): it learns to fill in a reply, given all before it.

    uv run python -m scripts.train.train_sft_diffusion --data dataset/sft_mini_512.jsonl \\
        --load-from weights/diffusion_from_ar_eq3_state_dict.pt --run-name diffusion_sft

A conversation of several turns becomes one row for each reply, whose prompt is never masked nor scored. After the
reply come its EOS and a random number of further ones: the empty end of the canvas on which the decoder writes.

From weights of block diffusion, or with --block-size, it learns block by block (LLaDA 2.0, section 5.1), and the EOS
fill the reply's last block. Every block has a mask rate of its own, by whose inverse its tokens weigh, and every reply
counts the same. The code released with LLaDA 2.0 differs: one rate for a row, and the plain mean over masked tokens.
"""

from dataclasses import replace

from dataset.sft import OPEN_END, DiffusionSFTData, SFTDataset
from dataset.tokenizer import load_tokenizer
from model.forward_process import EPS_IN_BAND
from model.masked_diffusion import MaskedDiffusion
from scripts.engine.cli import parse_args, run
from scripts.engine.training.config import SFT_GROUPS, StageConfigs
from scripts.engine.training.stage import Stage, require_start


def main(argv: list[str] | None = None) -> None:
    data, objective, *configs = parse_args(
        __doc__,
        DiffusionSFTData,
        MaskedDiffusion,
        *SFT_GROUPS,
        argv=argv,
        run_name="diffusion_sft",
        learning_rate=3e-4,
        warmup_steps=100,
        variable_length_prob=0.0,
        needs={"lr_stable_ratio": "without --final-decay-ratio"},
    )
    configs = StageConfigs(*configs, argv)
    configs.given.refuse_without({EPS_IN_BAND: objective.eps_has_effect})
    require_start(configs, "weights/diffusion_from_ar_eq3_state_dict.pt")
    if objective.variable_length_prob:
        raise ValueError("--variable-length-prob would cut replies off their prompts; leave it out in fine-tuning")
    if objective.use_block_curriculum:
        raise ValueError("--use-block-curriculum belongs to pretraining; in fine-tuning give --block-size")
    if objective.mask_schedule == "random":
        raise ValueError("--mask-schedule random is fixed_count where every row counts the same; leave it out")
    tokenizer = load_tokenizer(data.tokenizer_dir)
    objective = replace(objective, sequence_mean=True)
    stage = Stage("scripts.train.train_sft_diffusion", configs, objective, data, tokenizer, chat=True)
    with stage.opened():
        block_size = stage.model.config.block_size
        fills_block = block_size > 0 and data.quantize_effective_length
        configs.given.refuse_without({"block diffusion": block_size > 0, OPEN_END: not fills_block})
        dataset = stage.build(
            SFTDataset,
            all_replies=False,
            rows_per_step=configs.trainer.rows_per_step,
            block_size=block_size if fills_block else 0,
        )
        stage.train(dataset)


if __name__ == "__main__":
    run(main)
