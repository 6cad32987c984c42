"""Conversations to rows: the template, what is learnt, what is cut, and what the decoder's canvas looks like."""

import gzip
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.content import is_validation
from dataset.conversations import Conversations
from dataset.replies import items_of, shortened
from dataset.rows.formats import messages_of
from dataset.sft import DiffusionSFTData, SFTData, SFTDataset
from dataset.tokenizer import ChatIds, decode, encode_chat, encode_conversations, load_tokenizer, render_chat

ROOT = Path(__file__).parents[2]
GOLDEN = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2 。<|im_end|>"
# Rows of some formats, all the same conversation; tests/dataset/test_formats.py has all of them.
ROWS = {
    "conversations": {"conversations": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2 。"}]},
    "messages": {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2 。"}]},
    "instruction": {"instruction": "1+1?", "input": "", "output": "2 。"},
    "prompt": {"prompt": "1+1?", "response": "2 。"},
}
ASKED_TWICE = {"instruction": "1+1?", "input": "1+1?", "output": "2 。"}
MULTI = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "再见"},
    {"role": "assistant", "content": "Bye."},
    {"role": "user", "content": "?"},
]


GOLDEN_IDS = [1, 360, 214, 32, 26, 32, 46, 2, 214, 1, 362, 214, 33, 236, 285, 2]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ROOT)


@pytest.fixture
def dataset(tmp_path, tokenizer):
    """dataset(rows, all_replies, **flags) -> SFTDataset of a file with these rows, nothing held out by default."""

    def build(rows, all_replies, name="chats.jsonl", block_size=0, **flags):
        path = tmp_path / name
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        if not path.exists():
            path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        config = (SFTData if all_replies else DiffusionSFTData)(
            data=path, cache_dir=tmp_path / "cache", **{"val_fraction": 0.0, **flags}
        )
        return SFTDataset(config, tokenizer, all_replies, rows_per_step=2, block_size=block_size)

    return build


def shown(tokenizer, batch, row=0) -> str:
    """A row as text, what is learnt in brackets; padding left out."""
    pieces, inside = [], False
    ids, scored = batch["input_ids"][row].tolist(), batch["loss_mask"][row].tolist()
    run: list[int] = []
    for token, learnt in [*zip(ids, scored, strict=True), (None, False)]:
        if learnt != inside or token is None:
            pieces.append(decode(tokenizer, run, skip_special=False))
            pieces.append("" if learnt == inside else "[" if learnt else "]")
            run, inside = [], learnt
        if token not in (None, tokenizer.pad_token_id):
            run.append(token)
    return "".join(pieces)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("all_replies", [True, False])
def test_every_format_gives_the_golden_string(name, all_replies, dataset, tokenizer):
    flags = {} if all_replies else {"eos_fill": 0}
    batch = dataset([ROWS[name]], all_replies, **flags).train.batch(np.array([0]))
    assert shown(tokenizer, batch) == GOLDEN.replace("2 。<|im_end|>", "[2 。<|im_end|>]")
    ids = batch["input_ids"][0][batch["input_ids"][0] != tokenizer.pad_token_id].tolist()
    assert ids == GOLDEN_IDS == encode_chat(tokenizer, messages_of(ROWS[name]), False)[:-1]
    assert not batch["fill"].any()


def test_an_instruction_with_input_and_the_fill_give_their_golden_string(dataset, tokenizer):
    batch = dataset([ASKED_TWICE], False, eos_fill=2, max_seq_len=40).train.batch(np.arange(9))
    golden = GOLDEN.replace("1+1?", "1+1?\n1+1?").replace("2 。<|im_end|>", "[2 。<|im_end|>FILL]")
    seen = {shown(tokenizer, batch, row) for row in range(9)}
    assert seen == {golden.replace("FILL", "<|im_end|>" * fill) for fill in range(3)}


def test_autoregressive_rows_learn_every_reply_of_a_conversation_at_once(dataset, tokenizer):
    rows = dataset([{"messages": MULTI}], True).train
    assert len(rows) == 1
    text = render_chat(MULTI[:5], add_generation_prompt=False).rstrip("\n")
    for reply in ("Hello!<|im_end|>", "Bye.<|im_end|>"):
        text = text.replace(reply, f"[{reply}]")
    assert shown(tokenizer, rows.batch(np.array([0]))) == text


