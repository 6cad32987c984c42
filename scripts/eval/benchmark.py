"""Speed and memory of this machine and this code, in one run, as tables and as JSON.

    uv run python -m scripts.eval.benchmark --data dataset/pretrain_hq.jsonl --json weights/benchmark.json
    uv run python -m scripts.eval.benchmark --parts peak,training --hidden-size 768 --num-hidden-layers 12

peak      operations per second of matrix products, float32 and bfloat16
training  whole steps beside a plain float32 implementation: tokens/s, share of the peak, where the time goes, memory
ablation  the same with one optimisation at a time left out
scaling   how a step's cost grows with length, batch and parameters
decoding  tokens/s, forward passes and latency of every sampler, beside a KV-cached autoregressive model
data      speed and memory of tokenising growing corpora, and of reading them shuffled

The cases take turns, round by round, so that other work on the machine slows all alike; the tables hold medians, and as
spread half the interquartile range as a share of them. Cases that give freed memory back to the system run after the
others, which they would slow. On a GPU the parts of a step are waited for one by one, so a step is somewhat slower here
than in training.

mfu: operations that a step needs per second, as a share of the best product in that precision. Needed are no padding,
no pair of positions that a mask hides, nothing twice, and two forward passes for the backward pass. Peak memory is that
of an eager step, also if the timed one is compiled. Decoding is greedy, and its ratios are to the fastest of their kind
at that batch size; of random weights only the cost of a pass means anything, so policies that stop early are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from dataset.pretrain import PretrainData
from dataset.tokenizer import load_tokenizer
from model.config import ModelConfig
from scripts.engine.bench.data import DataBenchmarkConfig, measure_data
from scripts.engine.bench.decoding import DecodingBenchmarkConfig, measure_decoding
from scripts.engine.bench.flops import best, measure_peak
from scripts.engine.bench.scaling import ScalingBenchmarkConfig, measure_scaling
from scripts.engine.bench.timing import Row, markdown
from scripts.engine.bench.training import Setting, TrainingBenchmarkConfig, measure_ablation, measure_training
from scripts.engine.cli import parse_args, run
from scripts.engine.files import require_output, sha256_of, write_json
from scripts.engine.loaded import circumstances
from scripts.engine.runtime import RuntimeConfig, command_line
from scripts.engine.training.compiling import require_compiler

PARTS = ("peak", "training", "ablation", "scaling", "decoding", "data")
COMPARED = "a benchmark, which compares rows with packing and without"
NEEDS = {
    ScalingBenchmarkConfig: "with --parts scaling",
    DecodingBenchmarkConfig: "with --parts decoding",
    DataBenchmarkConfig: "with --parts data",
    "packing": f"without {COMPARED}",
}


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure."""

    parts: Annotated[tuple[Literal[*PARTS], ...], "what to measure; training measures the peak, too"] = (
        "peak",
        "training",
        "decoding",
    )
    json: Annotated[Path | None, "also write the results to this file, after every part"] = None


def main(argv: list[str] | None = None) -> None:
    groups = TrainingBenchmarkConfig, ScalingBenchmarkConfig, DecodingBenchmarkConfig, DataBenchmarkConfig
    config, shape, corpus, *groups, runtime, given = parse_args(
        __doc__, BenchmarkConfig, ModelConfig, PretrainData, *groups, RuntimeConfig, argv=argv, needs=NEEDS
    )
    steps, growth, decoders, pipeline = groups
    given.refuse_without({"character mode": False, COMPARED: True})
    if "training" in config.parts and runtime.torch_dtype == torch.float16:
        raise ValueError("--parts training compares with the peak of float32 or bfloat16; choose one with --dtype")
    if {"training", "ablation"} & set(config.parts) and steps.compile:
        require_compiler("give --no-compile")
    checkpoints = decoders.checkpoints.values()
    require_output(config.json, "--json", corpus.data, *checkpoints, corpus.tokenizer_dir)

    setting, results = Setting(shape, corpus, steps, runtime), {}
    measures: dict[str, Callable[[], list[Row]]] = {
        "peak": lambda: measure_peak(runtime.torch_device),
        "training": lambda: measure_training(setting, best(results["peak"])),
        "ablation": lambda: measure_ablation(setting),
        "scaling": lambda: measure_scaling(setting, growth),
        "decoding": lambda: measure_decoding(decoders, shape, runtime),
        "data": lambda: measure_data(pipeline, corpus.tokenizer_dir),
    }
    command, tokenizer = command_line(__spec__.name, argv), load_tokenizer(corpus.tokenizer_dir)
    about = circumstances(command, runtime, tokenizer, corpus.files, [], shape, corpus, *groups)
    about["checkpoints"] = [{"checkpoint": str(p), "sha256": sha256_of(p)} for p in checkpoints]
    print(f"{about['device']}, {about['processor']}, torch {about['torch']}, commit {about['commit']}", flush=True)
    for part in PARTS:
        if part in config.parts or (part == "peak" and "training" in config.parts):
            results[part] = measures[part]()
            print(f"\n{part}\n{markdown(results[part])}", flush=True)
            if config.json:
                write_json(config.json, about | {"results": results})


if __name__ == "__main__":
    run(main)
