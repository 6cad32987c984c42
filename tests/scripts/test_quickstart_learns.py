"""The claims of the quickstart on a part of its world: a smaller model, fewer steps, real training, looser bounds."""

import json

import pytest

from dataset.corpus import bundled
from dataset.corpus.facts import facts
from scripts import quickstart
from scripts.engine.report.results import rows_of
from tests.scripts.conftest import run_command, write_rows

KINDS = ("capital", "country")
SHAPE = "--hidden-size 128 --num-attention-heads 4 --num-hidden-layers 2"
STEPS = {
    "AR pretraining": 60,
    "AR fine-tuning": 180,
    "joint fine-tuning, from AR": 320,
    "diffusion fine-tuning, from joint": 80,
}
AR, JOINT_AR, FULL, JOINT = "AR ar_sft", "AR joint_sft", "diffusion diffusion_sft", "diffusion joint_sft"


def small_world(folder):
    """The bundled documents, conversations and questions on facts of KINDS."""
    known = [fact for fact in facts() if fact.kind in KINDS]
    told = tuple(text for fact in known for text in fact.statements)
    asked = tuple(question for fact in known for question, _ in fact.seen)

    def is_kept(turns):
        return len(turns) == 2 and (turns[0]["content"].endswith(asked) or turns[1]["content"] in told)

    return (
        write_rows(folder / "texts.jsonl", [row for row in bundled.pretraining_rows() if row["text"].startswith(told)]),
        write_rows(folder / "chats.jsonl", [row for row in bundled.conversations() if is_kept(row["conversations"])]),
        write_rows(folder / "questions.jsonl", [row for row in bundled.questions() if row["kind"] in KINDS]),
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of such a quickstart."""
    folder = tmp_path_factory.mktemp("learning")
    texts, chats, questions = small_world(folder)
    more = {
        "scripts.train.train_pretrain": f" --data {texts} {SHAPE}",
        "scripts.train.train_sft_minimind": f" --data {chats}",
        "scripts.train.train_sft_diffusion": f" --data {chats}",
        "scripts.eval.report": f" --eval-data {questions},{chats} --eval-split validation"
        " --frontier-questions 20 --frontier-thresholds 0.9",
    }
    small = tuple(
        stage._replace(flags=stage.flags + more.get(stage.module, ""), steps=STEPS.get(stage.title, 0))
        for stage in quickstart.SMALL
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(quickstart, "SMALL", small)
        patch.setattr(quickstart, "seconds_of_a_step", lambda runtime: quickstart.STEP_SECONDS)
        result = run_command(quickstart, ["--out", folder / "out"])
    assert result.code == 0, result.err
    return json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def rows(report):
    """(metric, group) -> what it says of its questions."""
    return {(row.metric.name, row.group): row for row in rows_of(report["sources"][0], report["models"])}


def test_every_way_of_writing_answers_questions_in_phrasings_that_it_never_saw(rows):
    row = rows["exact match", "seen"]
    assert row.count == 80 and row.values.keys() == {AR, JOINT_AR, FULL, JOINT}
    assert all(share.value > 0.6 for share in row.values.values()), row.values


def test_what_has_learnt_by_diffusion_reverses_facts_and_an_autoregressive_model_does_not(rows):
    """Told "Brussels is the capital of Belgium" alone, asked for the capital of Belgium; joint weights know it also
    when they write from left to right."""
    row = rows["exact match", "reversed"]
    assert row.values[AR].value < 0.1
    for name in (JOINT_AR, FULL, JOINT):
        assert row.values[name].value > 0.1, row.values
    assert row.differences[FULL].high < 0  # AR less diffusion


def test_answers_end(rows):
    assert all(share.value < 0.05 for share in rows["overrun", "all"].values.values())


def test_self_speculation_writes_in_fewer_passes_what_the_same_weights_write_as_ar(report):
    """The frontier's questions; a rounding of bfloat16 may tell one text from the other."""
    written = {(point["model"], point["policy"]): point["results"] for point in report["frontier"]["points"]}
    one_by_one, drafted = written[JOINT_AR, "AR"], written[JOINT, "self_speculative"]
    pairs = list(zip(one_by_one, drafted, strict=True))
    assert sum(a["text"] == b["text"] for a, b in pairs) > 0.9 * len(pairs) > 15
    assert sum(a["num_forward_passes"] - 2 * b["num_forward_passes"] for a, b in pairs) > 0
