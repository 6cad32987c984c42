"""What experiments promise of themselves: equal budgets, exact repetition, one result however often it is stopped."""

import hashlib
import importlib
import json
import math
import os
import re
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from matplotlib import image

from dataset.pretrain import DocumentTokeniser, PackedRows, PretrainData
from dataset.reading.documents import read_documents
from dataset.tokenizer import encode
from model.checkpoint import load_model
from scripts.engine.experiments import runs as experiment_runs
from scripts.engine.experiments.figures import draw
from scripts.engine.experiments.readings import READINGS
from scripts.engine.experiments.trainings import Comparison, summarise
from scripts.engine.files import read_log
from scripts.engine.training import trainer
from scripts.eval import experiments
from tests.scripts.conftest import run_command, write_jsonl

OUT = Path("weights/experiments")
ROWS, LENGTH = 4, 16  # of a step
SIZES = [
    *("--val-fraction", "0.3", "--heldout-tokens", "150", "--nmc", "2", "--dtype", "float32", "--device", "cpu"),
    *("--hidden-size", "16", "--num-hidden-layers", "1", "--num-attention-heads", "2", "--lr", "1e-2"),
    *("--batch-size", str(ROWS), "--max-seq-len", str(LENGTH)),
]
SCHEDULES = [
    *("--schedules-start-tokens", "64", "--schedules-tokens", "128", "--schedules-judge-tokens", "128"),
    *("--schedules-generations", "3"),
]
INITIALISATION = ["--initialisation-tokens", "128,260", "--initialisation-shares", "0,0.5"]
REPETITION = ["--repetition-tokens", "150", "--repetition-counts", "1,3", "--repetition-batch-size", "4"]


def in_process(launched):
    """A `launch` that runs commands here, which saves their imports, and lists them."""

    def launch(module, argv, output):
        launched.append(argv[argv.index("--run-name") + 1])
        importlib.import_module(module).main(list(argv))

    return launch


