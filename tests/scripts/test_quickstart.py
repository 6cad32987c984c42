"""scripts.quickstart: it learns what it says, goes on where it was stopped, and says what it measured."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from dataset.corpus import bundled
from model.checkpoint import load_checkpoint
from scripts import quickstart
from scripts.engine.report.results import summary_of
from scripts.engine.runtime import RuntimeConfig
from scripts.engine.statistics import is_correct
from scripts.engine.training import guard
from tests.scripts.conftest import Result, run_command
from tests.soak.state import difference

CHEAP = ["--scale", "0.001", "--dtype", "float32"]
TINY = {  # module -> flags after those of its stage
    "scripts.train.train_pretrain": " --batch-size 8 --hidden-size 32 --num-hidden-layers 1 --num-attention-heads 2",
    "scripts.train.train_sft_minimind": " --batch-size 8",
    "scripts.train.train_sft_diffusion": " --batch-size 8",
    "scripts.eval.report": " --questions 12 --max-rows 12 --frontier-questions 2 --frontier-thresholds 0.9",
}
SMALL = tuple(stage._replace(flags=stage.flags + TINY.get(stage.module, "")) for stage in quickstart.SMALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the small recipe is a tiny one, on every twentieth of the bundled rows."""
    folder = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(quickstart, "SMALL", SMALL)
        patch.setattr(quickstart, "seconds_of_a_step", lambda runtime: quickstart.STEP_SECONDS)
        for name in ("pretrain", "sft", "questions"):
            patch.setitem(bundled.FILES, name, lambda rows=bundled.FILES[name]: rows()[::20])
        yield folder


@pytest.fixture
def workspace(place):
    return place


def start(folder, *flags):
    return run_command(quickstart, [*CHEAP, "--out", folder, *flags])


def noted(patch, perform=lambda *command: 0.0):
    """Commands performed from now on; without `perform` nothing is done for them."""
    commands = []
    patch.setattr(quickstart, "perform", lambda *command: commands.append(command) or perform(*command))
    return commands


class Finished(NamedTuple):
    folder: Path
    result: Result
    ran: list[list[str]]  # commands


@pytest.fixture(scope="module")
def finished(place):
    """A quickstart from nothing to its end."""
    with pytest.MonkeyPatch.context() as patch:
        ran = noted(patch, quickstart.perform)
        return Finished(place / "with blank", start(place / "with blank"), [[module, *flags] for module, flags in ran])


def weights(folder):
    files = sorted(folder.glob("*_state_dict.pt"))
    return {file.name: load_checkpoint(file)["weights"] for file in files}


