"""The benchmark of decoding: its baseline, and what its rows say of one another."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dataset.tokenizer import fingerprint
from model.checkpoint import save_checkpoint
from model.decoding.canvas import Canvas
from model.decoding.decode import decode
from model.decoding.remasking import POLICIES
from scripts.engine.bench import decoding as benchmark
from scripts.engine.bench.decoding import (
    DENOISING,
    NAIVE,
    NAIVE_STEPS,
    DecodingBenchmarkConfig,
    measure_decoding,
    naive,
)
from scripts.engine.runtime import RuntimeConfig
from scripts.engine.statistics import is_correct
from tests.conftest import TINY
from tests.scripts.models import untrained

RUNTIME = RuntimeConfig(device="cpu", dtype="float32")
SMALL = {"decoding_questions": 3, "decoding_batch_sizes": (1, 2), "decoding_new_tokens": 5, "decoding_rounds": 1}


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch):
    """Of garbage between the cases: it takes longer than they do."""
    monkeypatch.setattr("scripts.engine.bench.timing.gc.collect", lambda: None)


def by_sampler(rows):
    """{(kind, policy): [row of each batch size]}"""
    samplers = {}
    for row in rows:
        samplers.setdefault((row["kind"], row["policy"]), []).append(row)
    return samplers


@pytest.fixture
def checkpoints(tmp_path, tokenizer, tokenizer_dir):
    """Flags for a checkpoint of each kind."""
    flags = {"decoding_tokenizer_dir": Path(tokenizer_dir)}
    for name, kind in (("ar", "causal"), ("diffusion", "full"), ("blocks", "block 4")):
        model = untrained(tokenizer, kind)
        flags[f"decoding_{name}"] = tmp_path / f"{name}.pt"
        save_checkpoint(tmp_path / f"{name}.pt", model.config, model.state_dict(), fingerprint(tokenizer), "sft")
    return flags


@pytest.mark.parametrize("new_tokens, steps", [(6, 3), (6, 6), (5, 64)])
def test_full_passes_write_what_the_sampler_does_one_row_or_many(new_tokens, steps, tiny_model):
    """The most confident of a whole canvas, the same number in each step; idle steps write nothing."""
    model = tiny_model(attention="full")
    config = replace(DENOISING, gen_remasking="low_confidence", gen_steps=steps, gen_block_size=0)
    for prompts in ([[1, 7, 8]], [[1, 7, 8], [1], [1, 9, 10, 11]]):
        canvas = Canvas.continuing(prompts, new_tokens, model.config)
        expected, decoded = decode(model, canvas, config, range(len(prompts))), naive(model, canvas, steps)
        assert decoded.new == expected.new and decoded.ended == expected.ended
        assert decoded.row_passes == [steps] * len(prompts)


def test_random_weights_have_a_fixed_number_of_passes_and_no_quality(monkeypatch):
    monkeypatch.setattr(benchmark, "PROMPT_TOKENS", 4)
    monkeypatch.setattr(benchmark, "BLOCK_SIZE", 2)
    rows = measure_decoding(DecodingBenchmarkConfig(**SMALL), TINY, RUNTIME)
    # Four given tokens, then 2 + 2 + 1 in blocks, whose steps are 1 each; without blocks 2 tokens per step.
    passes = {"AR": 5, "blocks": 3, "diffusion": 3}
    for row in rows:
        assert row["tokens"] == 5 and row["right"] is None
        assert row["passes"] == (NAIVE_STEPS if row["policy"] == NAIVE else passes[row["kind"]])
    policies = {policy.split(",")[0] for kind, policy in by_sampler(rows) if kind == "blocks"}
    assert policies == POLICIES.keys() - {"threshold", "factor", "hybrid", "entropy_bound"}  # they stop when sure


def test_a_joint_checkpoint_is_measured_as_ar_in_blocks_and_by_self_speculation(checkpoints, tmp_path, tokenizer):
    model = untrained(tokenizer, "joint 4")
    save_checkpoint(tmp_path / "j.pt", model.config, model.state_dict(), fingerprint(tokenizer), "sft")
    flags = SMALL | checkpoints | {"decoding_policies": ("random", "self_speculative")}
    both = {"decoding_ar": tmp_path / "j.pt", "decoding_blocks": tmp_path / "j.pt"}
    rows = by_sampler(measure_decoding(DecodingBenchmarkConfig(**flags | both), TINY, RUNTIME))
    assert [policy for kind, policy in rows if kind == "blocks"] == ["random, 3 steps", "self_speculative"]
    for plain, drafted in zip(rows["AR", "greedy, KV cache"], rows["blocks", "self_speculative"], strict=True):
        assert drafted["tokens"] == plain["tokens"] and drafted["passes"] <= plain["passes"]


def test_every_sampler_answers_the_same_questions_as_it_would_alone(checkpoints, monkeypatch):
    """Greedy answers do not depend on the batch; ratios are to the fastest of both precisions at that batch size."""
    wanted, prompts, answer = [], [], benchmark.answer
    monkeypatch.setattr(benchmark, "is_correct", lambda *args: wanted.append(args[1:]) or is_correct(*args))
    monkeypatch.setattr(
        benchmark, "answer", lambda batches, *args: prompts.append(sum(batches, [])) or answer(batches, *args)
    )
    flags = SMALL | checkpoints | {"decoding_policies": ("threshold", "left_to_right"), "decoding_thresholds": (0.5,)}
    rows = measure_decoding(DecodingBenchmarkConfig(**flags), TINY, RUNTIME)
    samplers = by_sampler(rows)
    assert len(samplers) == 1 + 3 + 2 and len(rows) == 2 * len(samplers)
    assert all(these == prompts[0] for these in prompts) and wanted == wanted[:3] * len(rows)
    for alone, together in samplers.values():
        assert all(alone[name] == together[name] for name in ("right", "passes", "tokens"))
        assert 0 <= alone["right, low"] <= alone["right"] <= alone["right, high"] <= 1
    for batch_size in (1, 2):
        some = [row for row in rows if row["batch"] == batch_size]
        ar = next(row for row in some if row["kind"] == "AR")
        full = next(row for row in some if row["policy"] == NAIVE)
        for row in some:
            seconds = row["ms per batch"] / 1000 * (3 if batch_size == 1 else 2)
            assert row["tokens/s"] == pytest.approx(3 * row["tokens"] / seconds)
            assert row["of AR"] == pytest.approx(row["tokens/s"] / ar["tokens/s"])
            assert row["of 64 passes"] == pytest.approx(row["tokens/s"] / full["tokens/s"])


def test_ratios_are_to_the_fastest_precision():
    config = DecodingBenchmarkConfig(**SMALL | {"decoding_dtypes": ("float32", "bfloat16"), "decoding_policies": ()})
    rows = [row for row in measure_decoding(config, TINY, RUNTIME) if row["kind"] == "AR" and row["batch"] == 1]
    assert {row["precision"] for row in rows} == {"float32", "bfloat16"}
    assert sorted(row["of AR"] for row in rows)[1] == 1 > sorted(row["of AR"] for row in rows)[0]


def test_a_checkpoint_under_the_flag_of_another_kind_is_refused(checkpoints):
    swapped = checkpoints | {"decoding_blocks": checkpoints["decoding_diffusion"]}
    with pytest.raises(ValueError, match="given as --decoding-blocks, has full attention, not block"):
        measure_decoding(DecodingBenchmarkConfig(**SMALL, **swapped), TINY, RUNTIME)


def test_random_prompts_hold_no_special_token():
    ids = torch.tensor(benchmark.random(DecodingBenchmarkConfig(), TINY, RUNTIME).prompts)
    special = [TINY.pad_token_id, TINY.bos_token_id, TINY.eos_token_id, TINY.mask_token_id]
    assert not torch.isin(ids, torch.tensor(special)).any() and len(ids.unique()) > 10