@pytest.fixture
def launched(monkeypatch):
    """Names of the runs launched."""
    names = []
    monkeypatch.setattr(experiment_runs, "launch", in_process(names))
    return names


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer_dir, texts):
    """(folder, argv, rows seen by each run) of the three experiments that train, two seeds each."""
    folder, seen = tmp_path_factory.mktemp("experiments"), {}
    write_jsonl(folder / "corpus.jsonl", texts)
    argv = ["--data", "corpus.jsonl", "--tokenizer-dir", str(tokenizer_dir), "--seeds", "1,2"]
    argv += [*SIZES, *SCHEDULES, *INITIALISATION, *REPETITION]
    micro_batches = trainer.Trainer._micro_batches

    def noted(self):
        order, rows = self.order, seen.setdefault(self.run.run_name, [])
        self.order = lambda *step: (rows.extend((chosen := order(*step)).tolist()), chosen)[1]
        return micro_batches(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(trainer.Trainer, "_micro_batches", noted)
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(experiment_runs, "launch", in_process([]))
        result = run_command(experiments, argv)
        assert result.code == 0, result.err
    return folder, argv, seen


@pytest.fixture
def finished(trained, monkeypatch):
    """The same; commands run in the folder."""
    monkeypatch.chdir(trained[0])
    return trained


def results(folder=OUT):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.*")) if path.suffix in (".json", ".png")}


def without_digests(found):
    """Less those of checkpoints: pickle writes equal strings otherwise where they are one object."""
    return {name: re.sub(rb'"sha256": "[0-9a-f]{64}"', b"", content) for name, content in found.items()}


def result_of(name):
    return json.loads((OUT / f"{name}.json").read_text(encoding="utf-8"))


def test_total_tokens_are_equal_whatever_share_of_them_is_autoregressive(finished):
    """Steps are equal exactly, and tokens by the runs' logs but for the padding of the corpus's last row."""
    runs = result_of("initialisation")["runs"]
    assert len(runs) == 8
    for budget in (128, 260):
        for seed in (1, 2):
            tokens = {r["ar_share"]: r["tokens"] for r in runs if (r["budget"], r["seed"]) == (budget, seed)}
            names = (
                [f"initialisation_{budget}_0_{seed}"],
                [f"initialisation_{budget}_0.5_{seed}{x}" for x in ("_ar", "")],
            )
            logs = [[read_log(OUT / "runs" / f"{name}_log.jsonl") for name in stages] for stages in names]
            for stages, share in zip(logs, (0, 0.5), strict=True):
                assert sum(log[0]["total_steps"] for log in stages) == budget // (ROWS * LENGTH)
                last = [[event for event in log if event["event"] == "train"][-1]["tokens"] for log in stages]
                assert tokens[share] == sum(last)
            assert abs(tokens[0] - tokens[0.5]) < LENGTH


def test_a_second_stage_does_not_see_the_rows_of_the_first_again_in_their_order(finished):
    _, _, seen = finished
    assert seen["initialisation_260_0.5_1_ar"] != seen["initialisation_260_0.5_1"]
    assert seen["initialisation_260_0_1"][:8] == seen["initialisation_260_0.5_1"]  # either's diffusion stage


def train_stream(path, tokenizer, folder):
    streams, _ = DocumentTokeniser(PretrainData(data=path, val_fraction=0.3), tokenizer).streams(folder)
    return streams["train"]


def test_every_repetition_sees_each_document_of_the_small_corpus_exactly_that_often(finished, tokenizer, tmp_path):
    _, _, seen = finished
    train = train_stream(OUT / "runs" / "small.jsonl", tokenizer, tmp_path)
    rows = PackedRows(train, LENGTH, True, 0)  # between them they hold every token of every document once
    assert len(rows) == 8 and len(train.tokens) > 7 * LENGTH
    for kind in ("ar", "diffusion"):
        for count in (1, 3):
            for seed in (1, 2):
                assert Counter(seen[f"repetition_{kind}_{count}_{seed}"]) == dict.fromkeys(range(8), count)


def test_documents_measured_on_are_neither_learnt_nor_selected_by(finished, tokenizer, tmp_path):
    runs = OUT / "runs"
    measured, small = (set(read_documents(runs / name)) for name in ("heldout.jsonl", "small.jsonl"))
    assert measured and not measured & small
    stream = tokenizer.decode(train_stream(Path("corpus.jsonl"), tokenizer, tmp_path).tokens.tolist())
    assert not [text for text in measured if text in stream]


def test_real_text_costs_what_the_judge_s_own_loss_says(finished, tokenizer):
    """Documents are cut to the row; EOS counts where they end in it."""
    judge = load_model(OUT / "runs" / "schedules_judge_state_dict.pt", torch.device("cpu"))
    nats = tokens = 0
    for text in list(read_documents(OUT / "runs" / "heldout.jsonl"))[:3]:
        ids = [tokenizer.bos_token_id, *encode(tokenizer, text), tokenizer.eos_token_id]
        ids = torch.tensor([ids[: LENGTH if len(ids) > LENGTH else None]])
        with torch.no_grad():
            log_p = judge(ids, is_causal=True)[0, :-1].log_softmax(-1)
        nats, tokens = nats - float(log_p[torch.arange(len(log_p)), ids[0, 1:]].sum()), tokens + len(log_p)
    assert result_of("schedules")["real_text"]["judge_nats"] == pytest.approx(nats / tokens, rel=1e-5)


def test_what_is_finished_is_not_run_again_and_gives_the_same_files(finished, launched, command):
    before = results()
    assert len(before) == 6
    assert command(experiments, finished[1]).code == 0
    assert not launched and results() == before


def test_figures_are_drawn_again_byte_for_byte_also_elsewhere(finished, tmp_path, command):
    before = results()
    for name in before:
        if name.endswith(".json"):
            shutil.copy(OUT / name, tmp_path)
    assert command(experiments, ["--draw", tmp_path]).code == 0
    assert results(tmp_path) == before


def test_another_recipe_in_the_same_folder_is_refused(finished, launched, command):
    before = results()
    result = command(experiments, [*finished[1], "--lr", "2e-2"])
    assert result.code == 2 and "is of another command" in result.err and "another --out" in result.err
    assert results() == before and not launched


@pytest.mark.parametrize("step", [2, 6])
def test_an_experiment_that_was_stopped_goes_on_to_the_same_files(
    step, finished, workspace, launched, command, monkeypatch
):
    """Stopped in the first and in the third training; what had been finished is not run again."""
    argv = [*finished[1], "--experiments", "initialisation", "--seeds", "1"]
    for flags in (SCHEDULES, REPETITION):
        start = argv.index(flags[0])
        del argv[start : start + len(flags)]
    assert command(experiments, argv).code == 0
    whole, (names, launched[:]) = without_digests(results()), (launched[:], [])
    shutil.rmtree(OUT)
    train_step, steps = trainer.Trainer._train_step, iter(range(1, 100))

    def interrupted(self):
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self)

    monkeypatch.setattr(trainer.Trainer, "_train_step", interrupted)
    assert command(experiments, argv).code == 128 + signal.SIGTERM
    assert len(launched) < len(names) and not results()
    assert command(experiments, argv).code == 0
    assert without_digests(results()) == whole
    assert launched.count(launched[0]) == (2 if step == 2 else 1) and len(launched) == len(names) + 1


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--experiments", "schedule"], ["'schedule' is not one of", "schedules"]),
        (["--experiments", "frontier"], ["--reports"]),
        (["--draw", "x"], ["--draw x"]),
        (["--experiments", "reversal", "--reports", "x.json"], ["x.json does not exist"]),
        (["--experiments", "reversal", "--reports", "corpus.jsonl"], ["corpus.jsonl is not a report"]),
        (["--schedules-band", "0.8"], ["--schedules-band", "two rates"]),
        (["--hidden-size", "30", "--num-attention-heads", "4"], ["--hidden-size 30"]),
        (["--data", "x.xlsx"], ["x.xlsx", ".jsonl"]),
    ],
)
def test_impossible_and_idle_flags_are_refused_before_anything_is_made(flags, words, refused):
    refused(experiments, flags, *words)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--val-fraction", "0"], ["holds out 0 documents"]),
        (["--experiments", "schedules", "--schedules-tokens", "63"], ["--schedules-tokens 63", "one step of 4 rows"]),
        (["--experiments", "repetition", "--repetition-tokens", "99999"], ["--repetition-tokens", "corpus.jsonl"]),
    ],
)
def test_a_budget_that_the_corpus_or_a_step_does_not_fit_is_refused(
    flags, words, workspace, tokenizer_dir, launched, command
):
    result = command(experiments, ["--data", "corpus.jsonl", "--tokenizer-dir", tokenizer_dir, *SIZES, *flags])
    assert result.code == 2 and not launched, result
    assert all(word in result.err for word in words), result.err


