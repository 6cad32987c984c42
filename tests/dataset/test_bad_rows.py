"""Rows that cannot be used: refused, or left out and counted, by every reader alike."""

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest

from dataset.preferences import PreferenceData, PreferenceDataset
from dataset.pretrain import PretrainData, PretrainDataset
from dataset.reading.bad_rows import BadRow, BadRows
from dataset.reading.documents import read_documents
from dataset.sft import SFTData, SFTDataset
from dataset.survey import Survey
from dataset.tokenizer import decode, train_characters
from tests.dataset.test_mutated_rows import check_file

SOUND = {
    "text": {"text": "one"},
    "chat": {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]},
    "pairs": {"prompt": "1+1?", "chosen": "2", "rejected": "3"},
}


def opened(kind, path, tokenizer, **flags):
    """The dataset of a file."""
    flags = {"data": path, "cache_dir": path.parent / "cache", "val_fraction": 0.0, **flags}
    if kind == "text":
        return PretrainDataset(PretrainData(**flags), tokenizer)
    if kind == "chat":
        return SFTDataset(SFTData(**flags), tokenizer, all_replies=True, rows_per_step=2)
    return PreferenceDataset(PreferenceData(**flags), tokenizer, "full", 0)


def with_content(kind: str, content: bytes) -> bytes:
    """The sound row, the content of its first field of text being this JSON."""
    return json.dumps(SOUND[kind]).encode().replace(b'"1+1?"' if kind != "text" else b'"one"', content, 1)


CONTENTS = {  # JSON where a string should be, and whether it is one
    "NUL": (rb'"a\u0000b"', True),
    "raw NUL": (b'"a\0b"', False),
    "half a surrogate pair": (rb'"\ud83d"', False),
    "a surrogate pair": (rb'"\ud83d\ude42"', True),
    "raw half of a pair": (b'"\xed\xa0\xbd"', False),
    "a byte order mark": (b'"\xef\xbb\xbf"', True),
    "a raw line break": (b'"a\rb"', False),
    "a line break": (rb'"a\r\nb"', True),
    "number": (b"7", False),
    "null": (b"null", False),
    "deep": (b"[" * 100_000 + b"]" * 100_000, False),
    "huge number": (b"1" * 5000, False),
    "control tokens": (b'"<|im_end|><|mask|><|endoftext|>"', True),
}


@pytest.mark.parametrize("kind", SOUND)
@pytest.mark.parametrize("name", CONTENTS)
def test_what_a_string_may_hold(name, kind, tmp_path, small):
    content, sound = CONTENTS[name]
    row = json.dumps(SOUND[kind]).encode()
    data = b"\r\n".join([row, with_content(kind, content), row])
    assert check_file(tmp_path / "rows.jsonl", data, kind, small) == (3, int(not sound))
    assert check_file(tmp_path / "mark.jsonl.gz", b"\xef\xbb\xbf" + data, kind, small) == (3, int(not sound))


ROWS = {
    "a key twice": ("text", b'{"text": "a", "text": "a"}'),
    "a key twice, within": ("chat", b'{"prompt": "a", "response": "b", "more": {"x": [{"y": 1, "y": 2}]}}'),
    "a role twice": ("chat", b'{"messages": [{"role": "user", "role": "assistant", "content": "b"}]}'),
    "empty conversation": ("chat", b'{"messages": []}'),
    "no reply": ("chat", b'{"messages": [{"role": "user", "content": "a"}]}'),
    "unknown role": ("chat", b'{"messages": [{"role": "robot", "content": "a"}]}'),
    "a role that is a list": ("chat", b'{"messages": [{"role": ["user"], "content": "a"}]}'),
    "empty pair": ("pairs", b'{"chosen": [], "rejected": []}'),
    "unknown role in a pair": (
        "pairs",
        b'{"prompt": "a", "chosen": {"role": "r", "content": "b"}, "rejected": "c"}',
    ),
    "a chosen twice": ("pairs", b'{"prompt": "a", "chosen": "b", "chosen": "b", "rejected": "c"}'),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_is_bad_for_every_reader_and_for_the_check(name, tmp_path, small):
    kind, row = ROWS[name]
    sound = json.dumps(SOUND[kind]).encode()
    assert check_file(tmp_path / "rows.jsonl", b"\n".join([sound, row, b"", sound, row]), kind, small) == (4, 2)


@pytest.mark.slow
def test_a_row_of_ten_megabytes_is_a_row(tmp_path, small):
    """Also in a field that is not read: tokenising as much takes seconds."""
    text = "the river " * 1_000_000
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": text}), encoding="utf-8")
    assert list(read_documents(path)) == [text]
    path.write_text(json.dumps({"text": "one", "more": text}) + '\n{"text": "' + text + "\n", encoding="utf-8")
    with pytest.raises(BadRow, match="row 2: not valid JSON at column 10 ") as refused:
        opened("text", path, small)
    assert len(str(refused.value)) < 400
    made = opened("text", path, small, on_bad_row="skip")
    assert decode(small, made.train.split.tokens[1:-1]) == "one"
    assert Survey([path], "text", small, 16).result["bad_rows"] == 1


@pytest.mark.parametrize("kind", SOUND)
def test_more_blanks_in_a_row_than_can_be_cut_are_a_bad_row(kind, tmp_path, small, monkeypatch):
    """Ten million end the tokenizer by a panic, which no `except Exception` sees."""
    monkeypatch.setattr("dataset.spelling.MAX_BLANKS", 50)
    path, row = tmp_path / "a.jsonl", json.dumps(SOUND[kind]).encode()
    lines = [
        with_content(kind, json.dumps(text).encode()) for text in ("a" + " \n" * 25, "a" + "\u3000" * 51, "a " * 99)
    ]
    path.write_bytes(b"\n".join([row, *lines]))
    with pytest.raises(BadRow, match="row 3: the text has more than 50 blank characters in a row"):
        opened(kind, path, small)
    made = opened(kind, path, small, on_bad_row="skip")
    assert made.meta["skipped_rows"] == Survey([path], kind, small, 16).result["bad_rows"] == 1


@pytest.mark.parametrize("kind", SOUND)
def test_a_damaged_file_is_refused_where_bad_rows_are_skipped(kind, tmp_path, small):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(SOUND[kind]) + "\n").encode() * 9)[:-9])
    for read in (lambda: opened(kind, path, small, on_bad_row="skip"), lambda: Survey([path], kind, small, 16)):
        with pytest.raises(ValueError, match="cut short; download it again") as refused:
            read()
        assert not isinstance(refused.value, BadRow)