def test_diffusion_rows_learn_one_reply_each_and_see_nothing_after_it(dataset, tokenizer):
    rows = dataset([{"messages": MULTI}], False, eos_fill=0).train
    assert len(rows) == 2
    first = render_chat(MULTI[:3], add_generation_prompt=False).rstrip("\n")
    second = render_chat(MULTI[:5], add_generation_prompt=False).rstrip("\n")
    batch = rows.batch(np.array([0, 1]))
    assert shown(tokenizer, batch, 0) == first.replace("Hello!<|im_end|>", "[Hello!<|im_end|>]")
    assert shown(tokenizer, batch, 1) == second.replace("Bye.<|im_end|>", "[Bye.<|im_end|>]")
    assert batch["document_ids"].tolist() == torch.where(batch["input_ids"] == tokenizer.pad_token_id, -1, 0).tolist()


@cache
def load_tokenizer_once():
    return load_tokenizer(ROOT)


# -- rows that are too long ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(16, 64))
def test_an_over_long_row_keeps_the_end_of_its_prompt_and_the_start_of_its_reply(prompt_words, reply_words, length):
    tokenizer = load_tokenizer_once()
    messages = messages_of({"prompt": "one " * prompt_words + "?", "response": "二" * reply_words + "。"})
    whole, ((begin, end),) = encode_conversations(tokenizer, [messages])[0]
    chats = Conversations.of([ChatIds(whole, [(begin, end)])], [0])
    items = shortened(items_of(chats, np.array([0]), length, all_replies=False), length)
    first, middle, last = int(items.begin[0]), int(items.middle[0]), int(items.end[0])
    assert middle == begin and 0 <= first <= middle < last <= end
    assert last - first == min(end, length), "something was thrown away needlessly, or too much was kept"
    assert (items.cut_prompts, items.cut_bodies) == (int(first > 0), int(last < end))
    assert items.num_shortened == int(end > length)
    if first > 0:  # a prompt gives way only to a reply that fills half the row, or that then is whole
        assert last == end or last - middle >= length // 2
    if last < end:
        assert last - middle >= length // 2


def test_the_number_of_shortened_rows_is_reported_and_a_cut_reply_has_no_eos(dataset, tokenizer):
    rows = [ROWS["prompt"], {"prompt": "a", "response": "word " * 80}, {"prompt": "word " * 80, "response": "a"}]
    made = dataset(rows, False, max_seq_len=32, eos_fill=8)
    assert (made.meta["shortened"], made.meta["cut_replies"], made.meta["cut_prompts"]) == (2, 1, 1)
    assert "2 shortened to 32 (1 lost the beginning of the prompt, 1 the end of the reply)" in made.describe()
    cut = made.train.batch(np.array([1]))
    assert cut["input_ids"].shape == (1, 32)
    learnt = cut["input_ids"][0][cut["loss_mask"][0]].tolist()
    assert tokenizer.eos_token_id not in learnt, "a reply that goes on was taught to end"


def test_a_conversation_that_does_not_fit_is_learnt_reply_by_reply(dataset, tokenizer):
    long = [m | {"content": m["content"] + " word" * 6} for m in MULTI]
    whole, apart = (dataset([{"messages": long}], True, name=f"{n}.jsonl", max_seq_len=n).train for n in (512, 40))
    assert (len(whole), len(apart)) == (1, 2)
    assert sum(int(apart.batch(np.array([i]))["loss_mask"].sum()) for i in range(2)) == int(
        whole.batch(np.array([0]))["loss_mask"].sum()
    )


