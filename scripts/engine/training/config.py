"""The groups of flags that every training stage has."""

import math
from dataclasses import dataclass
from typing import Annotated

import torch

from model.config import ModelConfig
from scripts.engine.cli import TypedFlags
from scripts.engine.runtime import RuntimeConfig, launched, num_processes
from scripts.engine.training.compiling import require_compiler
from scripts.engine.training.optim import OptimConfig, SFTOptimConfig
from scripts.engine.training.run import RunConfig


@dataclass(frozen=True)
class TrainerConfig:
    """Duration and batch."""

    batch_size: Annotated[int, "rows per forward pass, of all processes together", "at least 1"] = 96
    accumulation_steps: Annotated[int, "forward passes per optimizer step", "at least 1"] = 1
    epochs: Annotated[float | None, "passes over the training rows (none, and no --max-iters: 1)", "above 0"] = None
    max_iters: Annotated[
        int | None, "optimizer steps in all, also when resuming; instead of --epochs", "at least 1", "--max-steps"
    ] = None
    early_stop_patience: Annotated[int, "validations without improvement before stopping (0 = never)", "at least 0"] = 0
    early_stop_min_delta: Annotated[
        float,
        "decrease of the validation loss that counts as improvement, nats per token",
        "at least 0",
        "with --early-stop-patience",
    ] = 0.0
    compile: Annotated[bool, "compile the layers with torch.compile (needs a C++ compiler on a CPU)"] = False
    max_skipped_steps: Annotated[
        int,
        "stop after so many steps in a row whose loss or gradient was not finite; each of them is skipped (looked at "
        "with every step on a CPU, elsewhere with every log line)",
        "at least 1",
    ] = 8
    fsdp: Annotated[bool, "shard weights, gradients and optimizer over the processes of torchrun (FSDP2)"] = False

    def __post_init__(self):
        if self.batch_size % num_processes():
            raise ValueError(
                f"--batch-size {self.batch_size} does not divide among {num_processes()} processes; "
                "give a multiple of their number"
            )
        if self.fsdp and not launched():
            raise ValueError("--fsdp needs the processes that torchrun starts; start with it, or leave out --fsdp")
        if self.epochs is not None and self.max_iters is not None:
            raise ValueError("give --epochs or --max-iters, not both")
        if self.compile:
            require_compiler("leave it out")

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.accumulation_steps

    def total_steps(self, num_rows: int) -> int:
        return self.max_iters or max(1, math.ceil((self.epochs or 1) * num_rows / self.rows_per_step))


@dataclass(frozen=True)
class StageConfigs:
    """The groups of flags that every training stage has."""

    shape: ModelConfig
    optim: OptimConfig
    trainer: TrainerConfig
    run: RunConfig
    runtime: RuntimeConfig
    given: TypedFlags
    argv: list[str] | None  # what was typed, as `main` was given it

    def __post_init__(self):
        if self.trainer.fsdp and self.runtime.torch_dtype == torch.float16:
            raise ValueError(
                "--fsdp trains in bfloat16 or float32; choose one of them with --dtype, or leave out --fsdp"
            )


# The groups of a command line, in the order of StageConfigs: `parse_args(__doc__, PretrainData, *GROUPS, argv=argv)`.
GROUPS = ModelConfig, OptimConfig, TrainerConfig, RunConfig, RuntimeConfig
SFT_GROUPS = ModelConfig, SFTOptimConfig, TrainerConfig, RunConfig, RuntimeConfig
