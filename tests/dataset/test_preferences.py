"""Pairs to rows: the formats, what the replies share, what is cut or left out, and who is held out."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.content import is_validation
from dataset.preferences import PreferenceData, PreferenceDataset
from dataset.rows.pair_formats import pair_of
from dataset.tokenizer import load_tokenizer, render_chat
from tests.dataset.test_sft import shown

ROOT = Path(__file__).parents[2]
ASKED, GOOD, BAD_REPLY = (
    {"role": r, "content": c} for r, c in (("user", "1+1?"), ("assistant", "2 。"), ("assistant", "3"))
)
# One row of each format, all the same pair.
ROWS = {
    "conversations": {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD_REPLY]},
    "conversations beside other fields": {"prompt": "?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD_REPLY]},
    "prompt": {"prompt": "1+1?", "chosen": "2 。", "rejected": "3"},
    "messages": {"messages": [ASKED], "chosen": "2 。", "rejected": "3"},
    "messages and messages": {"messages": [ASKED], "chosen": GOOD, "rejected": BAD_REPLY},
}
PROMPT = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ROOT)


@pytest.fixture
def dataset(tmp_path, tokenizer):
    """dataset(rows, attention, block_size, **flags) -> PreferenceDataset of a file with these rows, none held out."""

    def build(rows, attention="full", block_size=0, name="pairs.jsonl", **flags):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        config = PreferenceData(data=tmp_path / name, cache_dir=tmp_path / "cache", **{"val_fraction": 0.0, **flags})
        return PreferenceDataset(config, tokenizer, attention, block_size)

    return build


def pair(question, chosen, rejected):
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize("name", ROWS)
def test_every_format_is_the_same_pair_of_which_the_replies_and_their_eos_are_scored(name, dataset, tokenizer):
    batch = dataset([ROWS[name]], name="pairs.jsonl.gz").train.batch(np.array([0]))
    assert [shown(tokenizer, batch, row) for row in (0, 1)] == [f"{PROMPT}[2 。<|im_end|>]", f"{PROMPT}[3<|im_end|>]"]
    visible = (batch["input_ids"] != tokenizer.pad_token_id).long() - 1
    assert torch.equal(batch["document_ids"], visible)


def test_of_a_conversation_the_last_reply_alone_is_compared(dataset, tokenizer):
    made = dataset([{"messages": [ASKED, GOOD, ASKED], "chosen": "b", "rejected": "c"}], "causal").train
    batch = made.batch(np.array([0]))
    earlier = f"{PROMPT}2 。<|im_end|>\n{PROMPT}"
    assert [shown(tokenizer, batch, row) for row in (0, 1)] == [f"{earlier}[b<|im_end|>]", f"{earlier}[c<|im_end|>]"]
    assert "document_ids" not in batch


@pytest.mark.parametrize("block_size", [4, 32])
def test_a_block_goes_on_as_mask_behind_the_reply_to_its_end(block_size, dataset, tokenizer):
    """Not as EOS, which would tell the decoder where the reply ends; nor beyond the row."""
    made = dataset([pair("a", "b c d e", "b"), pair("a", "word " * 99, "b")], "block", block_size, max_seq_len=62)
    plain = dataset([pair("a", "b c d e", "b"), pair("a", "word " * 99, "b")], max_seq_len=62).train
    for index in range(2):
        batch, bare = made.train.batch(np.array([index])), plain.batch(np.array([index]))
        for row in range(2):
            end = int(bare["document_ids"][row].eq(0).sum())
            canvas = min(end + -end % block_size, 62)
            assert torch.equal(batch["input_ids"][row, :end], bare["input_ids"][row, :end])
            assert (batch["input_ids"][row, end:canvas] == tokenizer.mask_token_id).all()
            assert int(batch["document_ids"][row].eq(0).sum()) == canvas
            assert torch.equal(batch["loss_mask"][row].nonzero(), bare["loss_mask"][row].nonzero())


def test_a_pair_is_the_same_in_any_batch_and_on_any_visit(dataset):
    rows = dataset([pair(f"q{i}", "a" * (i + 1), "b " * (9 - i)) for i in range(4)]).train
    visits = np.array([5, 0, 7, 2])
    together = rows.batch(visits)
    for place, visit in enumerate(visits):
        alone = rows.batch(np.array([visit % 4]))
        for name, tensor in alone.items():
            width = tensor.shape[1]
            assert torch.equal(together[name][[place, 4 + place], :width], tensor), name
        assert rows.lengths(np.array([visit]))[0] == alone["document_ids"].eq(0).sum(dim=1).max()
    share = together["document_ids"].eq(0).sum() / 4 / rows.seq_len
    assert rows.real_token_share == pytest.approx(float(share))
    assert sorted(v % 4 for v in rows.order(1, 2)(0, 4)) == [0, 1, 2, 3]


# -- what is cut and what is left out ------------------------------------------------------------------------------


def test_what_is_too_long_loses_the_beginning_of_the_prompt_and_then_the_end_of_the_replies(dataset, tokenizer):
    """Both replies stand behind the same end of the prompt."""
    long = "word " * 80
    made = dataset(
        [ROWS["prompt"], pair(long, "a", "b c d"), pair("a", long, long + "b"), pair(long, f"b {long}", "c")],
        max_seq_len=32,
    )
    assert (made.meta["shortened"], made.meta["cut_prompts"], made.meta["cut_replies"]) == (3, 2, 2)
    assert made.meta["equal_replies"] == 1 and len(made.train) == 3
    assert "1 of equal replies left out" in made.describe() and "3 shortened to 32" in made.describe()
    for index in (1, 2):
        batch = made.train.batch(np.array([index]))
        sides = zip(batch["input_ids"], batch["loss_mask"], strict=True)
        prompts = [ids[: int(scored.nonzero()[0])].tolist() for ids, scored in sides]
        assert prompts[0] == prompts[1] and batch["input_ids"].shape[1] == 32
        if index == 1:
            assert shown(tokenizer, batch, row=1).endswith("[b c d<|im_end|>]"), "the longer reply decides what is cut"
    cut = shown(tokenizer, batch)
    assert cut.endswith("word]") and "<|im_end|>]" not in cut, "a reply that goes on was taught to end"


def test_equal_replies_are_left_out_and_nothing_else_is_no_data(dataset):
    assert len(dataset([pair("a", "b", "b"), ROWS["prompt"]]).train) == 1
    with pytest.raises(ValueError, match="nothing to train on: of 2 pairs, 0 are held out.*both replies are the same"):
        dataset([pair("a", "b", "b"), pair("c", "b", "b")], name="b.jsonl")
    with pytest.raises(ValueError, match="nothing to train on: of 1 pairs, 1 are held out"):
        dataset([ROWS["prompt"]], name="c.jsonl", val_fraction=1 - 1e-9)


# -- who is held out -----------------------------------------------------------------------------------------------


def test_no_prompt_is_on_both_sides_and_fine_tunings_validation_is_held_out(dataset):
    """Each prompt comes with three pairs; their chosen conversations are hashed as fine-tuning hashes them."""
    rows = [pair(f"question {i // 3}", f"answer {i}", "no") for i in range(150)]
    made = dataset(rows, "causal", val_fraction=0.1)

    def prompts(part):
        batches = (part.batch(np.array([i])) for i in range(len(part)))
        return [tuple(b["input_ids"][0, : int(b["loss_mask"][0].nonzero()[0])].tolist()) for b in batches]

    train, held = prompts(made.train), prompts(made.validation)
    assert not set(train) & set(held) and len(train) + len(held) == 150 and len(held) % 3 == 0
    own = [
        is_validation(render_chat([*p.prompt, {"role": "assistant", "content": p.chosen}], False), 0.1)
        for p in map(pair_of, rows)
    ]
    expected = {i // 3 for i, held_out in enumerate(own) if held_out}
    assert len(held) == 3 * len(expected) and 0 < len(expected) < 40


def test_of_a_small_file_one_prompt_is_held_out_where_there_are_two(dataset):
    made = dataset([pair(f"q{i % 3}", f"a{i}", "b") for i in range(6)], val_fraction=1e-9)
    assert (len(made.train), len(made.validation)) == (4, 2)
    alone = dataset([pair("q", f"a{i}", "b") for i in range(6)], val_fraction=1e-9)
    assert (len(alone.train), len(alone.validation)) == (6, 0)


# -- bad rows ------------------------------------------------------------------------------------------------------

BAD = {
    "one reply": ({"prompt": "a", "chosen": "b"}, "expected the fields of a pair"),
    "no prompt": ({"chosen": "b", "rejected": "c"}, "without a prompt"),
    "two prompts": (
        {"chosen": [ASKED, GOOD], "rejected": [{"role": "user", "content": "2+2?"}, GOOD]},
        "differ before their last message",
    ),
    "two lengths": ({"chosen": [ASKED, GOOD], "rejected": [ASKED, GOOD, ASKED, GOOD]}, "differ before"),
    "reply alone": ({"chosen": [GOOD], "rejected": [BAD_REPLY]}, "prompt must be a conversation"),
    "question last": ({"chosen": [ASKED] * 2, "rejected": [ASKED] * 2}, "role 'user'; expected the assistant's reply"),
    "mixed": ({"chosen": [ASKED, GOOD], "rejected": "3"}, 'field "rejected" is a string'),
    "empty": ({"chosen": [], "rejected": []}, "chosen: a conversation needs at least one message"),
    "reply": ({"prompt": "a", "chosen": 3, "rejected": "c"}, 'field "chosen" is a number'),
    "prompt": ({"prompt": 3, "chosen": "b", "rejected": "c"}, 'field "prompt" is a number, expected a string'),
    "prompt of strings": ({"prompt": ["a"], "chosen": "b", "rejected": "c"}, "is an array of strings"),
    "messages": ({"messages": "a", "chosen": "b", "rejected": "c"}, 'field "messages" is a string'),
    "answered": ({"messages": [ASKED, GOOD], "chosen": "b", "rejected": "c"}, "ends before the assistant's reply"),
    "role": ({"messages": [{"role": "robot", "content": ""}], "chosen": "b", "rejected": "c"}, "'robot'"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_named_with_its_file_and_number(kind, dataset):
    row, words = BAD[kind]
    with pytest.raises(ValueError) as told:
        dataset([ROWS["prompt"], ROWS["messages"], row])
    assert "pairs.jsonl, row 3: " in str(told.value) and words in str(told.value)