def test_rows_stay_in_the_order_of_the_file_and_one_that_just_fits_stays_whole(dataset, tokenizer):
    long = [m | {"content": m["content"] + " word" * 9} for m in MULTI]
    rows = [ROWS["prompt"], {"messages": long}, {"messages": MULTI}]
    size = len(encode_chat(tokenizer, MULTI[:5], False)) - 1
    for length, parts in ((size, [1, 2, 1]), (size - 1, [1, 2, 2])):
        made = dataset(rows, True, max_seq_len=length).train
        items = made.items(np.arange(len(made)))
        assert [*items.middle] == sorted(items.middle)
        owners = np.searchsorted(made.chats.starts, items.begin, side="right") - 1
        assert np.bincount(owners).tolist() == parts


# -- the canvas ----------------------------------------------------------------------------------------------------


def test_the_fill_is_eos_learnt_and_of_every_length_up_to_the_allowed_one(dataset, tokenizer):
    rows = dataset([ROWS["prompt"]], False, eos_fill=6).train
    fills = []
    for visit in range(400):
        batch = rows.batch(np.array([visit]))
        fill = int(batch["fill"].sum())
        assert shown(tokenizer, batch) == GOLDEN.replace("2 。<|im_end|>", f"[2 。<|im_end|>{'<|im_end|>' * fill}]")
        assert rows.lengths(np.array([visit]))[0] == (batch["document_ids"] == 0).sum()
        fills.append(fill)
    reply = int((batch["loss_mask"] & ~batch["fill"]).sum())
    assert set(fills) == set(range(7))
    # Log-uniform: P(reply + fill < x) = log(x / reply) / log((reply + 7) / reply).
    for fill in range(7):
        expected = np.log((reply + fill + 1) / reply) / np.log((reply + 7) / reply)
        assert abs(np.mean(np.array(fills) <= fill) - expected) < 4 * np.sqrt(0.25 / 400)