# -- what is said about them -------------------------------------------------------------------------------------------

READERS = [*((kind, {}) for kind in SOUND), ("chat", {"streaming": True, "steps_per_epoch": 9})]


@pytest.fixture
def spoiled(tmp_path):
    """spoiled(kind) -> a file of which rows 2 and 4 are bad, and row 5 is blank."""

    def write(kind):
        row = json.dumps(SOUND[kind])
        (tmp_path / f"{kind}.jsonl").write_text(f"{row}\n{{\n{row}\n[]\n\n{row}\n", encoding="utf-8")
        return tmp_path / f"{kind}.jsonl"

    return write


@pytest.mark.parametrize("kind, flags", READERS)
def test_what_was_skipped_is_in_the_description_and_in_the_log(kind, flags, spoiled, small, capfd):
    path = spoiled(kind)
    with pytest.raises(BadRow, match="row 2: not valid JSON"):
        opened(kind, path, small, **flags)
    made = opened(kind, path, small, on_bad_row="skip", **flags)
    assert made.meta["skipped_rows"] == 2 and json.loads(json.dumps(made.meta)) == made.meta
    assert [told[:7] for told in made.meta["skipped_first"]] == ["row 2: ", "row 4: "]
    last = made.describe().splitlines()[-1]
    assert last.startswith("2 bad rows skipped: row 2: not valid JSON at column 2 (") and "; row 4: expected an" in last
    if flags:  # a stream reads over and over again, and counts every row once
        made.train.batch(np.array([500]))
        assert made.meta["skipped_rows"] == 2 and capfd.readouterr().err.count("so far") == 2
    elif kind == "text":
        assert made.meta["rows"] == made.meta["train_documents"] + made.meta["empty_rows"] + 2 == 5


@pytest.mark.parametrize("kind", SOUND)
def test_a_cache_without_the_bad_rows_is_no_cache_of_the_file(kind, spoiled, small, capfd):
    path = spoiled(kind)
    again = [opened(kind, path, small, on_bad_row="skip").meta for _ in range(2)]
    assert again[0] == again[1] and capfd.readouterr().err.count("tokenised") == 1
    with pytest.raises(BadRow):
        opened(kind, path, small)


@pytest.mark.parametrize("kind, flags", READERS)
def test_a_file_of_bad_rows_alone_is_refused(kind, flags, tmp_path, small):
    (tmp_path / "a.jsonl").write_text("\n{\n[]\n")
    with pytest.raises(ValueError, match="no row that can be used; the first: row 2: not valid JSON"):
        opened(kind, tmp_path / "a.jsonl", small, on_bad_row="skip", **flags)
    assert Survey([tmp_path / "a.jsonl"], kind, small, 16).result["bad_rows"] == 2


def test_of_bad_and_empty_rows_nothing_is_left(tmp_path, small):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n[]\n')
    with pytest.raises(ValueError, match="nothing to train on: all 2 rows are empty or bad"):
        opened("text", tmp_path / "a.jsonl", small, on_bad_row="skip")


def test_many_bad_rows_are_counted_and_the_first_five_told(tmp_path, small):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + "[]\n" * 1234)
    made = opened("text", tmp_path / "a.jsonl", small, on_bad_row="skip")
    assert made.meta["skipped_rows"] == 1234 and len(made.meta["skipped_first"]) == 5
    assert made.describe().endswith("; ...") and "1,234 bad rows skipped: row 2: " in made.describe()


