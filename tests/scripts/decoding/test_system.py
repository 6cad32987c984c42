"""--system: what a model is given is what a row of training data with that system turn gives it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dataset.rows.formats import read_conversations
from dataset.tokenizer import encode_conversations
from scripts.engine.decoding import answers
from scripts.engine.decoding.trace_files import load_traces
from scripts.engine.likelihood import choices, documents
from scripts.engine.prompts import Prompt, SystemConfig, fitting
from scripts.eval import eval_diffusion, eval_minimind, eval_sft, eval_sft_one_prompt, likelihood, report
from tests.scripts.conftest import write_rows
from tests.scripts.models import given_tokens, ready

SYSTEM, ASKED, REPLY = "the river follows 老朋友.", "the cat sees", "a small dog"
SHORT = ["--max-new-tokens", "6", "--system", SYSTEM]
KINDS = ("ar", "dm")
CHOICES = {"question": ASKED, "choices": [REPLY, "the river"], "answer": 0}


@pytest.fixture
def taught(tokenizer, workspace):
    """taught(system=SYSTEM) -> ids of a row of training data up to the reply that is learnt."""

    def ids(system=SYSTEM):
        row = {"instruction": ASKED, "output": REPLY} | ({"system": system} if system else {})
        ((_, messages),) = read_conversations(write_rows("row.jsonl", [row]), None)
        ((whole, ((begin, _),)),) = encode_conversations(tokenizer, [messages])
        return whole[:begin]

    return ids


@pytest.fixture
def small(tokenizer_dir):
    return ["--tokenizer-dir", str(tokenizer_dir), "--dtype", "float32", "--device", "cpu"]


@pytest.fixture
def prompts(canvases):
    """What stood before the first open token of each canvas."""
    return lambda: [row[: row.index(None)] for row in map(given_tokens, canvases)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_put_as_a_row_of_training_data(kind, checkpoint, small, command, prompts, taught):
    module = eval_minimind if kind == "ar" else eval_diffusion
    argv = ["--checkpoint", checkpoint(kind), *small, "--prompt", ASKED, *SHORT]
    found = json.loads(command(module, [*argv, "--trace", "a.json", "--json"]).out)
    assert command(module, [*argv, "--system", ""]).code == 0
    assert prompts() == [taught(), taught("")] and taught() != taught("")
    (trace,) = load_traces("a.json")
    assert found["settings"]["system"] == trace.info["system"] == trace.info["record"]["settings"]["system"] == SYSTEM


def test_both_models_are_put_the_same_system_prompt(flag, small, command, prompts, taught):
    argv = [*flag("ar"), *flag("dm"), *small, "--prompt", ASKED, *SHORT, "--json"]
    found = json.loads(command(eval_sft_one_prompt, argv).out)
    assert prompts() == [taught()] * 2 and found["settings"]["system"] == SYSTEM


def test_blanks_and_scored_responses_reply_behind_it(
    checkpoint, small, command, prompts, taught, monkeypatch, tokenizer
):
    argv = ["--checkpoint", checkpoint("dm"), *small, "--prompt", ASKED, "--system", SYSTEM]
    assert command(eval_diffusion, [*argv, "--infill", "___"]).code == 0
    assert prompts() == [taught()]
    scored, score = [], documents.row_nats
    monkeypatch.setattr(documents, "row_nats", lambda model, batch, *a: scored.append(batch) or score(model, batch, *a))
    assert command(eval_diffusion, [*argv, "--cond-ll-response", REPLY]).code == 0
    ids = scored[0]["input_ids"][0].tolist()
    assert ids[: len(taught())] == taught()


def test_choices_are_scored_behind_it(checkpoint, small, command, taught, monkeypatch):
    windows, score = [], choices.window_nats
    monkeypatch.setattr(
        choices, "window_nats", lambda loaded, rows, data: windows.extend(rows) or score(loaded, rows, data)
    )
    write_rows("choices.jsonl", [CHOICES])
    data = [*small, "--eval-data", "choices.jsonl", "--system", SYSTEM, "--nmc", "1"]
    assert command(likelihood, ["--checkpoint", checkpoint("dm"), *data, "--json", "a.json"]).code == 0
    assert json.loads(Path("a.json").read_text(encoding="utf-8"))["settings"]["system"] == SYSTEM
    both = ["--diffusion-checkpoint", "weights/dm_state_dict.pt", *data, "--out", "out"]
    monkeypatch.setattr(report, "draw", lambda *a: [])
    assert command(report, both).code == 0
    assert len(windows) == 4 and all(window.ids[: window.begin] == taught() for window in windows)


def test_a_report_asks_every_question_behind_it(flag, small, command, prompts, taught, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *a: [])
    write_rows("questions.jsonl", [{"question": ASKED, "answer": REPLY}])
    argv = [*flag("ar"), *small, "--eval-data", "questions.jsonl", *SHORT, "--out", "out"]
    assert command(report, argv).code == 0
    assert prompts() and all(ids == taught() for ids in prompts())
    assert json.loads(Path("out/report.json").read_text(encoding="utf-8"))["settings"]["system"] == SYSTEM


def test_rows_keep_a_system_prompt_of_their_own(flag, small, command, refused, prompts, taught):
    plain, own = ({"instruction": ASKED, "output": REPLY} | more for more in ({}, {"system": "the cat likes"}))
    argv = [*flag("ar"), *small, "--eval-data", "chats.jsonl", "--system", SYSTEM, "--max-new-tokens", "40"]
    write_rows("chats.jsonl", [plain, own])
    result = command(eval_sft, [*argv, "--json", "a.json"])
    assert result.code == 0 and "1 of 2 questions keep their own system prompt" in result.err
    assert sorted(prompts()) == sorted([taught(), taught("the cat likes")])
    found = json.loads(Path("a.json").read_text(encoding="utf-8"))
    assert found["settings"]["system"] == SYSTEM
    assert {question["messages"][0]["content"] for question in found["questions"]} == {SYSTEM, "the cat likes"}
    write_rows("chats.jsonl", [own, {**own, "instruction": "why"}])
    refused(eval_sft, argv, "--system has no effect", "of its own")


def test_a_system_prompt_changes_which_questions_fit_and_not_their_order(tokenizer, tmp_path):
    rows = [{"prompt": f"the cat sees {i}", "response": "the river"} for i in range(20)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    without, _ = answers.questions_of(path, tokenizer, 5, (30, 200))
    behind, _ = answers.questions_of(path, tokenizer, 5, (30, 200), systems=SystemConfig(SYSTEM))
    assert [q.messages[-1:] for q in without] == [q.messages[1:] for q in behind]
    size = max(len(Prompt(q.messages).encode(tokenizer)) for q in without)
    with pytest.raises(ValueError, match="no row has a prompt that leaves room"):
        answers.questions_of(path, tokenizer, 5, (30, size + 30), systems=SystemConfig(SYSTEM))


def commands(flag, checkpoint):
    """(command, its flags for one or two models) of all that have --system."""
    single = {eval_minimind: ["--prompt", "a"], eval_diffusion: ["--prompt", "a"]}
    for kind, (module, more) in zip(KINDS, single.items(), strict=True):
        yield module, ["--checkpoint", checkpoint(kind), *more]
    yield eval_sft_one_prompt, [*flag("ar"), "--prompt", "a"]
    yield eval_sft, [*flag("ar"), "--eval-data", "chats.jsonl"]
    yield report, [*flag("ar"), "--eval-data", "questions.jsonl", "--out", "out"]


def test_one_that_leaves_no_room_is_refused_before_any_work(flag, checkpoint, small, refused, workspace):
    write_rows("chats.jsonl", [{"prompt": "a", "response": "b"}])
    write_rows("questions.jsonl", [{"question": "a", "answer": "b"}])
    for module, argv in commands(flag, checkpoint):
        more = [*small, "--system", "the river " * 30, "--max-new-tokens", "4", "--seq-len", "40"]
        refused(module, [*argv, *more], "--system and the chat template are", "--max-seq-len 40")


def test_it_has_no_effect_outside_the_template(flag, checkpoint, small, refused, workspace):
    write_rows("questions.jsonl", [{"question": "a", "answer": "b"}])
    for module, argv in commands(flag, checkpoint):
        if module is not eval_sft:  # which knows no other prompts
            refused(module, [*argv, *small, "--system", "a", "--no-chat-wrap"], "--system has no effect outside")
    argv = ["--checkpoint", checkpoint("ar", chats=False), *small, "--system", "a"]
    refused(eval_minimind, [*argv, "--prompt", "a"], "--system has no effect outside the chat template")
    refused(eval_minimind, [*argv, "--eval-data", "corpus.jsonl"], "--system has no effect without --prompt")
    refused(likelihood, [*argv, "--eval-data", "corpus.jsonl"], "--system has no effect without multiple choice")


@pytest.mark.parametrize("system", ["", SYSTEM])
def test_what_fits_is_the_longest_end_of_a_conversation_behind_its_system_prompt(system, tokenizer):
    loaded, systems = ready(tokenizer, "causal"), SystemConfig(system)
    turns = [{"role": ("user", "assistant")[i % 2], "content": ASKED} for i in range(7)]
    ends = [systems.opened(turns[start:]) for start in range(0, 7, 2)]
    for end, size in [(end, len(Prompt(end).encode(tokenizer))) for end in ends]:
        for limit, expected in ((size + 5, end), (size + 4, ends[min(ends.index(end) + 1, 3)])):
            found = fitting(replace(loaded, max_length=limit), Prompt(ends[0]), 5)
            assert found.content == expected
