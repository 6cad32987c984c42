"""A pretraining corpus as the stages see it: flags, rows of both parts, and what is said about them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dataset.content import is_validation
from dataset.pretrain import PretrainData, PretrainDataset
from dataset.tokenizer import encode, train_characters

TEXTS = [f"document {i}: {'中' * (i % 50)}" for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_characters(TEXTS + ["\n\t"])


def dataset_of(tmp_path, tokenizer, texts=TEXTS, **options):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    config = {"max_seq_len": 16, "val_fraction": 0.1, "cache_dir": tmp_path / "cache", **options}
    return PretrainDataset(PretrainData(data=path, **config), tokenizer)


def real_tokens(rows):
    batch = rows.batch(np.arange(len(rows)))
    return batch["input_ids"][batch["loss_mask"]].tolist()


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("max_seq_len", [2, 16, 1000])
def test_the_rows_of_both_parts_are_the_whole_corpus_in_order(tmp_path, tokenizer, packing, max_seq_len):
    dataset = dataset_of(tmp_path, tokenizer, packing=packing, max_seq_len=max_seq_len)
    for rows, side in ((dataset.train, False), (dataset.validation, True)):
        texts = [text for text in TEXTS if is_validation(text, 0.1) == side]
        documents = [[tokenizer.bos_token_id, *encode(tokenizer, text), tokenizer.eos_token_id] for text in texts]
        assert real_tokens(rows) == sum(documents, [])


def test_the_row_length_and_packing_share_one_cache(tmp_path, tokenizer, capsys):
    config = dataset_of(tmp_path, tokenizer).config
    assert "tokenised" in capsys.readouterr().err
    for options in ({"max_seq_len": 32}, {"packing": False}):
        PretrainDataset(replace(config, **options), tokenizer)
    assert capsys.readouterr().err == ""


def test_meta_and_description_agree_with_the_rows(tmp_path, tokenizer):
    dataset = dataset_of(tmp_path, tokenizer, texts=[*TEXTS, ""])
    meta = dataset.meta
    assert json.loads(json.dumps(meta)) == meta
    assert (meta["rows"], meta["empty_rows"]) == (201, 1)
    assert meta["train_documents"] + meta["validation_documents"] == 200
    assert meta["train_tokens"] == len(real_tokens(dataset.train))
    assert meta["validation_tokens"] == len(real_tokens(dataset.validation))
    assert meta["real_token_share"] == dataset.train.real_token_share
    assert meta["train_bytes"] + meta["validation_bytes"] == sum(len(text.encode()) for text in TEXTS)
    description = dataset.describe()
    assert len(description.splitlines()) == 2
    assert "201 rows (1 empty ones skipped)" in description
    assert f"{meta['train_tokens']:,} tokens, {len(dataset.train):,} rows of 16" in description


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"jsonl_field": ""}, "--jsonl-field"),
        ({"data": Path("a.xlsx")}, "unknown file type"),
        ({"data": Path("a.txt.gz"), "jsonl_sep": "x"}, "--jsonl-sep 'x'"),
        ({"data": Path("a.txt"), "jsonl_field": "content"}, "--jsonl-field content"),
    ],
)
def test_an_impossible_flag_is_refused_by_name_and_value(options, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")) as caught:
        PretrainData(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("texts", "fraction", "says"),
    [
        (["", ""], 0.1, "all 2 rows are empty"),
        ([text for text in TEXTS if is_validation(text, 0.5)], 0.5, "held out by --val-fraction 0.5"),
    ],
)
def test_nothing_to_train_on_is_refused_with_the_reason(tmp_path, tokenizer, texts, fraction, says):
    with pytest.raises(ValueError, match=says):
        dataset_of(tmp_path, tokenizer, texts=texts, val_fraction=fraction)


@pytest.mark.parametrize(("typed", "meant"), [(None, None), ("", ""), (r"\n\t|", "\n\t|"), ("\n", "\n")])
def test_escapes_in_the_separator_are_read(tmp_path, tokenizer, typed, meant):
    """A shell hands on \\n as a backslash and an n; training on those two characters would be nobody's wish."""
    config = PretrainData(jsonl_sep=typed)
    assert config.separator == meant
    if typed == "\n":
        dataset = dataset_of(tmp_path, tokenizer, jsonl_sep=r"\n", val_fraction=0.0)
        assert real_tokens(dataset.train)[-2:] == [*encode(tokenizer, "\n"), tokenizer.eos_token_id]


def test_without_the_document_mask_rows_differ_in_their_document_ids_alone(tmp_path, tokenizer):
    apart, joined = (dataset_of(tmp_path, tokenizer, use_doc_attention_mask=flag).train for flag in (True, False))
    everything = np.arange(len(apart))
    one, other = apart.batch(everything), joined.batch(everything)
    assert (one["document_ids"] > 0).any() and joined.seq_len == 16
    assert (other["document_ids"] == np.where(one["document_ids"] < 0, -1, 0)).all()
    assert all((one[name] == other[name]).all() for name in ("input_ids", "loss_mask"))