def test_after_a_failure_other_flags_may_be_tried(workspace, tokenizer_dir, launched, command):
    argv = ["--data", "corpus.jsonl", "--tokenizer-dir", tokenizer_dir, *SIZES, "--experiments", "initialisation"]
    argv += ["--seeds", "1", *INITIALISATION[:1], "128", *INITIALISATION[2:]]
    result = command(experiments, [*argv, "--lr", "1e30"])
    assert result.code == 2 and "--learning-rate" in result.err
    assert command(experiments, argv).code == 0


def test_a_command_that_fails_is_told_by_its_last_line(tmp_path):
    with pytest.raises(ValueError, match=r"json.tool ended with exit code 2 .*unrecognized arguments: --nonsense"):
        experiment_runs.launch("json.tool", ["--nonsense"], tmp_path / "output.txt")


def test_intervals_and_paired_differences_are_over_seeds():
    """Seeds differ a lot, the second way is worse by 0.1 in each: the difference is known exactly."""
    values = {1: 3.0, 2: 5.0, 3: 4.0}
    runs = [{"way": way, "seed": s, "x": v + 0.1 * (way == "b")} for s, v in values.items() for way in "ab"]
    first, second, difference = summarise(runs, Comparison(("way",), ("x",), "way"))
    half = 4.303 / math.sqrt(3)
    assert (first["low"], first["high"], first["n"]) == (pytest.approx(4 - half), pytest.approx(4 + half), 3)
    assert second["mean"] == pytest.approx(4.1) and difference["minus"] == "a"
    assert [difference[name] for name in ("mean", "low", "high")] == pytest.approx([0.1] * 3)


def report_of(right):
    """A report whose AR model answers nothing, and whose diffusion model answers question i if right[i]."""
    splits = ["seen"] * 8 + ["reversed"] * 8
    labels = [{"key": f"{i}", "lang": "en", "split": s, "kind": "capital"} for i, s in enumerate(splits)]
    facts = [
        {"question": f"q{i}", "wanted": f"city{i // 2}", "reference": f"city{i // 2}"} for i in range(16)
    ]  # two phrasings of each fact
    chosen = {"choices": ["right", "wrong"], "answer": 0}
    rows = [label | fact for label, fact in zip(labels, facts, strict=True)]
    offered = [label | {"question": fact["question"]} | chosen for label, fact in zip(labels, facts, strict=True)]

    def answered(some):
        cost = {"num_forward_passes": 4, "seconds": 0.5}
        return [{"text": row["wanted"] if ok else "?", **cost} for row, ok in zip(rows, some, strict=True)]

    answers = {"A": answered([False] * 16), "D": answered(right)}
    nats = {name: [{"nats": [0.0, 1.0]}] * 16 for name in "AD"}
    points = [("A", "AR", "greedy"), ("D", "random", "4 steps")]
    points = [{"model": m, "policy": p, "setting": s, "results": answers[m][:10]} for m, p, s in points]
    return {
        "models": [{"kind": "AR", "name": "A"}, {"kind": "diffusion", "name": "D"}],
        "sources": [
            {"name": "questions", "format": "questions", "items": rows, "results": answers},
            {"name": "choices", "format": "choices", "items": offered, "results": nats},
        ],
        "frontier": {"source": "questions", "items": 10, "points": points},
    }


