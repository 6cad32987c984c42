"""The token cache holds the corpus exactly, and rows cut it without losing or adding a token."""

import gzip
import hashlib
import json
import os

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from dataset import tokenise
from dataset.content import content_hash, is_validation
from dataset.pretrain import DocumentFill, DocumentTokeniser, PackedRows, PretrainData, TokenSplit
from dataset.reading.documents import read_documents
from dataset.tokenizer import encode, train_characters
from model.block_diffusion import block_starts

ALPHABET = "abc 中文\n🙂"
PAD = 0


@pytest.fixture(scope="module")
def tokenizer():
    return train_characters([ALPHABET + "0123456789|document"])


def write_texts(path, texts, **more):
    data = "".join(json.dumps({"text": text, **more}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def documents_of(split):
    """The stream cut at its starts, as lists of ids."""
    return [part.tolist() for part in np.split(np.asarray(split.tokens), split.starts[1:])] if len(split.starts) else []


def expected(tokenizer, texts):
    return [[tokenizer.bos_token_id, *encode(tokenizer, text), tokenizer.eos_token_id] for text in texts]


def build(path, tokenizer, **flags):
    """(train, validation, meta)"""
    streams, meta = DocumentTokeniser(PretrainData(data=path, **flags), tokenizer).streams(path.parent / "cache")
    return streams["train"], streams["validation"], meta


def split_of(lengths):
    """A stream of documents of these lengths; every token is its own position in the stream, plus 1."""
    starts = np.cumsum([0, *lengths])[:-1].astype(np.int64)
    return TokenSplit(np.arange(1, sum(lengths) + 1, dtype=np.uint16), starts)


# Rows


lengths = st.lists(st.integers(2, 40), min_size=1, max_size=12)


@given(lengths, st.integers(1, 17), st.booleans())
def test_every_token_is_in_exactly_one_row_and_in_order(lengths, seq_len, packed):
    rows = PackedRows(split_of(lengths), seq_len, packed, PAD)
    batch = rows.batch(np.arange(len(rows)))
    real = batch["loss_mask"]
    assert batch["input_ids"].shape == real.shape == batch["document_ids"].shape == (len(rows), seq_len)
    assert batch["input_ids"][real].tolist() == list(range(1, sum(lengths) + 1))
    assert (batch["input_ids"][~real] == PAD).all()
    assert rows.real_token_share == pytest.approx(real.double().mean().item())
    assert real[:, 0].all()  # no row of padding alone
    assert (real[:, 1:] <= real[:, :-1]).all()  # padding only at the end


@given(lengths, st.integers(1, 17), st.booleans())
def test_document_ids_count_the_documents_of_a_row(lengths, seq_len, packed):
    owner_of_token = np.repeat(np.arange(len(lengths)), lengths)
    rows = PackedRows(split_of(lengths), seq_len, packed, PAD)
    batch = rows.batch(np.arange(len(rows)))
    for ids, real, documents in zip(*batch.values(), strict=True):
        owners = owner_of_token[ids[real].numpy() - 1]
        _, numbered = np.unique(owners, return_inverse=True)
        assert documents[real].tolist() == numbered.tolist()
        assert (documents[~real] == -1).all()
        if not packed:
            assert len(set(owners)) == 1


@given(lengths, st.integers(1, 17))
def test_only_the_last_packed_row_has_padding(lengths, seq_len):
    rows = PackedRows(split_of(lengths), seq_len, True, PAD)
    real = rows.batch(np.arange(len(rows)))["loss_mask"]
    assert real[:-1].all()
    assert len(rows) == -(-sum(lengths) // seq_len)


@given(lengths, st.integers(1, 17), st.booleans(), st.randoms())
def test_a_batch_is_its_rows_in_the_order_asked_for(lengths, seq_len, packed, random):
    rows = PackedRows(split_of(lengths), seq_len, packed, PAD)
    indices = np.array([random.randrange(len(rows)) for _ in range(5)])
    whole = rows.batch(np.arange(len(rows)))
    for name, tensor in rows.batch(indices).items():
        assert torch.equal(tensor, whole[name][indices])


# Rows of whole blocks

EOS = 65_535  # no position of a stream


@given(lengths, st.integers(1, 6), st.integers(1, 4), st.booleans(), st.randoms())
def test_with_fill_every_token_is_in_one_row_and_every_block_is_whole(lengths, size, blocks, packed, random):
    """EOS stand behind every document's last token up to the end of its block, learnt, and nothing else is added."""
    rows = PackedRows(split_of(lengths), size * blocks, packed, PAD, True, DocumentFill(EOS, size))
    batch = rows.batch(np.arange(len(rows)))
    ids, scored, documents, fill = batch.values()
    text = scored & ~fill
    assert ids[text].tolist() == list(range(1, sum(lengths) + 1))
    assert rows.real_token_share == pytest.approx(scored.double().mean().item())
    assert rows.fill_share == pytest.approx(float(fill.sum() / scored.sum()))
    assert (ids[fill] == EOS).all() and scored[fill].all() and torch.equal(scored, documents >= 0)
    assert int(fill.sum()) == sum(-length % size for length in lengths)
    # 1. The first token of a filled stretch stands behind its document's last token, in the same document.
    ends = set(np.cumsum(lengths).tolist())
    for row, column in zip(*(fill & ~fill.roll(1, dims=1)).nonzero(as_tuple=True), strict=True):
        assert column > 0 and int(ids[row, column - 1]) in ends
        assert documents[row, column] == documents[row, column - 1]
    # 2. Blocks as the model lays them: whole, wherever its document begins in its row, and of one document.
    starts = block_starts(documents, size)[scored].view(-1, size)
    assert (starts == starts[:, :1]).all() and (starts % size == 0).all()
    # 3. Any rows in any order.
    chosen = np.array([random.randrange(len(rows)) for _ in range(3)])
    assert all(torch.equal(tensor, batch[name][chosen]) for name, tensor in rows.batch(chosen).items())


@given(lengths, st.integers(2, 24), st.integers(1, 30), st.booleans(), st.randoms())
def test_an_open_end_stands_behind_its_document_and_begins_no_row(lengths, seq_len, longest, packed, random):
    """Up to `longest` EOS; every token is in one row, and each row has one."""
    rows = PackedRows(split_of(lengths), seq_len, packed, PAD, True, DocumentFill(EOS, 0, min(longest, seq_len - 1)))
    batch = rows.batch(np.arange(len(rows)))
    ids, scored, documents, fill = batch.values()
    text = scored & ~fill
    assert ids[text].tolist() == list(range(1, sum(lengths) + 1)) and text.any(dim=1).all()
    assert (ids[fill] == EOS).all() and scored[fill].all() and torch.equal(scored, documents >= 0)
    ends = set(np.cumsum(lengths).tolist())
    for row, numbers in enumerate(documents):
        for number in range(int(numbers.max()) + 1):
            own = numbers == number
            here, filled = ids[row][own & text[row]], int((own & fill[row]).sum())
            assert filled <= longest and not (filled and int(here[-1]) not in ends)
            assert fill[row][own].tolist() == [False] * len(here) + [True] * filled
    chosen = np.array([random.randrange(len(rows)) for _ in range(3)])
    assert all(torch.equal(tensor, batch[name][chosen]) for name, tensor in rows.batch(chosen).items())


@given(lengths, st.integers(1, 17), st.booleans())
def test_blocks_of_one_token_change_nothing(lengths, seq_len, packed):
    plain, filled = (
        PackedRows(split_of(lengths), seq_len, packed, PAD, True, fill) for fill in (None, DocumentFill(EOS, 1))
    )
    ours, theirs = (rows.batch(np.arange(len(plain))) for rows in (plain, filled))
    assert not theirs.pop("fill").any() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_batch_has_the_types_of_the_data_contract():
    batch = PackedRows(split_of([5, 6]), 4, True, PAD).batch(np.array([1, 2]))
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "input_ids": torch.int64,
        "loss_mask": torch.bool,
        "document_ids": torch.int64,
    }
    assert PackedRows(split_of([5, 6]), 4, False, PAD).batch(np.array([], dtype=np.int64))["input_ids"].shape == (0, 4)


def test_rows_that_do_not_exist_are_refused():
    rows = PackedRows(split_of([5, 6]), 4, True, PAD)
    for index in (-1, 3):
        with pytest.raises(IndexError, match="3 rows"):
            rows.batch(np.array([index]))


@pytest.mark.parametrize("packed", [True, False])
def test_an_empty_stream_has_no_rows(packed):
    rows = PackedRows(TokenSplit(np.zeros(0, np.uint16), np.zeros(0, np.int64)), 4, packed, PAD)
    assert (len(rows), rows.real_token_share) == (0, 0.0)
    assert rows.batch(np.zeros(0, np.int64))["input_ids"].shape == (0, 4)


# The cache


texts = st.lists(st.text(ALPHABET, max_size=30), min_size=1, max_size=12)


@example(texts=["a", "b", " a\n", " b"], fraction=1e-9, chunk=20)
@example(texts=["a", " a"], fraction=1e-9, chunk=1)
@given(texts=texts, fraction=st.sampled_from([0.0, 1e-9, 0.2, 0.9]), chunk=st.sampled_from([1, 20, 10**6]))
def test_the_streams_are_the_encoded_documents_of_the_two_sides_of_the_split(
    tmp_path_factory, tokenizer, texts, fraction, chunk
):
    """For every size of the chunks in which the text is tokenised. Of several texts at least one is held out, with its
    copies; of one text and its copies none."""
    path = write_texts(tmp_path_factory.mktemp("data") / "a.jsonl", texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenise, "CHUNK_CHARACTERS", chunk)
        train, validation, meta = build(path, tokenizer, val_fraction=fraction)
    documents = [text for text in texts if text]
    held_out = [text for text in documents if is_validation(text, fraction)]
    smallest = min(map(content_hash, documents), default=0)
    if fraction and not held_out and len({text.strip() for text in documents}) > 1:
        held_out = [text for text in documents if content_hash(text) == smallest]
    trained = [text for text in documents if text not in held_out]
    assert (meta["rows"], meta["empty_rows"]) == (len(texts), len(texts) - len(documents))
    for name, split, mine in (("train", train, trained), ("validation", validation, held_out)):
        assert documents_of(split) == expected(tokenizer, mine)
        assert meta[f"{name}_documents"] == len(mine)
        assert meta[f"{name}_tokens"] == len(split.tokens)
        assert meta[f"{name}_characters"] == sum(map(len, mine))
        assert meta[f"{name}_bytes"] == sum(len(text.encode()) for text in mine)


def test_the_separator_is_tokenised_but_does_not_move_the_split(tmp_path, tokenizer):
    numbers = [str(i) for i in range(60)]
    path = write_texts(tmp_path / "a.jsonl", numbers)
    _, validation, _ = build(path, tokenizer, jsonl_sep="|", val_fraction=0.3)
    held_out = [text + "|" for text in numbers if is_validation(text, 0.3)]
    assert documents_of(validation) == expected(tokenizer, held_out)


def test_compressed_and_plain_corpora_make_equal_caches(tmp_path, tokenizer):
    numbers = [str(i) for i in range(100)]
    plain, packed = (
        build(write_texts(tmp_path / name, numbers), tokenizer, val_fraction=0.3) for name in ("a.jsonl", "a.jsonl.gz")
    )
    assert plain[2] == packed[2]
    assert plain[2]["data_sha256"] == hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest()
    assert [*map(documents_of, plain[:2])] == [*map(documents_of, packed[:2])]


def test_a_text_file_is_tokenised_whole(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"document {i}\n" * 30 + "\n" for i in range(40)), encoding="utf-8", newline="")
    train, validation, meta = build(path, tokenizer, val_fraction=0.2)
    assert sorted(documents_of(train) + documents_of(validation)) == sorted(expected(tokenizer, read_documents(path)))
    assert meta["train_bytes"] + meta["validation_bytes"] == path.stat().st_size


def test_another_file_tokenizer_or_option_is_another_cache(tmp_path, tokenizer):
    path = write_texts(tmp_path / "a.jsonl", ["a", "b", "c"], other="b")
    build(path, tokenizer)
    state = path.stat()
    others = [
        lambda: build(path, tokenizer, jsonl_field="other"),
        lambda: build(path, tokenizer, jsonl_sep="|"),
        lambda: build(path, tokenizer, val_fraction=0.5),
        lambda: build(path, train_characters(["abc"])),
        lambda: os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1)) or build(path, tokenizer),
        lambda: os.utime(write_texts(path, ["a", "b", "c", "cc"]), ns=(0, state.st_mtime_ns)) or build(path, tokenizer),
    ]
    for count, another in enumerate(others, start=2):
        another()
        assert len(list((tmp_path / "cache").glob("*/"))) == count


def test_large_vocabularies_are_stored_in_four_bytes(tmp_path):
    ideographs = "".join(map(chr, range(0x20000, 0x20000 + 65_536)))
    tokenizer = train_characters([ideographs])
    train, *_ = build(write_texts(tmp_path / "a.jsonl", [ideographs[-1], ideographs[0]]), tokenizer, val_fraction=0)
    assert train.tokens.dtype == np.uint32
    assert documents_of(train) == expected(tokenizer, [ideographs[-1], ideographs[0]])


def test_a_character_the_tokenizer_lacks_is_refused_with_the_file(tmp_path, tokenizer):
    path = write_texts(tmp_path / "a.jsonl", ["a", "Ω"])
    with pytest.raises(ValueError, match="Ω") as caught:
        build(path, tokenizer)
    assert str(caught.value).startswith(str(path))


def test_a_build_ends_with_one_line_of_progress(tmp_path, tokenizer, capsys):
    build(write_texts(tmp_path / "a.jsonl", [str(i) for i in range(1234)]), tokenizer)
    captured = capsys.readouterr()
    assert captured.err.startswith("tokenised 1,234 rows, 0.0M tokens in ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
