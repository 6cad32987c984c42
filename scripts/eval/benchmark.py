"""Speed and memory of this machine and this code, in one run, as tables and as JSON.

    uv run python -m scripts.eval.benchmark --data dataset/pretrain_hq.jsonl --json weights/benchmark.json
    uv run python -m scripts.eval.benchmark --parts peak,training --hidden-size 768 --num-hidden-layers 12

peak      operations per second of matrix products, float32 and bfloat16
training  whole steps beside a plain float32 implementation: tokens/s, share of the peak, where the time goes, memory
ablation  the same with one optimisation at a time left out
scaling   how a step's cost grows with length, batch and parameters
decoding  tokens/s, forward passes and latency of every sampler, beside a KV-cached autoregressive model
data      speed and memory of tokenising growing corpora, and of reading them shuffled

In training, ablation and decoding the cases take turns, round by round, so that other work on the machine slows all
alike; the tables hold medians. Cases that give freed memory back to the system run after the others, which they would
slow. On a GPU the parts of a step (forward, backward, ...) are waited for one by one, so a step is somewhat slower here
than in training.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from dataset.pretrain import PretrainData
from dataset.tokenizer import load_tokenizer
from model.config import ModelConfig
from scripts.engine.bench import data, decoding, flops, scaling, training
from scripts.engine.bench.data import DataBenchmarkConfig
from scripts.engine.bench.decoding import DecodingBenchmarkConfig
from scripts.engine.bench.scaling import ScalingBenchmarkConfig
from scripts.engine.bench.training import Setting, TrainingBenchmarkConfig
from scripts.engine.cli import parse_args, run
from scripts.engine.files import require_output, sha256_of, write_json
from scripts.engine.loaded import circumstances
from scripts.engine.runtime import RuntimeConfig, command_line
from scripts.engine.training.compiling import require_compiler

GROUPS = (
    ModelConfig,
    TrainingBenchmarkConfig,
    ScalingBenchmarkConfig,
    DecodingBenchmarkConfig,
    DataBenchmarkConfig,
    PretrainData,
)
MODULES = {
    "peak": flops,
    "training": training,
    "ablation": training,
    "scaling": scaling,
    "decoding": decoding,
    "data": data,
}
PARTS = tuple(MODULES)
COMPARED = "a benchmark, which compares rows with packing and without"


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure."""

    parts: Annotated[tuple[Literal[*PARTS], ...], "what to measure"] = ("peak", "training", "decoding")
    json: Annotated[Path | None, "also write the results to this file, after every part"] = None


NEEDS = {
    ScalingBenchmarkConfig: "with --parts scaling",
    DecodingBenchmarkConfig: "with --parts decoding",
    DataBenchmarkConfig: "with --parts data",
    "packing": f"without {COMPARED}",
}


def main(argv: list[str] | None = None) -> None:
    groups = BenchmarkConfig, *GROUPS, RuntimeConfig
    config, *groups, runtime, given = parse_args(__doc__, *groups, argv=argv, needs=NEEDS)
    shape, step_config, scaling_config, decoding_config, data_config, corpus = groups
    given.refuse_without({"character mode": False, COMPARED: True})
    if "training" in config.parts and runtime.torch_dtype == torch.float16:
        raise ValueError("--parts training compares with the peak of float32 or bfloat16; choose one with --dtype")
    if {"training", "ablation"} & set(config.parts) and step_config.compile:
        require_compiler("give --no-compile")
    checkpoints = decoding_config.checkpoints.values()
    require_output(
        config.json, "--json", corpus.data, *checkpoints, corpus.tokenizer_dir, data_config.data_tokenizer_dir
    )
    setting, results = Setting(shape, corpus, step_config, runtime), {}

    def peaks() -> list[dict[str, Any]]:
        if "peak" not in results:
            results["peak"] = flops.measure_peak(runtime.torch_device)
        return results["peak"]

    measures = {
        "peak": peaks,
        "training": lambda: training.measure_training(setting, flops.best(peaks())),
        "ablation": lambda: training.measure_ablation(setting),
        "scaling": lambda: scaling.measure_scaling(setting, scaling_config),
        "decoding": lambda: decoding.measure(decoding_config, shape, runtime),
        "data": lambda: data.measure(data_config),
    }
    command, tokenizer = command_line(__spec__.name, argv), load_tokenizer(corpus.tokenizer_dir)
    about = circumstances(command, runtime, tokenizer, corpus.source, [], *groups)
    about["checkpoints"] = [{"checkpoint": str(p), "sha256": sha256_of(p)} for p in checkpoints]
    print(f"{about['device']}, {about['processor']}, torch {about['torch']}, commit {about['commit']}", flush=True)
    for part in sorted(config.parts, key=PARTS.index):
        results[part] = measures[part]()
        print(f"\n{part}\n{MODULES[part].table(results[part])}", flush=True)
        if config.json:
            write_json(config.json, about | {"results": results})


if __name__ == "__main__":
    run(main)
