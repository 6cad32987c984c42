"""scripts.eval.likelihood on conversations and on multiple choice: what is scored, given what, and what is not."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.sft import SFTData, SFTDataset
from dataset.tokenizer import encode, encode_chat
from scripts.engine.likelihood.choices import (
    Accuracy,
    Question,
    _windows_of,
    evaluate_choices,
    question_of,
    read_questions,
)
from scripts.engine.likelihood.documents import evaluate_replies, response_likelihood
from scripts.engine.likelihood.windows import DataEvalConfig, ReplyCanvas, reply_windows
from scripts.engine.prompts import Prompt
from scripts.eval import likelihood
from tests.model.bounds import block_bound, enumerated_bound
from tests.scripts.conftest import sentences
from tests.scripts.models import ready

KINDS = ["causal", "full"]


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


CHATS = [
    turns("the cat sees", "my old friend."),
    turns("一只小猫", "看见了老朋友", "the river", "follows the river."),
    turns("a small dog likes", "春天的风"),
]
QUESTIONS = [
    {"question": "the cat sees", "choices": ["the river.", "my old friend", "那条河"], "answer": 1},
    {"question": "一只小猫", "choices": ["看见了", "喜欢老朋友"], "answer": "A"},
    {"question": "my old friend ", "choices": ["likes", "follows", "remembers the cat"], "answer": "follows"},
]


@pytest.fixture
def file(workspace):
    """file(rows, name, **more) -> the evaluation of a file of these rows."""

    def write(rows, name="rows.jsonl", **more):
        (workspace / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        return DataEvalConfig(eval_data=Path(name), **{"num_samples": 3} | more)

    return write


@pytest.fixture
def chats(file):
    return lambda chats=CHATS, name="chats.jsonl", **more: file([{"conversations": c} for c in chats], name, **more)


def cost(model, ids: list[int], begin: int) -> float:
    """Nats of ids[begin:] by the chain rule, in one plain pass."""
    with torch.no_grad():
        logs = model(torch.tensor([ids]), is_causal=True)[0, :-1].double().log_softmax(-1)
    return -float(logs.gather(1, torch.tensor(ids)[1:, None])[begin - 1 :].sum())


def replies_of(tokenizer, conversations=CHATS) -> list[tuple[list[int], list[int]]]:
    """(all before the reply, the reply and its EOS) in the template, turn by turn."""
    return [
        (encode_chat(tokenizer, chat[:turn], True), [*encode(tokenizer, chat[turn]["content"]), tokenizer.eos_token_id])
        for chat in conversations
        for turn in range(1, len(chat), 2)
    ]


# -- conversations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("canvas", [0, 7, 40])
def test_a_reply_is_scored_after_the_ids_of_the_template_on_a_canvas_of_eos(canvas, tokenizer, chats):
    windows = reply_windows(tokenizer, chats(), 256, ReplyCanvas(canvas)).windows
    assert len(windows) == 4
    for window, (given, reply) in zip(windows, replies_of(tokenizer), strict=True):
        fill = max(canvas - len(reply), 0)
        assert window.ids == given + reply + [tokenizer.eos_token_id] * fill
        assert (window.begin, window.fill) == (len(given), fill)


def test_the_canvas_ends_with_the_context_and_replies_beyond_it_are_counted(tokenizer, chats):
    lengths = [(len(given), len(reply)) for given, reply in replies_of(tokenizer)]
    for limit in range(min(map(sum, lengths)), max(map(sum, lengths)) + 20):
        found = reply_windows(tokenizer, chats(), limit, ReplyCanvas(16))
        fitting = [(given, reply) for given, reply in lengths if given + reply <= limit]
        assert [len(w.ids) for w in found.windows] == [max(g + r, min(g + 16, limit)) for g, r in fitting]
        assert found.too_long == len(lengths) - len(fitting)
        assert found.unfilled == sum(r >= 16 or g + r == limit for g, r in fitting)
        assert sum(c.bytes for c in found.conversations) > 0 and len(found.conversations) <= 3


def test_an_empty_reply_is_left_out_and_counted(tokenizer, chats):
    found = reply_windows(tokenizer, chats([turns("the cat", "", "the river", "likes")]), 256, ReplyCanvas())
    assert found.empty == 1 and len(found.windows) == 1 and found.conversations[0].bytes == len("likes")


def test_the_four_row_formats_mean_the_same_conversation(tokenizer, file):
    prompt, reply = CHATS[0][0]["content"], CHATS[0][1]["content"]
    rows = [
        {"conversations": CHATS[0]},
        {"messages": CHATS[0]},
        {"instruction": prompt, "input": "", "output": reply},
        {"prompt": prompt, "response": reply},
    ]
    windows = reply_windows(tokenizer, file(rows), 256, ReplyCanvas(8)).windows
    assert len(windows) == 4 and {(tuple(w.ids), w.seed, w.begin) for w in windows} == {
        (tuple(windows[0].ids), windows[0].seed, windows[0].begin)
    }


def test_an_ar_model_scores_replies_and_one_eos_each_by_the_chain_rule(tokenizer, chats):
    loaded = ready(tokenizer, "causal")
    found, counts = evaluate_replies(loaded, chats(), 128)
    expected = replies_of(tokenizer)
    nats = sum(cost(loaded.model, given + reply, len(given)) for given, reply in expected)
    value = found["all"]
    assert value.kind == "exact" and value.documents == 3 and value.tokens == sum(len(r) for _, r in expected)
    assert value.nats_per_token * value.tokens == pytest.approx(nats, rel=1e-6)
    size = sum(len(message["content"].encode()) for chat in CHATS for message in chat[1::2])
    assert value.bytes == size and value.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert {name: found[name].documents for name in ("zh", "other")} == {"zh": 2, "other": 1}
    assert all(window.fill == 0 for window in counts.windows)


@pytest.mark.parametrize("canvas", [0, 4, 64])
def test_a_model_that_knows_nothing_pays_for_every_token_of_the_canvas(canvas, tokenizer, chats):
    """By hand: max(canvas, reply + EOS) tokens of ln(V - 1) nats, over the tokens of reply and EOS alone."""
    value = evaluate_replies(ready(tokenizer, "full", uniform=True), chats(), canvas)[0]
    lengths = [len(reply) for _, reply in replies_of(tokenizer)]
    paid = sum(max(canvas, length) for length in lengths) * math.log(len(tokenizer) - 1)
    assert value["all"].tokens == sum(lengths)
    assert value["all"].nats_per_token == pytest.approx(paid / sum(lengths), rel=1e-6)


@pytest.mark.parametrize("canvas", [0, 5])
def test_the_bound_of_a_reply_with_its_canvas_is_the_enumeration_over_all_masks(canvas, tokenizer, chats):
    loaded, config = ready(tokenizer, "full"), chats([turns("the cat", "the river")], num_samples=400)
    ((given, reply),) = replies_of(tokenizer, [turns("the cat", "the river")])
    ids = torch.tensor(given + reply + [tokenizer.eos_token_id] * max(canvas - len(reply), 0))
    assert len(reply) == 3 and len(ids) == len(given) + max(canvas, 3)
    with torch.no_grad():
        exact = enumerated_bound(loaded.model, ids, len(given))
    found = evaluate_replies(loaded, config, canvas)[0]["all"]
    assert found.nats_per_token * 3 == pytest.approx(exact, abs=4.5 * found.mask_standard_error * 3)


@pytest.mark.parametrize("kind", [*KINDS, "block 3"])
def test_neither_batches_nor_order_nor_neighbours_change_a_reply(kind, tokenizer, chats):
    loaded = ready(tokenizer, kind)
    files = [chats(eval_batch_size=size) for size in (1, 3, 100)] + [chats(CHATS[::-1], "reversed.jsonl")]
    first, *others = (evaluate_replies(loaded, f, 12)[0]["all"] for f in files)
    for other in others:
        for field in ("nats_per_token", "standard_error", "mask_standard_error", "bits_per_byte"):
            assert getattr(other, field) == pytest.approx(getattr(first, field), rel=1e-5, abs=1e-9)


def test_the_validation_split_of_conversations_is_what_training_holds_out(tokenizer, chats, workspace):
    many = [turns(f"{number} the cat", text) for number, text in enumerate(sentences(40))]
    config = chats(many, eval_split="validation", val_fraction=0.3)
    trained = SFTDataset(SFTData(data=config.eval_data, val_fraction=0.3), tokenizer, False, 4).validation
    batch = trained.batch(np.arange(len(trained)))
    expected = [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], batch["loss_mask"], strict=True)]
    found = reply_windows(tokenizer, config, 256, ReplyCanvas()).windows
    assert 0 < len(found) < 40 and sorted(w.ids[w.begin :] for w in found) == sorted(expected)


def test_a_limit_on_batches_is_a_sample_of_the_conversations(tokenizer, chats):
    many = [turns(f"{number} the cat", text) for number, text in enumerate(sentences(40))]
    limit = {"eval_batch_size": 3, "eval_max_batches": 4}
    there, back = (
        reply_windows(tokenizer, chats(rows, **limit), 256, ReplyCanvas()).windows for rows in (many, many[::-1])
    )
    assert len(there) == 12 and [w.ids for w in there] == [w.ids for w in back]


@pytest.mark.parametrize("size", [1, 4, 32])
def test_the_canvas_of_a_block_model_ends_with_the_block_as_in_its_fine_tuning(size, tokenizer, chats):
    """Whatever --canvas says; the blocks are counted from the beginning of the conversation."""
    windows = reply_windows(tokenizer, chats(), 256, ReplyCanvas(99, size)).windows
    for window, (given, reply) in zip(windows, replies_of(tokenizer), strict=True):
        fill = -(len(given) + len(reply)) % size
        assert window.ids == given + reply + [tokenizer.eos_token_id] * fill
        assert (window.begin, window.fill) == (len(given), fill) and len(window.ids) % size == 0
    rows = SFTDataset(SFTData(data=chats().eval_data, val_fraction=0.0), tokenizer, False, 4, block_size=size).train
    batch = rows.batch(np.arange(len(rows)))
    learnt = [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], batch["loss_mask"], strict=True)]
    assert sorted(w.ids[w.begin :] for w in windows) == sorted(learnt)


def test_the_context_may_cut_the_last_block(tokenizer, chats):
    (given, reply), size = replies_of(tokenizer)[0], 64
    length = len(given) + len(reply)
    for limit in (length, length + 2, 256):
        found = reply_windows(tokenizer, chats(CHATS[:1]), limit, ReplyCanvas(0, size))
        assert [len(w.ids) for w in found.windows] == [min(size, limit)]
        assert found.unfilled == (limit == length)
    whole = reply_windows(tokenizer, chats(CHATS[:1]), 256, ReplyCanvas(0, length))  # the reply ends with its block
    assert whole.windows[0].fill == whole.unfilled == 0


def test_the_bound_of_a_reply_in_blocks_is_the_enumeration_over_all_masks(tokenizer, chats):
    """Its EOS and those up to the end of the block cost nats and count as one token."""
    loaded, ((given, reply), *_) = ready(tokenizer, "block 4"), replies_of(tokenizer)
    ids = torch.tensor(given + reply + [tokenizer.eos_token_id] * (-(len(given) + len(reply)) % 4))
    with torch.no_grad():
        expected = block_bound(loaded.model, ids, torch.arange(len(ids)) >= len(given))
    found = evaluate_replies(loaded, chats(CHATS[:1]), 128)[0]["all"]
    assert (found.tokens, found.mask_standard_error) == (len(reply), 0)
    assert found.nats_per_token * len(reply) == pytest.approx(expected, rel=1e-5)


def test_every_kind_scores_the_same_tokens_and_bytes(tokenizer, chats):
    """And a model that knows nothing pays for them and the rest of the block."""
    kinds = {kind: ready(tokenizer, kind, uniform=True) for kind in (*KINDS, "block 4", "block 6")}
    found = {kind: evaluate_replies(m, chats(), 64)[0]["all"] for kind, m in kinds.items()}
    assert len({(value.documents, value.tokens, value.bytes) for value in found.values()}) == 1
    for size in (4, 6):
        paid = sum(len(reply) + -(len(given) + len(reply)) % size for given, reply in replies_of(tokenizer))
        value = found[f"block {size}"]
        assert value.nats_per_token * value.tokens == pytest.approx(paid * math.log(len(tokenizer) - 1), rel=1e-6)


# -- multiple choice ---------------------------------------------------------------------------------------------------


def continuations(row: dict) -> tuple[str, list[str]]:
    """By hand, for QUESTIONS: a blank before an English word after an English one, none beside Chinese."""
    joined = {
        "the cat sees": [" the river.", " my old friend", "那条河"],
        "一只小猫": ["看见了", "喜欢老朋友"],
        "my old friend ": [" likes", " follows", " remembers the cat"],
    }
    return row["question"].rstrip(), joined[row["question"]]


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "block 3"])
def test_the_likeliest_choice_is_that_of_an_independent_loop(kind, wrap, tokenizer, file):
    """One choice at a time: for a causal model by the chain rule, for diffusion by the score of one response."""
    loaded, right, right_by_byte = ready(tokenizer, kind), [], []
    for row, answer in zip(QUESTIONS, (1, 0, 1), strict=True):
        prompt, parts = (row["question"], row["choices"]) if wrap else continuations(row)
        given = (
            encode_chat(tokenizer, turns(prompt), True)
            if wrap
            else [tokenizer.bos_token_id, *encode(tokenizer, prompt)]
        )
        if kind == "causal":
            nats = [cost(loaded.model, given + encode(tokenizer, part), len(given)) for part in parts]
        else:
            scores = [response_likelihood(loaded, Prompt(turns(prompt) if wrap else prompt), part, 3) for part in parts]
            nats = [-score["log_likelihood"] for score in scores]
        rates = [n / len(choice.encode()) for n, choice in zip(nats, row["choices"], strict=True)]
        right.append(nats.index(min(nats)) == answer)
        right_by_byte.append(rates.index(min(rates)) == answer)
    for size in (1, 4, 100):
        found, too_long = evaluate_choices(loaded, file(QUESTIONS, eval_batch_size=size), wrap)
        assert too_long == 0 and found["all"].acc == sum(right) / 3 and found["all"].acc_norm == sum(right_by_byte) / 3
        assert found["all"].chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 3) / 3)


@pytest.mark.parametrize(
    "question, choice, given, scored",
    [
        ("the cat", "sees", "the cat", " sees"),
        ("the cat ", "sees", "the cat", " sees"),
        ("the cat\n", "sees", "the cat", "\nsees"),
        ("the cat", " sees", "the cat", " sees"),
        ("the cat.", "看见了", "the cat.", "看见了"),
        ("一只小猫：", "the cat", "一只小猫：", "the cat"),
        ("", "the cat", "", "the cat"),
    ],
)
def test_the_blank_between_question_and_choice_belongs_to_the_choice(question, choice, given, scored, tokenizer):
    row = Question(question, [choice], 0, "other")
    (plain,), (chat,) = (_windows_of(tokenizer, row, 5, wrap) for wrap in (False, True))
    condition = [tokenizer.bos_token_id, *encode(tokenizer, given)]
    assert (plain.ids, plain.begin, plain.fill) == (condition + encode(tokenizer, scored), len(condition), 0)
    assert chat.ids == encode_chat(tokenizer, turns(question), True) + encode(tokenizer, choice)


def test_every_question_is_right_if_the_likeliest_choice_is_the_answer(tokenizer, file):
    """And none if it is another: the outcome follows the answers, question by question."""
    loaded = ready(tokenizer, "causal")
    choices = ["the cat", "the river", "a small dog"]
    rows = [{"question": text, "choices": choices[i % 3 :] + choices[: i % 3]} for i, text in enumerate(sentences(12))]
    for row in rows:
        given = [tokenizer.bos_token_id, *encode(tokenizer, row["question"])]
        nats = [cost(loaded.model, given + encode(tokenizer, " " + choice), len(given)) for choice in row["choices"]]
        row["answer"] = nats.index(min(nats))
    assert len({row["answer"] for row in rows}) > 1
    assert evaluate_choices(loaded, file(rows), False)[0]["all"].acc == 1
    for row in rows:
        row["answer"] = (row["answer"] + 1) % 3
    assert evaluate_choices(loaded, file(rows), False)[0]["all"].acc == 0


def test_a_model_that_knows_nothing_takes_the_fewest_tokens_or_the_fewest_per_byte(tokenizer, file):
    short, dense = "z", "the cat sees the river."  # one token of one byte; few tokens of many bytes
    assert len(encode(tokenizer, " " + short)) <= 2 < len(encode(tokenizer, dense))
    loaded = ready(tokenizer, "causal", uniform=True)
    for answer, expected in ((short, (1, 0)), (dense, (0, 1))):
        rows = [{"question": "a small dog", "choices": [short, dense], "answer": answer}]
        found = evaluate_choices(loaded, file(rows), False)[0]["all"]
        assert (found.acc, found.acc_norm) == expected


@pytest.mark.parametrize("answer, place", [(0, 0), (2, 2), ("A", 0), ("C", 2), ("two", 1), ("three", 2)])
def test_an_answer_is_an_index_a_letter_or_a_text(answer, place):
    assert question_of({"question": "?", "choices": ["one", "two", "three"], "answer": answer}).answer == place


def test_an_answer_that_is_letter_and_text_of_one_choice_is_that_choice():
    assert question_of({"question": "?", "choices": ["A", "B"], "answer": "B"}).answer == 1


def test_questions_are_grouped_by_their_stated_language_else_by_their_letters(workspace, file):
    rows = [QUESTIONS[0] | {"lang": "en"}, QUESTIONS[0], QUESTIONS[1], QUESTIONS[1] | {"lang": None}]
    assert [q.language for q in read_questions(file(rows).eval_data)] == ["en", "other", "zh", "zh"]


def test_the_errors_of_an_accuracy_are_binomial_and_wilsons():
    """The intervals of 0 and 5 of 10 are textbook values (Wilson 1927; Brown, Cai, DasGupta 2001)."""
    found = Accuracy.of("exact", [(4, i < 5, False) for i in range(10)])
    assert found.acc_interval == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert found.acc_norm_interval == pytest.approx((0, 0.2775), abs=1e-4)
    assert (found.acc_error, found.acc_norm_error) == (pytest.approx(math.sqrt(0.025)), 0)


def test_questions_longer_than_the_context_are_left_out_whole_and_counted(tokenizer, file):
    loaded = ready(tokenizer, "causal")
    lengths = []
    for row in QUESTIONS:
        prompt, parts = continuations(row)
        lengths.append(1 + len(encode(tokenizer, prompt)) + max(len(encode(tokenizer, part)) for part in parts))
    for limit in range(min(lengths), max(lengths) + 1):
        found, too_long = evaluate_choices(replace(loaded, max_length=limit), file(QUESTIONS), False)
        assert too_long == sum(length > limit for length in lengths) and found["all"].questions == 3 - too_long
    with pytest.raises(ValueError, match="all 3 questions are longer than --max-seq-len 3"):
        evaluate_choices(replace(loaded, max_length=3), file(QUESTIONS), False)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def argv(saved):
    """argv(kind, data, *more, stage="test"): arguments of an evaluation of the data."""
    return lambda kind, data, *more, **about: saved(kind, "--eval-data", data.eval_data, *more, **about)


@pytest.mark.parametrize("kind", [*KINDS, "block 4"])
def test_the_command_takes_the_format_from_the_first_row(kind, argv, chats, file, command):
    for data, form, key in ((chats(), "chat", "likelihood"), (file(QUESTIONS), "choices", "accuracy")):
        said = command(likelihood, argv(kind, data, "--json", "result.json"))
        assert said.code == 0 and f"rows of {form}" in said.err, said.err
        written = json.loads(Path("result.json").read_text(encoding="utf-8"))
        assert written["format"] == form and {"all", "zh", "other"} == written[key].keys()
        assert {"commit", "data_sha256", "settings", "tokenizer"} <= written.keys()
        if form == "chat":
            unfilled = {} if kind == "causal" else {"unfilled": 0}
            assert written["replies"] == {"scored": 4, "too_long": 0, "empty": 0} | unfilled
            assert said.out.startswith("all: 3 conversations, ") and "4 replies scored; 0 left out" in said.out
        else:
            assert (written["chat_wrap"], written["too_long"]) == (False, 0)
            assert said.out.startswith("all: 3 questions, chance 0.3889: acc ")


def test_the_format_asked_for_is_taken(argv, file, command, refused):
    rows = file([{"text": "the cat", "prompt": "the cat", "response": "sees"}])
    assert "rows of text" in command(likelihood, argv("causal", rows)).err
    assert "rows of chat" in command(likelihood, argv("causal", rows, "--eval-format", "chat")).err
    refused(likelihood, argv("causal", rows, "--eval-format", "choices"), 'row 1: field "question" is missing')


def test_the_chat_template_is_asked_for_or_that_of_the_stage(argv, file, command):
    rows = file(QUESTIONS)
    for stage, flags, words in (
        ("scripts.train.train_pretrain", [], "as plain text"),
        ("scripts.train.train_sft_minimind", [], "in the chat template"),
        ("scripts.train.train_sft_minimind", ["--no-chat-wrap"], "as plain text"),
        ("scripts.train.train_pretrain", ["--chat-wrap"], "in the chat template"),
    ):
        assert words in command(likelihood, argv("causal", rows, *flags, stage=stage)).out


BAD_QUESTIONS = {
    'field "question" is missing': {"choices": ["a", "b"], "answer": 0},
    'field "question" is a number': {"question": 5, "choices": ["a", "b"], "answer": 0},
    'field "choices" is missing; fields present: question, answer': {"question": "?", "answer": 0},
    'field "choices" is a string, expected an array': {"question": "?", "choices": "ab", "answer": 0},
    "expected at least 2 choices, found 0": {"question": "?", "choices": [], "answer": 0},
    "choice 2 is empty": {"question": "?", "choices": ["a", " "], "answer": 0},
    "choice 1 is a number": {"question": "?", "choices": [1, "b"], "answer": 0},
    "two choices are the same": {"question": "?", "choices": ["a", "a"], "answer": 0},
    'field "answer" is missing': {"question": "?", "choices": ["a", "b"]},
    "answer 2 is out of range, expected 0 to 1": {"question": "?", "choices": ["a", "b"], "answer": 2},
    "answer -1 is out of range": {"question": "?", "choices": ["a", "b"], "answer": -1},
    'answer "C" is none of the choices': {"question": "?", "choices": ["a", "b"], "answer": "C"},
    "answer is a boolean": {"question": "?", "choices": ["a", "b"], "answer": True},
    "is one choice's letter and another's text": {"question": "?", "choices": ["B", "A"], "answer": "A"},
}


@pytest.mark.parametrize("words", BAD_QUESTIONS)
def test_a_bad_question_is_named_by_file_and_row(words, argv, file, refused):
    refused(likelihood, argv("full", file([QUESTIONS[0], BAD_QUESTIONS[words]])), "rows.jsonl, row 2: ", words)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"conversations": []}, "at least one message"),
        ({"conversations": turns("no reply")}, "no assistant message"),
        ({"instruction": "a"}, "fields present: instruction"),
    ],
)
def test_a_bad_conversation_is_named_by_file_and_row(row, words, argv, file, refused):
    rows = file([{"conversations": CHATS[0]}, row])
    refused(likelihood, argv("full", rows), "rows.jsonl, row 2: ", words)


@pytest.mark.parametrize(
    "kind, rows, flags, words",
    [
        ("causal", "chats", ["--canvas", "9"], "--canvas has no effect without a diffusion model"),
        ("full", "questions", ["--canvas", "9"], "--canvas has no effect without conversations"),
        ("block 4", "chats", ["--canvas", "9"], "--canvas has no effect without a model of whole rows: a block ends"),
        ("block 4", "questions", ["--nmc", "3"], "--num-samples has no effect without masks to be drawn"),
        ("full", "chats", ["--chat-wrap"], "--chat-wrap has no effect without multiple choice"),
        ("full", "chats", ["--jsonl-field", "x"], "--jsonl-field has no effect without rows of text"),
        ("full", "questions", ["--eval-split", "validation"], "--eval-split has no effect with"),
        ("causal", "questions", ["--nmc", "3"], "--num-samples has no effect without a diffusion model"),
        ("causal", "chats", ["--max-seq-len", "8"], "4 do not fit --max-seq-len 8"),
    ],
)
def test_flags_without_effect_and_files_without_anything_to_score(kind, rows, flags, words, argv, chats, file, refused):
    refused(likelihood, argv(kind, chats() if rows == "chats" else file(QUESTIONS), *flags), words)


def test_a_text_file_holds_neither_conversations_nor_choices(argv, workspace, refused, command):
    Path("a.txt").write_text("the cat sees the river.", encoding="utf-8")
    data = DataEvalConfig(eval_data=Path("a.txt"))
    refused(likelihood, argv("causal", data, "--eval-format", "chat"), "a.txt has no fields")
    assert "rows of text" in command(likelihood, argv("causal", data)).err