def line(found, **fields):
    (row,) = [row for row in found["summary"] if all(row.get(name) == value for name, value in fields.items())]
    return row


def test_reversal_counts_right_answers_and_takes_facts_for_units():
    """Six of eight reversed questions, of four facts; the same answers from a second training add no certainty."""
    right = [True] * 8 + [True, True, True, False, True, True, True, False]
    once = READINGS["reversal"]({"a": report_of(right)})
    twice = READINGS["reversal"]({"a": report_of(right), "b": report_of(right)})
    cell = {"value": "exact match", "split": "reversed", "kind": "diffusion", "minus": None}
    row = line(once, **cell)
    assert (row["mean"], row["n"]) == (0.75, 4) and 0.5 <= row["low"] < 0.75 < row["high"] <= 1
    assert {k: v for k, v in line(twice, **cell).items()} == row
    assert line(once, **cell | {"minus": "AR"})["mean"] == 0.75
    none = line(once, **cell | {"kind": "AR"})
    assert none["mean"] == none["low"] == 0 and none["high"] > 0.3  # of four facts no one can say much


def test_the_frontier_averages_costs_over_trainings_and_takes_questions_for_units():
    reports = {"a": report_of([True] * 16), "b": report_of([False] * 16)}
    found = READINGS["frontier"](reports)
    row = line(found, policy="random")
    assert (row["mean"], row["n"], row["passes"], row["seconds"]) == (0.5, 10, 4.0, 0.5)
    assert row["low"] == row["high"] == 0.5  # every question is answered by one of the two
    assert [r["right"] for r in found["runs"] if r["policy"] == "random"] == [10, 0]


def test_reports_that_do_not_go_together_are_refused():
    one, other, open_ended, plain = (report_of([True] * 16) for _ in range(4))
    other["frontier"]["points"][1]["setting"] = "8 steps"
    open_ended["sources"][0]["format"] = "open"
    plain["frontier"] = None
    one_sided = report_of([True] * 16) | {"models": [{"kind": "AR", "name": "A"}]}
    for reports, words in (
        ({"a": one, "b": other}, "b has another frontier than a"),
        ({"a": open_ended}, "no right and wrong answers"),
        ({"a": plain}, "a has no frontier"),
        ({"a": one_sided}, "a has AR models only"),
    ):
        with pytest.raises(ValueError, match=words):
            READINGS["frontier"](reports)
    unlabelled = report_of([True] * 16)
    for item in unlabelled["sources"][0]["items"]:
        del item["split"]
    with pytest.raises(ValueError, match="no questions of the split 'seen'"):
        READINGS["reversal"]({"a": unlabelled})


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[3] / ".assets" / "experiments").glob("*.json")), ids=lambda p: p.stem
)
def test_the_published_figures_are_those_of_the_published_results(path, tmp_path):
    """Byte for byte where fonts are drawn alike; elsewhere but for the edges of letters."""
    draw(json.loads(path.read_text(encoding="utf-8")), tmp_path / "again.png")
    published, drawn = (image.imread(file) for file in (path.with_suffix(".png"), tmp_path / "again.png"))
    assert published.shape == drawn.shape
    assert abs(published - drawn).mean() < 0.01


def test_an_experiment_says_which_weights_it_measured_and_how(finished):
    for name in ("schedules", "initialisation", "repetition"):
        found = result_of(name)
        measured = {one["checkpoint"]: one["sha256"] for one in found["checkpoints"]}
        trained = {path for path in measured if Path(path).name.startswith(name)}
        assert set(measured) == trained and len(trained) >= len(found["runs"])
        assert all(hashlib.sha256(Path(path).read_bytes()).hexdigest() == value for path, value in measured.items())
        assert found["command"].startswith("uv run python -m scripts.eval.experiments --data corpus.jsonl ")
        assert (
            found["dtype"] == "float32"
            and found["data_sha256"] == hashlib.sha256(Path("corpus.jsonl").read_bytes()).hexdigest()
        )