def measured(folder):
    """What a report says, less the time that it took."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    found = summary_of(report)
    return {
        (source, metric, group): value["models"]
        for source, metrics in found.items()
        for metric, groups in metrics.items()
        for group, value in groups.items()
        if metric != "seconds"
    }


def test_it_ends_with_answers_measures_and_files(finished):
    assert finished.result.code == 0, finished.result.err
    told = finished.result.out
    for part in ("Answers", "Right answers", "Likelihood", "Speed", "report.md", "trace.html", "scripts.chat"):
        assert part in told
    for name in ("report.md", "report.json", "trace.html"):
        assert (finished.folder / name).stat().st_size > 0
    assert "Anna" in (finished.folder / "trace.html").read_text(encoding="utf-8")


def test_what_it_says_is_what_was_written(finished):
    """Shares of right answers, counted again from the answers, of every way of writing."""
    report = json.loads((finished.folder / "report.json").read_text(encoding="utf-8"))
    section = next(section for section in report["sources"] if section["format"] == "questions")
    table = finished.result.out.partition("Right answers")[2].partition("\n\n")[0]
    ways = {"AR": "AR ar_sft", "joint, as AR": "AR joint_sft"}
    ways |= {"full attention": "diffusion diffusion_sft", "joint, in blocks": "diffusion joint_sft"}
    for title, name in ways.items():
        shares = []
        for split in dict.fromkeys(item["split"] for item in section["items"]):
            asked = [(result, item) for result, item in zip(section["results"][name], section["items"], strict=True)]
            asked = [(result["text"], item) for result, item in asked if item["split"] == split]
            right = sum(is_correct(text, item["wanted"], item["question"]) for text, item in asked)
            shares.append(f"{100 * right / len(asked):.1f} % [")
        (line,) = re.findall(rf"^  {title}  .*$", table, re.MULTILINE)
        assert sorted(shares) == sorted(re.findall(r"\S+ % \[", line)), title


def test_self_speculation_writes_the_text_of_the_joint_weights_as_ar(finished):
    """On the questions of the frontier, which shows both."""
    points = json.loads((finished.folder / "report.json").read_text(encoding="utf-8"))["frontier"]["points"]
    texts = {
        (point["model"], point["policy"]): [result["text"] for result in point["results"]]
        for point in points
        if point["policy"] != "threshold"
    }
    assert len(texts) == 3
    assert texts["diffusion joint_sft", "self_speculative"] == texts["AR joint_sft", "AR"]


def test_the_minutes_are_those_of_this_machine_and_of_what_is_still_to_do(monkeypatch):
    config, runtime = quickstart.Quickstart(), RuntimeConfig()

    def announced(step, done):
        monkeypatch.setattr(quickstart, "seconds_of_a_step", lambda runtime: step)
        return quickstart.estimate(config, runtime, done)

    once, sentence = announced(quickstart.STEP_SECONDS, {})
    assert once == {title: pytest.approx(seconds / 60) for title, seconds in quickstart.SECONDS.items()}
    assert [stage.title for stage in quickstart.SMALL] == list(once)
    told = float(re.match(r"About (\S+) minutes", sentence)[1])
    assert told == pytest.approx(sum(quickstart.SECONDS.values()) / 60, abs=0.051)
    twice, _ = announced(2 * quickstart.STEP_SECONDS, {"tokenizer": 5.0, "AR pretraining": 9.0})
    assert twice == {title: pytest.approx(2 * minutes) for title, minutes in list(once.items())[2:]}
    monkeypatch.setattr(quickstart, "seconds_of_a_step", lambda runtime: pytest.fail("nothing is left to announce"))
    assert quickstart.estimate(config, runtime, once) == ({}, "")
    tenth = quickstart.Quickstart(scale=0.1)
    monkeypatch.setattr(quickstart, "seconds_of_a_step", lambda runtime: quickstart.STEP_SECONDS)
    shorter, _ = quickstart.estimate(tenth, runtime, {})
    assert shorter["AR pretraining"] == pytest.approx(once["AR pretraining"] / 10)
    assert shorter["evaluation"] == once["evaluation"]


def test_the_commands_that_it_prints_are_those_that_it_ran(finished):
    """Each can be copied and run alone: what a shell makes of the line is what the stage was given."""
    lines = finished.result.out.splitlines()
    printed = [shlex.split(line)[4:] for line in lines if line.startswith("uv run python -m scripts.")]
    assert printed == finished.ran
    assert len(printed) == len(quickstart.SMALL)


def test_finished_stages_are_not_repeated(finished, monkeypatch):
    (finished.folder / "trace.html").unlink()
    ran = noted(monkeypatch, quickstart.perform)
    again = start(finished.folder)
    assert [module for module, _ in ran] == ["scripts.eval.eval_sft_one_prompt"]
    assert again.out.count("done before") == 2 * (len(quickstart.SMALL) - 1)  # announced, then skipped
    told = [re.search(r"Answers.*?\n\nSpeed", result.out, re.DOTALL)[0] for result in (finished.result, again)]
    assert told[0] == told[1]


def test_a_stage_whose_file_is_gone_is_repeated_with_all_after_it(finished, monkeypatch, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "copy")
    (folder / "ar_state_dict.pt").unlink()
    ran = noted(monkeypatch)
    assert start(folder).code == 0
    assert [module for module, _ in ran] == [stage.module for stage in quickstart.SMALL[1:]]


def test_an_interrupted_quickstart_goes_on_and_ends_the_same(finished, place, monkeypatch):
    broken = place / "broken"
    enter, entered = guard.StopSignals.__enter__, []

    def asked_to_stop_at_first(self):
        enter(self)
        entered.append(self)
        self.number = 2 if len(entered) % 2 else 0  # as after Ctrl-C, of every training once
        return self

    monkeypatch.setattr(guard.StopSignals, "__enter__", asked_to_stop_at_first)
    for _ in range(4):
        result = start(broken)
        assert result.code == 130 and "goes on from here" in result.out, result
    assert start(broken).code == 0
    assert len(entered) == 8
    assert difference(weights(finished.folder), weights(broken)) is None
    assert measured(finished.folder) == measured(broken)


def test_a_folder_of_another_recipe_is_refused_and_left_alone(finished, refused, monkeypatch):
    out = "--out", finished.folder
    refused(quickstart, [*CHEAP, *out, "--seed", "2"], "seed was 1337, is 2", "--overwrite", "--out")
    refused(quickstart, ["--dtype", "float32", *out], "scale was 0.001, is 1.0")
    older = tuple(stage._replace(steps=stage.steps + 1) for stage in SMALL)
    monkeypatch.setattr(quickstart, "SMALL", older)
    refused(quickstart, [*CHEAP, *out], "stages was")
    before = quickstart.recipe(quickstart.Quickstart(), RuntimeConfig())
    monkeypatch.setattr(quickstart, "bundled_file", lambda name: Path(f"another/{name}.jsonl"))
    assert quickstart.recipe(quickstart.Quickstart(), RuntimeConfig()) != before, "the corpus is part of it"


def test_an_overwritten_quickstart_that_is_interrupted_goes_on_from_itself(finished, monkeypatch, tmp_path):
    """Not from what was there before, which has another seed and would be refused."""
    folder, perform = shutil.copytree(finished.folder, tmp_path / "copy"), quickstart.perform

    def stopped(module, command):
        if module == "scripts.train.train_pretrain":
            raise guard.Interrupted(130)
        return perform(module, command)

    monkeypatch.setattr(quickstart, "perform", stopped)
    assert start(folder, "--seed", "2", "--overwrite").code == 130
    ran = noted(monkeypatch)
    monkeypatch.setattr(quickstart, "summary", lambda *a: [])
    assert start(folder, "--seed", "2").code == 0
    assert [module for module, _ in ran] == [stage.module for stage in SMALL[1:]]
    assert not list(folder.glob("*.pt"))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"recipe": {}, "done": {"trace": null}}'])
def test_a_damaged_record_is_named(finished, content, tmp_path):
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "quickstart.json").write_text(content)
    result = start(folder)
    assert result.code == 2 and f"{folder}/quickstart.json is damaged" in result.err


def test_scale_multiplies_the_steps_of_every_training():
    config, runtime = quickstart.Quickstart(scale=0.5), RuntimeConfig()
    for stage in quickstart.SMALL:
        if stage.steps:
            flags = quickstart.command_of(stage, config, runtime)
            assert flags[flags.index("--max-iters") + 1] == str(round(stage.steps / 2))


def test_the_full_recipe_says_what_to_do_without_a_network(refused, workspace, monkeypatch):
    from modelscope.hub import file_download

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(file_download, "dataset_file_download", unreachable)
    (workspace / "dataset").mkdir(exist_ok=True)
    result = quickstart.Quickstart(full=True)
    assert result.stages is quickstart.FULL
    with pytest.raises(OSError, match="put it there yourself") as raised:
        quickstart.download()
    assert "dataset/pretrain_hq.jsonl" in str(raised.value)
    refused(quickstart, ["--full", "--scale", "0.5"], "--scale", "--full")