def test_a_bad_line_of_a_text_file_is_left_out_of_its_document(tmp_path, small):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xff\none\ntw\xe9o\nthree\n")
    with pytest.raises(BadRow, match="row 1: not UTF-8"):
        list(read_documents(path))
    bad = BadRows("skip")
    assert list(read_documents(path, bad=bad)) == ["one\nthree\n"]
    assert [told[:17] for told in bad.first] == ["row 1: not UTF-8 ", "row 3: not UTF-8 "]
    (tmp_path / "b.txt").write_bytes(b"\xff\n\xff")
    with pytest.raises(ValueError, match="no row that can be used"):
        list(read_documents(tmp_path / "b.txt", bad=BadRows("skip")))
    assert Survey([path], "text", small, 16).result["bad_rows"] == 2


@pytest.mark.parametrize("kind", SOUND)
def test_a_row_that_the_tokenizer_cannot_spell_is_a_bad_row(kind, tmp_path):
    tokenizer = train_characters(["1+1?23 one\nsystemusrai"])
    path = tmp_path / "a.jsonl"
    row = json.dumps(SOUND[kind])
    path.write_bytes(f"{row}\n".encode() + with_content(kind, '"Ω"'.encode()) + f"\n[]\n{row}".encode())
    with pytest.raises(BadRow, match="row 2: character 'Ω'"):
        opened(kind, path, tokenizer)
    made = opened(kind, path, tokenizer, on_bad_row="skip")
    assert made.meta["skipped_rows"] == Survey([path], kind, tokenizer, 16).result["bad_rows"] == 2
    assert len(made.train) == (1 if kind == "text" else 2)


# -- text that spells control tokens -----------------------------------------------------------------------------------

NAMES = "<|im_start|>user\n<|im_end|><|endoftext|><|mask|><|delete|><|buffer9|>"


@pytest.mark.parametrize("kind", SOUND)
def test_text_that_spells_control_tokens_stays_text(kind, tmp_path, small):
    path = tmp_path / "a.jsonl"
    path.write_bytes(with_content(kind, json.dumps(NAMES).encode()))
    batch = opened(kind, path, small).train.batch(np.array([0]))
    ids = batch["input_ids"][0][batch["input_ids"][0] != small.pad_token_id].tolist()
    counts = [ids.count(i) for i in (small.bos_token_id, small.eos_token_id)]
    assert counts == {"text": [1, 1], "chat": [2, 2], "pairs": [2, 2]}[kind]
    assert sum(i < 16 for i in ids) == sum(counts)
    assert NAMES in decode(small, ids)


def control_ids(tmp_path, tokenizer, text, suffix=".jsonl", **flags):
    path = tmp_path / f"a{suffix}"
    path.write_text(json.dumps({"text": text}) if suffix == ".jsonl" else text, encoding="utf-8")
    config = PretrainData(data=path, cache_dir=tmp_path / "cache", val_fraction=0.0, control_tokens=True)
    return PretrainDataset(replace(config, **flags), tokenizer)


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_where_asked_documents_hold_the_control_tokens_that_they_spell(suffix, tmp_path, small, characters):
    text = "the<|im_end|><|im_start|>river<|delete|>"
    for tokenizer in (small, characters):
        made = control_ids(tmp_path, tokenizer, text, suffix)
        batch = made.train.batch(np.array([0]))
        ids = batch["input_ids"][0][batch["loss_mask"][0]].tolist()
        control = [tokenizer.convert_ids_to_tokens(i) for i in ids if i < 16]
        assert control == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|delete|>", "<|im_end|>"]
        assert decode(tokenizer, ids[1:-1], skip_special=False) == text
        assert set(batch["document_ids"][0].tolist()) <= {0, -1} and made.meta["train_documents"] == 1
        plain = control_ids(tmp_path, tokenizer, "the river", suffix, control_tokens=False)
        assert plain.meta["train_documents"] == 1


@pytest.mark.parametrize("name", ["<|mask|>", "<|endoftext|>"])
def test_a_document_that_would_hold_the_mask_or_padding_is_a_bad_row(name, tmp_path, small):
    path = tmp_path / "a.txt"
    path.write_text(f"one\ntwo {name}\nthree\n")
    with pytest.raises(BadRow, match="row 2: the text spells .* cannot be learnt.*--control-tokens"):
        opened("text", path, small, control_tokens=True)
    made = opened("text", path, small, control_tokens=True, on_bad_row="skip")
    assert decode(small, made.train.split.tokens[1:-1]) == "one\nthree\n"
    assert decode(small, opened("text", path, small).train.split.tokens[1:-1]) == path.read_text()


def test_a_cache_with_control_tokens_is_another_one(tmp_path, small):
    text = "the<|im_end|>river"
    lengths = [
        len(control_ids(tmp_path, small, text, control_tokens=flag).train.split.tokens) for flag in (True, False, True)
    ]
    assert lengths[0] == lengths[2] < lengths[1]
