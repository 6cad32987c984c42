"""scripts.eval.likelihood on conversations: what is scored, given what, and what is not; and its command."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.sft import SFTData, SFTDataset
from dataset.tokenizer import encode, encode_chat
from scripts.engine.likelihood.documents import evaluate_replies
from scripts.engine.likelihood.windows import DataEvalConfig, TextCanvas, reply_windows
from scripts.eval import likelihood
from tests.model.bounds import block_bound, enumerated_bound
from tests.scripts.conftest import sentences
from tests.scripts.likelihood.conftest import QUESTIONS, cost, turns
from tests.scripts.models import ready

KINDS = ["causal", "full"]


CHATS = [
    turns("the cat sees", "my old friend."),
    turns("一只小猫", "看见了老朋友", "the river", "follows the river."),
    turns("a small dog likes", "春天的风"),
]


@pytest.fixture
def chats(file):
    return lambda chats=CHATS, name="chats.jsonl", **more: file([{"conversations": c} for c in chats], name, **more)


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
    windows = reply_windows(tokenizer, chats(), 256, TextCanvas(canvas)).windows
    assert len(windows) == 4
    for window, (given, reply) in zip(windows, replies_of(tokenizer), strict=True):
        fill = max(canvas - len(reply), 0)
        assert window.ids == given + reply + [tokenizer.eos_token_id] * fill
        assert (window.begin, window.fill) == (len(given), fill)


def test_the_canvas_ends_with_the_context_and_replies_beyond_it_are_counted(tokenizer, chats):
    lengths = [(len(given), len(reply)) for given, reply in replies_of(tokenizer)]
    for limit in range(min(map(sum, lengths)), max(map(sum, lengths)) + 20):
        found = reply_windows(tokenizer, chats(), limit, TextCanvas(16))
        fitting = [(given, reply) for given, reply in lengths if given + reply <= limit]
        assert [len(w.ids) for w in found.windows] == [max(g + r, min(g + 16, limit)) for g, r in fitting]
        assert found.too_long == len(lengths) - len(fitting)
        assert found.unfilled == sum(r >= 16 or g + r == limit for g, r in fitting)
        assert sum(c.bytes for c in found.conversations) > 0 and len(found.conversations) <= 3


def test_an_empty_reply_is_left_out_and_counted(tokenizer, chats):
    found = reply_windows(tokenizer, chats([turns("the cat", "", "the river", "likes")]), 256, TextCanvas())
    assert found.empty == 1 and len(found.windows) == 1 and found.conversations[0].bytes == len("likes")


def test_the_four_row_formats_mean_the_same_conversation(tokenizer, file):
    prompt, reply = CHATS[0][0]["content"], CHATS[0][1]["content"]
    rows = [
        {"conversations": CHATS[0]},
        {"messages": CHATS[0]},
        {"instruction": prompt, "input": "", "output": reply},
        {"prompt": prompt, "response": reply},
    ]
    windows = reply_windows(tokenizer, file(rows), 256, TextCanvas(8)).windows
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
    found = reply_windows(tokenizer, config, 256, TextCanvas()).windows
    assert 0 < len(found) < 40 and sorted(w.ids[w.begin :] for w in found) == sorted(expected)


def test_a_limit_on_batches_is_a_sample_of_the_conversations(tokenizer, chats):
    many = [turns(f"{number} the cat", text) for number, text in enumerate(sentences(40))]
    limit = {"eval_batch_size": 3, "eval_max_batches": 4}
    there, back = (
        reply_windows(tokenizer, chats(rows, **limit), 256, TextCanvas()).windows for rows in (many, many[::-1])
    )
    assert len(there) == 12 and [w.ids for w in there] == [w.ids for w in back]


@pytest.mark.parametrize("size", [1, 4, 32])
def test_the_canvas_of_a_block_model_ends_with_the_block_as_in_its_fine_tuning(size, tokenizer, chats):
    """Whatever --canvas says; the blocks are counted from the beginning of the conversation."""
    windows = reply_windows(tokenizer, chats(), 256, TextCanvas(99, size)).windows
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
        found = reply_windows(tokenizer, chats(CHATS[:1]), limit, TextCanvas(0, size))
        assert [len(w.ids) for w in found.windows] == [min(size, limit)]
        assert found.unfilled == (limit == length)
    whole = reply_windows(tokenizer, chats(CHATS[:1]), 256, TextCanvas(0, length))  # the reply ends with its block
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


def canvas_of(kind: str, canvas: int, given: int, reply: int) -> int:
    """Tokens that a model scores for a reply: a block model up to the end of the block, whatever the canvas."""
    attention, _, size = kind.partition(" ")
    if attention == "block":
        return reply + -(given + reply) % int(size)
    return max(canvas, reply) if attention == "full" else reply


@pytest.mark.parametrize(
    "kind, canvas", [("causal", 64), ("full", 0), ("full", 4), ("full", 64), ("block 4", 64), ("block 6", 64)]
)
def test_a_model_that_knows_nothing_pays_for_every_token_of_its_canvas(kind, canvas, tokenizer, chats):
    """By hand, the logarithm of the choices for each, over the tokens and bytes of the replies, alike for all kinds."""
    value = evaluate_replies(ready(tokenizer, kind, uniform=True), chats(), canvas)[0]["all"]
    replies = replies_of(tokenizer)
    paid = sum(canvas_of(kind, canvas, len(given), len(reply)) for given, reply in replies)
    assert value.documents == len(CHATS) and value.tokens == sum(len(reply) for _, reply in replies)
    assert value.bytes == sum(len(message["content"].encode()) for chat in CHATS for message in chat[1::2])
    expected = paid * math.log(len(tokenizer) - (kind != "causal"))
    assert value.nats_per_token * value.tokens == pytest.approx(expected, rel=1e-6)


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
    err = command(likelihood, argv("causal", rows)).err
    assert "rows of chat" in err and "read as conversations; --eval-format text reads the field text" in err
    assert "rows of text" in command(likelihood, argv("causal", rows, "--eval-format", "text")).err
    refused(likelihood, argv("causal", rows, "--eval-format", "choices"), "row 1: expected a question with its choices")


def test_the_chat_template_is_asked_for_or_that_of_the_stage(argv, file, command):
    rows = file(QUESTIONS)
    for stage, flags, words in (
        ("scripts.train.train_pretrain", [], "as plain text"),
        ("scripts.train.train_sft_minimind", [], "in the chat template"),
        ("scripts.train.train_sft_minimind", ["--no-chat-wrap"], "as plain text"),
        ("scripts.train.train_pretrain", ["--chat-wrap"], "in the chat template"),
    ):
        assert words in command(likelihood, argv("causal", rows, *flags, stage=stage)).out


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
    refused(likelihood, argv("causal", data, "--eval-format", "chat"), "a.txt is plain text and has no fields")
    assert "rows of text" in command(likelihood, argv("causal", data)).err
