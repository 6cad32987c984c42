"""A benchmark must measure what it says: the plain step computes our loss, and the operations are counted right."""

import json
import platform
from dataclasses import replace
from operator import mul

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dataset.pretrain import PretrainData
from model.forward_process import StepNoise
from model.masked_diffusion import MaskedDiffusion
from model.objective import NextToken
from model.transformer import Transformer
from scripts.engine.bench import flops, training
from scripts.engine.bench.memory import in_own_process, most_resident
from scripts.engine.bench.scaling import shape_of
from scripts.engine.bench.timing import Timing, markdown, take_turns
from scripts.engine.bench.training import (
    NEXT_TOKEN_WEIGHT,
    OURS,
    PARTS,
    PLAIN,
    Setting,
    TrainingBenchmarkConfig,
    cases_of,
    objective_of,
    plain_nats,
)
from scripts.engine.runtime import RuntimeConfig, keep_freed_memory
from scripts.eval import benchmark
from tests.conftest import TINY

KINDS = {
    "ar": NextToken(),
    "full": MaskedDiffusion(variable_length_prob=0.0, block_size=0),
    "block": MaskedDiffusion(variable_length_prob=0.0, block_size=3),
    "joint": MaskedDiffusion(variable_length_prob=0.0, block_size=3, next_token_weight=NEXT_TOKEN_WEIGHT),
}