@pytest.mark.parametrize("size", [1, 4, 7, 8])
def test_for_blocks_eos_fill_the_replys_last_block_and_nothing_more(size, dataset, tokenizer):
    """Effective length: the least multiple of the block size that holds the row, or all of the row's room."""
    texts = [{"prompt": "2", "response": "2 " * number} for number in range(1, 9)]
    rows = dataset([{"messages": MULTI}, *texts], False, block_size=size, max_seq_len=42).train
    lengths = set()
    for visit in range(len(rows)):
        batch = rows.batch(np.array([visit]))
        effective = int((batch["document_ids"] == 0).sum())
        own = int(rows.items(np.array([visit])).lengths[0])
        assert effective == min(-(-own // size) * size, 42) == rows.lengths(np.array([visit]))[0]
        assert (batch["input_ids"][0, own:effective] == tokenizer.eos_token_id).all()
        assert batch["loss_mask"][0, own:effective].all() and not batch["loss_mask"][0, effective:].any()
        assert batch["fill"][0].nonzero()[:, 0].tolist() == list(range(own, effective))
        lengths.add(effective - own)
    assert size == 1 or len(lengths) > 1


def test_the_fill_stays_within_the_row(dataset):
    rows = dataset([ROWS["prompt"]], False, eos_fill=1000, max_seq_len=22).train
    lengths = rows.lengths(np.arange(500))
    assert lengths.max() == 22 and len(set(lengths.tolist())) > 2
    assert set((dataset([ROWS["prompt"]], False, eos_fill=1).train.fill(np.arange(99))).tolist()) == {0, 1}


def test_a_row_is_the_same_in_any_batch(dataset):
    rows = dataset([ROWS["prompt"], {"messages": MULTI}], False, eos_fill=9).train
    visits = np.array([5, 0, 7, 2])
    together = rows.batch(visits)
    for place, visit in enumerate(visits):
        alone = rows.batch(np.array([visit]))
        for name in ("input_ids", "loss_mask", "document_ids"):
            width = alone[name].shape[1]
            assert torch.equal(together[name][place, :width], alone[name][0]), name


@pytest.mark.parametrize("all_replies", [True, False])
def test_the_reported_share_of_eos_is_that_of_the_targets(all_replies, dataset, tokenizer):
    rows = [ROWS["prompt"], {"messages": MULTI}, {"prompt": "a", "response": "word " * 80}]
    train = dataset(rows, all_replies, max_seq_len=48).train
    batch = train.batch(np.arange(len(train)))
    targets = batch["input_ids"][batch["loss_mask"]]
    assert train.eos_share == pytest.approx(float((targets == tokenizer.eos_token_id).float().mean()))
    real = (batch["input_ids"] != tokenizer.pad_token_id).sum()
    assert train.real_token_share == pytest.approx(float(real) / (len(train) * train.seq_len))


def test_an_empty_reply_teaches_nothing_and_is_counted(dataset):
    made = dataset([{"prompt": "a", "response": ""}, ROWS["prompt"]], True)
    assert len(made.train) == 1 and made.meta["empty_replies"] == 1
    assert "1 empty replies left out" in made.describe()


# -- which rows are held out ---------------------------------------------------------------------------------------


def test_a_conversation_is_held_out_by_its_content_whatever_its_format(dataset):
    rows = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(200)]
    others = [{"messages": messages_of(row)} for row in reversed(rows)]
    held = {
        tuple(made.validation.batch(np.array([i]))["input_ids"][0].tolist())
        for made in (
            dataset(rows, True, "a.jsonl", val_fraction=0.2),
            dataset(others, True, "b.jsonl.gz", val_fraction=0.2),
        )
        for i in range(len(made.validation))
    }
    expected = sum(is_validation(render_chat(messages_of(row), False), 0.2) for row in rows)
    assert 20 < len(held) == expected < 60


def test_of_a_small_file_one_conversation_is_held_out_and_not_trained_on(dataset):
    made = dataset([{"prompt": f"q{i}", "response": "a"} for i in range(5)], True, val_fraction=1e-9)
    assert (len(made.train), len(made.validation)) == (4, 1)
    copies = dataset([{"prompt": f"q{i % 3}", "response": "a"} for i in range(6)], True, "c.jsonl", val_fraction=1e-9)
    assert (len(copies.train), len(copies.validation)) == (4, 2), "a copy of the held-out row is trained on"
    with pytest.raises(ValueError, match="nothing to train on: every reply is empty"):
        dataset([{"prompt": "a", "response": ""}], True, "d.jsonl")
    with pytest.raises(ValueError, match="nothing to train on.*--val-fraction"):
        dataset([ROWS["prompt"], {"prompt": "b", "response": "c"}], True, "b.jsonl", val_fraction=1 - 1e-9)


# -- streaming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("all_replies", [True, False])
def test_a_stream_brings_the_rows_of_the_file_in_its_order_over_and_over(all_replies, dataset, tokenizer):
    rows = [{"prompt": f"q{i}", "response": "a" * (i % 7 + 1)} for i in range(90)] + [{"messages": MULTI}]
    flags = {"val_fraction": 0.1, "max_seq_len": 24} | ({} if all_replies else {"eos_fill": 0})
    stored = dataset(rows, all_replies, "s.jsonl", **flags).train
    stream = dataset(rows, all_replies, "s.jsonl", streaming=True, steps_per_epoch=50, **flags).train
    assert len(stream) == 100

    def texts(source, visits):
        return [shown(tokenizer, source.batch(np.array([v]))) for v in visits]

    # A window is 50 steps of 2 rows, more than the file has: the end of one reading and the start of the next.
    expected = texts(stored, range(len(stored))) * 4
    assert texts(stream, range(100)) == expected[:100]
    assert texts(stream, range(100, 300)) == expected[100:300]
    assert texts(stream, [250, 30]) == [expected[250], expected[30]], "going back reads the file again"
    fresh = dataset(rows, all_replies, "s.jsonl", streaming=True, steps_per_epoch=50, **flags)
    assert texts(fresh.train, [250]) == [expected[250]], "as after a resume"
    whole = dataset(rows, all_replies, "s.jsonl", **flags).validation
    assert texts(fresh.validation, range(len(whole))) == texts(whole, range(len(whole)))
    order = stream.order(1, 2)
    assert sorted(order(0, 100)) == list(range(100)) and order(100, 2).min() >= 100


def test_a_stream_draws_its_fill_anew_and_says_what_it_cut_and_left_out(dataset):
    rows = [ROWS["prompt"], {"prompt": "a", "response": ""}, {"prompt": "a", "response": "word " * 80}]
    flags = {"streaming": True, "steps_per_epoch": 50, "max_seq_len": 40, "eos_fill": 20}
    made = dataset(rows, False, "f.jsonl", **flags)
    assert "50 shortened to 40 (0 lost the beginning of the prompt, 50 the end of the reply)" in made.describe()
    assert "empty replies left out" in made.describe() and made.meta["empty_replies"] == 50
    assert made.meta["data_sha256_of"].startswith("its first "), "a stream's file is not read to its end"
    windows = [made.train.lengths(np.arange(first, first + 100, 2)) for first in (0, 100, 200)]
    assert not np.array_equal(windows[0], windows[1]) and not np.array_equal(windows[1], windows[2])


def test_a_stream_that_is_cut_short_is_refused_before_training(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("dataset.sft.CHUNK_CHARACTERS", 1)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(
        gzip.compress("".join(json.dumps({"prompt": f"q{i}", "response": "a"}) + "\n" for i in range(2000)).encode())[
            :-99
        ]
    )
    with pytest.raises(ValueError, match="cut short; download it again"):
        SFTDataset(SFTData(path, val_fraction=0, streaming=True, steps_per_epoch=1), tokenizer, True, rows_per_step=1)


def test_a_tokenizer_that_pads_with_eos_is_refused(dataset, tokenizer):
    pad = tokenizer.pad_token
    tokenizer.pad_token = tokenizer.eos_token
    try:
        with pytest.raises(ValueError, match="pads with EOS"):
            dataset([ROWS["prompt"]], True)
    finally:
        tokenizer.pad_token = pad


def test_a_stream_needs_its_length():
    with pytest.raises(ValueError, match="--streaming needs --steps-per-epoch"):
        SFTData(streaming=True)


# -- bad rows ------------------------------------------------------------------------------------------------------

BAD = {
    "no format": ({"question": "a"}, "fields present: question"),
    "half a format": ({"instruction": "a"}, "instruction + output"),
    "no list": ({"conversations": "a"}, "expected an array of messages"),
    "no message": ({"messages": []}, "at least one message"),
    "no reply": ({"messages": [{"role": "user", "content": "a"}]}, "no assistant message"),
    "role": ({"messages": [{"role": "robot", "content": "a"}]}, "'robot'"),
    "content": ({"messages": [{"role": "assistant", "content": 3}]}, "expected a string"),
    "output": ({"instruction": "a", "output": None}, "fields present: instruction"),
    "instruction": ({"instruction": None, "output": "a"}, "fields present: output"),
    "input": ({"instruction": "a", "input": 0, "output": "b"}, 'field "input" is a number, expected a string'),
    "prompt": ({"prompt": 3, "response": "b"}, "expected a string"),
    "prompt of strings": ({"prompt": ["a"], "response": "b"}, "is an array of strings"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("flags", [{}, {"streaming": True, "steps_per_epoch": 1, "val_fraction": 0.1}])
def test_a_bad_row_is_named_with_its_file_and_number(kind, flags, dataset):
    row, words = BAD[kind]
    with pytest.raises(ValueError) as told:
        dataset([ROWS["prompt"], ROWS["messages"], row], False, **flags)
    assert "chats.jsonl, row 3: " in str(told.value) and words in str(told.value)


def test_a_small_stream_holds_out_what_the_cached_file_would(dataset, tokenizer):
    rows = [{"prompt": f"q{i % 4}", "response": "a"} for i in range(8)]
    flags = {"val_fraction": 1e-9, "max_seq_len": 24}
    stored = dataset(rows, True, **flags)
    stream = dataset(rows, True, streaming=True, steps_per_epoch=3, **flags)
    held = [
        [shown(tokenizer, r.batch(np.array([i]))) for i in range(2)] for r in (stored.validation, stream.validation)
    ]
    assert held[0] == held[1] and len(stored.validation) == len(stream.validation) == 2
    trained = {shown(tokenizer, stream.train.batch(np.array([i]))) for i in range(60)}
    assert len(trained) == 3 and not trained & set(held[1])
