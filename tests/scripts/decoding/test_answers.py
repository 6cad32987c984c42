"""scripts.eval.eval_sft: which questions are asked, that figures are right, and that a batch changes no answer."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataset.content import content_hash
from dataset.tokenizer import encode, encode_chat, render_chat, train_characters
from model.decoding.autoregressive import SamplingConfig
from model.decoding.decode import ContinuationConfig
from model.decoding.denoiser import DenoisingConfig
from scripts.engine.decoding import answers
from scripts.engine.decoding.answers import (
    Answer,
    Question,
    answer_all,
    describe,
    judge,
    questions_of,
    samples,
    table,
)
from scripts.engine.decoding.generation import generate
from scripts.engine.decoding.samplers import SamplerGrid
from scripts.engine.prompts import Prompt
from scripts.engine.runtime import RuntimeConfig
from scripts.engine.statistics import distinct, longest_repeat
from scripts.eval import eval_sft
from tests.scripts.conftest import conversations, write_rows
from tests.scripts.models import ready

RUNTIME = RuntimeConfig(device="cpu", dtype="float32", seed=5)


def exchange(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


# -- figures -----------------------------------------------------------------------------------------------------------

made = st.lists(
    st.tuples(
        st.sampled_from(["", "the cat", "the cat the cat the", "一只小猫一只小猫", "my old friend"]),
        st.integers(1, 40),
        st.booleans(),
        st.integers(1, 64),
        st.floats(0.01, 9),
        st.integers(1, 40),
    ),
    min_size=1,
    max_size=6,
)


@given(made)
def test_figures_are_plain_means_and_their_standard_errors(tokenizer, made):
    given = [Answer(*one[:5]) for one in made]
    found = describe(tokenizer, given, [Answer("", size, True) for *_, size in made])
    texts = [encode(tokenizer, text) for text, *_ in made]
    columns = {
        "tokens": [n for _, n, *_ in made],
        "longest_repeat": [longest_repeat(text) / len(text) if text else 0 for text in texts],
        "premature": [ended and n < size / 4 for _, n, ended, _, _, size in made],
        "overrun": [not ended for _, _, ended, *_ in made],
        "forward_passes": [passes for _, _, _, passes, *_ in made],
    }
    for name, values in columns.items():
        mean, error = found[name]
        assert mean == pytest.approx(np.mean(values, dtype=float))
        if len(made) == 1:
            assert error is None
        else:
            assert error == pytest.approx(np.std(np.array(values, float), ddof=1) / math.sqrt(len(made)))
    total = sum(columns["tokens"])
    assert found["answers"] == len(made)
    assert found["tokens_per_pass"] == pytest.approx(total / sum(columns["forward_passes"]))
    assert found["tokens_per_second"] == pytest.approx(total / sum(one[4] for one in made))
    assert [found[f"distinct_{n}"] for n in (1, 2, 3)] == [distinct(texts, n) for n in (1, 2, 3)]


@pytest.mark.parametrize(
    "size, ended, premature, overrun", [(2, True, 0, 0), (1, True, 1, 0), (1, False, 0, 1), (9, True, 0, 0)]
)
def test_an_answer_is_premature_if_it_ends_below_a_quarter_of_its_reference(size, ended, premature, overrun, tokenizer):
    found = describe(tokenizer, [Answer("", size, ended)], [Answer("", 8, True)])
    assert (found["premature"][0], found["overrun"][0]) == (premature, overrun)


def test_references_have_no_cost_and_columns_do_not_touch(tokenizer):
    reference = describe(tokenizer, [Answer("the cat", 4, True)], [Answer("the cat", 4, True)])
    answer = describe(tokenizer, [Answer("", 1, True, 3, 0.5)], [Answer("the cat", 4, True)])
    assert reference["forward_passes"] is reference["tokens_per_pass"] is reference["tokens_per_second"] is None
    lines = table({"reference": {"zh": reference}, "a sampler of a long name": {"zh": answer}})[:-1]
    assert lines[1].split()[-4:] == ["-"] * 4 and lines[2].split()[-4:] == ["3.00", "0.333", "2.000", "-"]
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == list(answers.COLUMNS)


def test_a_sample_steers_no_terminal_and_says_where_no_end_was_written():
    question = Question(exchange("a\033[2J"), "b", "zh")
    lines = samples({"AR": [Answer("c\033\nd", 3, False)]}, [question], 1)
    assert lines == ["", "user: a\u241b[2J", "AR: c\u241b\nd [no EOS]"]


# -- questions ---------------------------------------------------------------------------------------------------------


def test_questions_are_the_conversations_up_to_the_last_reply_chosen_by_content(tmp_path, tokenizer, texts):
    rows = conversations(texts)
    some, counts = questions_of(write_rows(tmp_path / "a.jsonl", rows), tokenizer, 4, (30, 90))
    again, _ = questions_of(write_rows(tmp_path / "b.jsonl", rows[::-1] + rows), tokenizer, 4, (30, 90))
    assert some == again, "the order of the file, and copies, matter to nobody"
    every, _ = questions_of(tmp_path / "a.jsonl", tokenizer, 1000, (30, 90))
    assert counts == {"rows": 60, **{lang: sum(q.language == lang for q in every) for lang in ("zh", "other")}}
    for language in ("zh", "other"):
        key = {q.messages[0]["content"] + q.reference: order_of(q) for q in every if q.language == language}
        chosen = [q.messages[0]["content"] + q.reference for q in some if q.language == language]
        assert chosen == sorted(key, key=key.get)[:4]
    assert {len(q.messages) for q in every} == {1, 3}
    for question in every:
        assert len(encode(tokenizer, question.reference)) + 1 <= 30
        assert len(encode_chat(tokenizer, question.messages, True)) + 30 <= 90


def order_of(question):
    whole = [*question.messages, {"role": "assistant", "content": question.reference}]
    return content_hash(render_chat(whole, add_generation_prompt=False))


def test_a_question_fits_to_the_token(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [{"messages": exchange("the cat sees", "the river")}])
    reply = len(encode(tokenizer, "the river")) + 1
    size = len(encode_chat(tokenizer, exchange("the cat sees"), True)) + reply
    assert len(questions_of(path, tokenizer, 9, (reply, size))[0]) == 1
    for limits in ((reply - 1, size), (reply, size - 1)):
        with pytest.raises(ValueError, match="no row has a prompt that leaves room"):
            questions_of(path, tokenizer, 9, limits)


def test_a_reply_that_is_empty_or_replies_to_nothing_is_no_reference(tmp_path, tokenizer):
    nothing = [{"role": "assistant", "content": "the cat"}]
    rows = [{"messages": exchange("the cat", " ")}, {"messages": nothing}, {"messages": exchange("a", "b", "c")}]
    found, counts = questions_of(write_rows(tmp_path / "a.jsonl", rows), tokenizer, 9, (30, 90))
    assert found == [Question(exchange("a"), "b", "other")] and counts == {"rows": 3, "other": 1}


@pytest.mark.parametrize(
    "row, words",
    [
        ({"text": "x"}, "row 2: expected the fields of a conversation"),
        ({"messages": [{"role": "user", "content": "x"}]}, "row 2: the conversation has no assistant message"),
        ({"messages": exchange("x", 3)}, "row 2: content of message 2 is a number"),
        ({"messages": exchange("x", "\u2603")}, "row 2: character '\u2603'"),
    ],
)
def test_a_bad_row_is_named(row, words, tmp_path):
    characters = train_characters(["abcdefghijklmnopqrstuvwxyz\n"])
    path = write_rows(tmp_path / "a.jsonl", [{"messages": exchange("x", "y")}, row])
    with pytest.raises(ValueError, match="a.jsonl, " + words):
        questions_of(path, characters, 9, (30, 90))


# -- answers -----------------------------------------------------------------------------------------------------------

CONFIGS = [
    ("causal", SamplingConfig()),
    ("full", DenoisingConfig(gen_steps=4)),
    ("full", DenoisingConfig(gen_remasking="threshold", gen_confidence_threshold=0.2, gen_block_size=4)),
]
PROMPTS = [
    Prompt(exchange(text))
    for text in ("the cat sees", "a", "一只小猫看见了老朋友", "my old friend likes the river. the cat", "b")
]


@pytest.mark.parametrize("gen_seed", [None, 7, 2**32 - 1])
@pytest.mark.parametrize("attention, config", CONFIGS)
def test_the_batch_size_changes_no_answer(attention, config, gen_seed, tokenizer):
    """Each is the one of a single user who gave the question's own seed: the first one's, plus its place."""
    loaded = ready(tokenizer, attention, 128, runtime=RUNTIME)
    continuation = ContinuationConfig(8, gen_seed=gen_seed)

    def plain(size):
        found = answer_all(loaded, PROMPTS, continuation, config, size, "x")
        return [(a.text, a.num_tokens, a.ended, a.num_forward_passes) for a in found]

    alone = plain(1)
    assert len(set(alone)) > 1 and all(plain(size) == alone for size in (2, 3, 5, 9))
    if gen_seed != 2**32 - 1:
        first = 5 if gen_seed is None else gen_seed
        for i, (prompt, answer) in enumerate(zip(PROMPTS, alone, strict=True)):
            seeded = ContinuationConfig(8, gen_seed=first + i)
            g = generate(loaded, prompt, seeded, config)
            assert (g.text, g.num_tokens, g.ended, g.num_forward_passes) == answer


def test_the_seconds_of_a_batch_are_shared_by_its_answers(tokenizer, monkeypatch):
    batches, generate_batch = [], answers.generate_batch
    monkeypatch.setattr(answers, "generate_batch", lambda *a: batches.append(generate_batch(*a)) or batches[-1])
    loaded = ready(tokenizer, "causal", 128, runtime=RUNTIME)
    found = answer_all(loaded, PROMPTS, ContinuationConfig(4), SamplingConfig(), 2, "x")
    assert [len(batch) for batch in batches] == [2, 2, 1], "the warming up decodes no answer"
    assert sum(a.seconds for a in found) == pytest.approx(sum(batch[0].seconds for batch in batches))


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def argv(flag, workspace, tokenizer_dir, texts):
    """argv(*kinds, chats=True): arguments of an evaluation on 60 conversations."""
    write_rows(workspace / "chats.jsonl", conversations(texts))
    flags = ["--eval-data", "chats.jsonl", "--tokenizer-dir", str(tokenizer_dir), "--dtype", "float32"]
    flags += ["--device", "cpu", "--seq-len", "90", "--max-new-tokens", "30", "--prompts-per-language", "2"]
    return lambda *kinds, chats=True: [*flags, *(word for kind in kinds for word in flag(kind, chats))]


def test_every_policy_is_tried_with_the_steps_and_thresholds_that_it_heeds():
    found = SamplerGrid(("threshold", "hybrid", "margin"), (2, 3), (0.5, 1.0)).samplers(DenoisingConfig(gen_steps=7))
    assert {name: (c.gen_remasking, c.gen_steps, c.gen_confidence_threshold) for name, c in found.items()} == {
        "threshold 0.5": ("threshold", 7, 0.5),
        "threshold 1": ("threshold", 7, 1.0),
        "hybrid 0.5, 2 steps": ("hybrid", 2, 0.5),
        "hybrid 1, 2 steps": ("hybrid", 2, 1.0),
        "hybrid 0.5, 3 steps": ("hybrid", 3, 0.5),
        "hybrid 1, 3 steps": ("hybrid", 3, 1.0),
        "margin, 2 steps": ("margin", 2, 0.9),
        "margin, 3 steps": ("margin", 3, 0.9),
    }


def test_a_judge_gives_the_nats_of_each_answer_and_its_end_given_the_prompt(tokenizer):
    """By the chain rule, one token at a time; an answer that did not end is not charged for an end."""
    loaded = ready(tokenizer, "causal", 128, runtime=RUNTIME)
    questions = [Question(exchange("the cat"), "a river", "other"), Question(exchange("the dog"), "b", "other")] * 2
    made = [Answer("the river", 3, True), Answer("the", 5, False), Answer("", 1, True), Answer("", 0, False)]
    found = judge(loaded, questions, made)
    for question, answer, judged in zip(questions, made, found, strict=True):
        prompt, reply = encode_chat(tokenizer, question.messages, True), encode(tokenizer, answer.text)
        reply += [tokenizer.eos_token_id] * answer.ended
        with torch.no_grad():
            log_p = loaded.model(torch.tensor([prompt + reply]), is_causal=True)[0].log_softmax(-1)
        nats = -sum(log_p[len(prompt) - 1 + i, token].item() for i, token in enumerate(reply))
        assert judged.judged_nats == pytest.approx(nats, rel=1e-5) and judged.judged_tokens == len(reply)
        assert judged.text == answer.text
    total = sum(a.judged_nats for a in found) / sum(a.judged_tokens for a in found)
    assert describe(tokenizer, found, made)["judged"][0] == pytest.approx(total)
    assert describe(tokenizer, made, made)["judged"] is None


def test_one_file_holds_everything_and_its_figures_follow_from_its_answers(argv, command, tokenizer):
    grid = ["--policies", "low_confidence, threshold", "--steps", "2,3", "--gen-temp", "0.5", "--show", "1"]
    result = command(eval_sft, [*argv("ar", "dm"), *grid, "--batch-size", "3", "--json", "new/a.json"])
    assert result.code == 0 and not result.complaints, result.err
    found = json.loads(Path("new/a.json").read_text(encoding="utf-8"))
    names = ["AR", "low_confidence, 2 steps", "low_confidence, 3 steps", "threshold"]
    assert list(found["answers"]) == list(found["figures"]) == ["reference", *names]
    expected = [  # and what was left to the checkpoint is what it came to
        DenoisingConfig(gen_temp=0.5, gen_remasking=policy, gen_steps=steps, gen_block_size=8, gen_cache="none")
        for policy, steps in (("low_confidence", 2), ("low_confidence", 3), ("threshold", 64))
    ]
    assert found["samplers"]["AR"] == SamplingConfig().__dict__
    assert [found["samplers"][name] for name in names[1:]] == [config.__dict__ for config in expected]
    assert all(a["num_forward_passes"] == 3 for a in found["answers"]["low_confidence, 3 steps"] if not a["ended"])
    assert found["settings"]["batch_size"] == 3 and found["settings"]["max_new_tokens"] == 30
    assert {"tokenizer", "data_sha256", "commit", "torch", "device"} <= found.keys()
    questions = found["questions"]
    assert [q["language"] for q in questions] == ["zh", "zh", "other", "other"]
    assert [a["text"] for a in found["answers"]["reference"]] == [q["reference"] for q in questions]
    for name, made in found["answers"].items():
        for language, figures in found["figures"][name].items():
            part = [Answer(**a) for a, q in zip(made, questions, strict=True) if q["language"] == language]
            pairs = zip(found["answers"]["reference"], questions, strict=True)
            reference = [Answer(**r) for r, q in pairs if q["language"] == language]
            assert figures == json.loads(json.dumps(describe(tokenizer, part, reference)))
    assert found["fitting"]["rows"] == 60
    assert "60 rows, of which these fit: " in result.out
    lines = result.out.splitlines()
    lines = lines[next(i for i, line in enumerate(lines) if line.startswith("reference")) :]
    assert [line.split()[0] for line in lines[:10:2]] == ["reference", "AR", *(["low_confidence,"] * 2), "threshold"]
    assert sum(line.startswith("user: ") for line in lines) == 2


def test_bad_rows_are_left_out_where_it_is_asked_for(argv, command, refused, workspace):
    path = workspace / "chats.jsonl"
    path.write_bytes(b"{\n" + path.read_bytes() + b'{"prompt": "a"}\n')
    more = ["--show", "0", "--ar-temperature", "0", "--json", "a.json"]
    refused(eval_sft, [*argv("ar"), *more], "row 1: not valid JSON")
    result = command(eval_sft, [*argv("ar"), *more, "--on-bad-row", "skip"])
    found = json.loads(Path("a.json").read_text(encoding="utf-8"))
    assert result.code == 0 and "chats.jsonl: 2 bad rows skipped: row 1: not valid JSON" in result.err
    assert found["skipped_rows"] == 2 and found["fitting"]["rows"] == 60 and len(found["questions"]) == 4


def test_a_checkpoint_of_no_conversations_is_said_to_be_one(argv, command):
    result = command(eval_sft, [*argv("ar", chats=False), "--prompts-per-language", "1"])
    assert result.code == 0
    assert result.complaints.splitlines() == [
        f"{Path('weights/ar_state_dict.pt').resolve()} was not trained on conversations: the chat template is new to it"
    ]


@pytest.mark.parametrize(
    "kinds, more, words",
    [
        (("dm",), ["--steps", "3,4", "--gen-steps", "4"], "--gen-steps has no effect without a sampler"),
        (
            ("dm",),
            ["--policies", "threshold,factor", "--steps", "3"],
            "--steps has no effect with --gen-remasking threshold, factor",
        ),
        (("dm",), ["--policies", "random,margin", "--gen-factor", "2"], "--gen-factor has no effect"),
        (("dm",), ["--policies", "random,best"], "--policies: 'best' is not one of low_confidence"),
        (
            ("dm",),
            ["--policies", "margin", "--thresholds", "0.5"],
            "--thresholds has no effect without --gen-remasking threshold",
        ),
        (("dm",), ["--judge", "weights/dm_state_dict.pt"], "--judge weights/dm_state_dict.pt is diffusion"),
        (("ar",), ["--max-new-tokens", "2"], "chats.jsonl: no row has a prompt that leaves room"),
        (("ar",), ["--eval-data", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        ((), [], "--minimind-checkpoint, --diffusion-checkpoint or both"),
    ],
)
def test_what_cannot_be_or_has_no_effect_is_refused(kinds, more, words, argv, refused):
    refused(eval_sft, [*argv(*kinds), *more], words)


@pytest.mark.parametrize("more", [["--gen-factor", "2"], ["--gen-steps", "5"], ["--gen-max-decode-per-step", "3"]])
def test_a_flag_that_one_of_the_samplers_heeds_is_kept(more, argv, command):
    grid = ["--policies", "low_confidence,factor", "--steps", "2", "--prompts-per-language", "1"]
    assert command(eval_sft, [*argv("dm"), *grid, *more]).code == 0