def prepared(kind, ids, documents=None):
    batch = {"input_ids": ids, "loss_mask": torch.ones_like(ids, dtype=torch.bool)}
    if documents is not None:
        batch |= {"document_ids": documents, "loss_mask": documents >= 0}
    return KINDS[kind].prepare(batch, TINY, StepNoise(0, 1, len(ids), progress=0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_step_computes_the_loss_and_the_gradient_of_the_fast_one(kind, tiny_model):
    model = tiny_model()
    documents = torch.tensor([[0] * 4 + [1] * 6, [0] * 7 + [-1] * 3])
    batch = prepared(kind, torch.randint(4, 24, (2, 10)), documents)
    plain, ours = plain_nats(model, batch), KINDS[kind].loss(model, batch).nats.sum()
    torch.testing.assert_close(plain, ours)
    parameters = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(x, parameters) for x in (plain, ours)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_operations_are_those_that_a_counter_sees_where_nothing_is_masked_or_left_out(kind, tiny_model):
    """A counter sees what is computed: all pairs of positions, and the last layer's queries everywhere. Where every
    pair counts and every position is scored, the two agree; else ours is the smaller one."""
    model = tiny_model()
    if kind == "full":
        batch = prepared(kind, torch.randint(4, 24, (3, 8)))
        everywhere = torch.arange(24)
        batch |= {"positions": everywhere, "targets": batch["input_ids"].flatten(), "weight": torch.ones(24)}
    else:
        batch = prepared(kind, torch.randint(4, 24, (3, 8)))
    # Of the CPU's other kernels the counter knows nothing.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        KINDS[kind].loss(model, batch).nats.sum().backward()
    needed, counted = flops.step_flops(model.config, batch), counter.get_total_flops()
    if kind == "full":
        assert needed == counted
    else:
        assert 0.5 * counted < needed < counted


@pytest.mark.parametrize("kind", KINDS)
def test_operations_are_of_the_positions_that_the_network_is_asked_for(kind, tiny_model):
    model, asked = tiny_model(), []
    model.register_forward_pre_hook(lambda _, ids, given: asked.append((*ids, given["select"])), with_kwargs=True)
    batch = prepared(kind, torch.randint(4, 24, (3, 8)))
    KINDS[kind].loss(model, batch)
    ((ids, select),) = asked
    rows, columns = flops.scored_places(batch)
    assert torch.equal(rows * ids.shape[1] + columns, select)
    assert flops.visible_keys(batch).shape == ids.shape


def test_padding_and_unseen_positions_are_no_work(tiny_model):
    ids, alone = torch.randint(4, 24, (1, 6)), torch.zeros(1, 6, dtype=torch.long)
    padded = torch.nn.functional.pad(ids, (0, 4))
    for kind in KINDS:
        documents = torch.nn.functional.pad(alone, (0, 4), value=-1)
        of_padded, of_alone = prepared(kind, padded, documents), prepared(kind, ids, alone)
        of_padded["positions"] = of_alone["positions"]  # of the only row, so the same in either
        assert flops.step_flops(TINY, of_padded) == flops.step_flops(TINY, of_alone)
        assert objective_of(kind, 3) == KINDS[kind]


def test_cases_take_turns_and_warming_up_is_not_timed():
    calls = []
    cases = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    timings = take_turns(cases, 2, 1, torch.device("cpu"))
    assert calls == list("ab" * 3) and all(len(timing.seconds) == 2 for timing in timings.values())
    assert (timings["a"].result, timings["b"].result) == (5, 6)
    assert Timing([1.0, 2.0, 3.0, 4.0, 9.0]).median == 3 and Timing([1.0, 2.0, 3.0, 4.0, 9.0]).spread == 1 / 3


def test_rows_with_the_same_entries_are_in_one_table():
    rows = [{"name": "a", "value": 1234.5}, {"name": "b", "value": 0.012345}, {"name": "c", "none": None}]
    tables = markdown(rows).split("\n\n")
    assert tables[0].splitlines() == ["| name | value |", "| --- | --- |", "| a | 1,234 |", "| b | 0.0123 |"]
    assert tables[1].splitlines()[0::2] == ["| name | none |", "| c | - |"]


def test_a_peak_is_what_the_work_takes_and_not_what_another_process_had():
    ballast = torch.ones(80_000_000)  # of this process
    nothing, some = (in_own_process(mul, b"x", size)[1] for size in (1, 120_000_000))
    assert most_resident() > ballast.nbytes
    for less, more in zip(nothing, some, strict=True):
        assert more is None or 0.9 * 120e6 < more - less < 1.5 * 120e6


def test_the_allocator_keeps_memory_if_it_is_glibcs():
    glibc = platform.libc_ver()[0] == "glibc"
    assert keep_freed_memory() == keep_freed_memory(False) == glibc


@pytest.mark.parametrize("millions", [1, 10, 300])
def test_shapes_of_a_size_are_about_that_size(millions):
    shape = shape_of(millions, replace(TINY, vocab_size=6400))
    with torch.device("meta"):
        assert 0.7 < Transformer(shape).num_parameters() / 1e6 / millions < 1.4


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(f'{{"text": "document {i} {"word " * (i % 9)}"}}\n' for i in range(60)))
    return path


@pytest.fixture
def measured(corpus, tmp_path, monkeypatch, capsys):
    """measured(*flags) -> (the JSON, the output) of a run of the command on a tiny shape."""
    monkeypatch.setattr(flops, "SHAPES", {"cpu": ((64, 64, 64),)})
    monkeypatch.setattr(training, "in_own_process", lambda work, *args: (work(*args), None))
    shape = "--hidden-size 32 --num-hidden-layers 2 --num-attention-heads 4 --max-seq-len 32 --batch-size 4"
    argv = [*shape.split(), "--rounds", "1", "--no-compile", "--data", str(corpus), "--cache-dir", str(tmp_path)]

    def measure(*flags):
        out = tmp_path / "new" / "benchmark.json"
        benchmark.main([*argv, *flags, "--json", str(out)])
        return json.loads(out.read_text()), capsys.readouterr().out

    return measure


def test_the_command_measures_and_writes_what_it_says(measured):
    points = ["--scaling-lengths", "16", "--scaling-batches", "2", "--scaling-millions", "0.9"]
    kinds = ("ar", "joint")
    written, output = measured("--parts", "scaling,training", "--kinds", ",".join(kinds), *points)
    assert set(written["results"]) == {"peak", "training", "scaling"} and written["commit"]
    rows = written["results"]["training"]
    assert [(row["kind"], row["case"]) for row in rows] == [
        (kind, case) for kind in kinds for case in ("ours", "plain", "plain, usual memory")
    ]
    for row in rows:
        assert sum(row[part] for part in PARTS) == pytest.approx(1) and row["mfu"] > 0
        assert row["real tokens/s"] <= row["padded tokens/s"]
    ours, plain = rows[:2]
    assert ours["real tokens/s"] > 0.95 * ours["padded tokens/s"]  # packed
    assert plain["real tokens/s"] < 0.8 * plain["padded tokens/s"]  # padded
    assert [row["along"] for row in written["results"]["scaling"]] == ["length", "batch", "parameters"] * len(kinds)
    assert output.count("| kind | case |") == 1 and output.count("| kind | along |") == 1


def test_the_ablation_leaves_out_one_optimisation_at_a_time(measured):
    written, output = measured("--parts", "ablation", "--kinds", "ar")
    names = ("bfloat16", "packing", "scored logits", "explicit attention", "fused optimizer", "kept memory")
    rows = written["results"]["ablation"]
    assert [row["case"] for row in rows] == ["ours", *(f"without {name}" for name in names)]
    assert rows[0]["worth"] == 1 and "| worth |" in output


def test_what_cannot_be_measured_is_refused(refused):
    refused(benchmark, ["--no-packing"], "--packing")
    refused(benchmark, ["--data-megabytes", "4,4", "--parts", "data"], "--data-megabytes")


def test_other_ways_of_making_a_step_move_the_weights_the_same_way(corpus, tmp_path):
    """The plain one in float32, and ours; the same rows, packed, and the same noise."""
    bench = TrainingBenchmarkConfig(batch_size=4, rounds=1, compile=False)
    data = PretrainData(data=corpus, max_seq_len=32, cache_dir=tmp_path / "cache")
    setting = Setting(TINY, data, bench, RuntimeConfig(device="cpu", dtype="bfloat16"))
    eager = replace(OURS, compiled=False)
    variants = {"ours": eager, "plain": replace(PLAIN, packing=True), "dense": replace(eager, scored_logits=False)}

    def weights(case):
        return torch.cat([parameter.detach().flatten() for parameter in case.network.parameters()])

    start = weights(cases_of(setting, "full", {"": eager})[""])
    moves = {}
    for name, case in cases_of(setting, "full", variants).items():
        case.turn()
        moves[name] = weights(case) - start
    assert moves["ours"].norm() > 0
    for name in ("plain", "dense"):  # Adam's first step is the gradient's sign: what is near zero may go either way
        assert torch.nn.functional.cosine_similarity(moves["ours"], moves[name], dim=0) > 0.8
