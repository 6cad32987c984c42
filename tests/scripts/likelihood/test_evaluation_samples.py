"""Which documents of a file are evaluated: all, those that training held out, or a random sample of either."""

import gc
from pathlib import Path

import pytest

from dataset.content import content_hash, is_validation
from dataset.pretrain import PretrainData, PretrainDataset
from dataset.tokenizer import encode
from scripts.engine.likelihood.windows import DataEvalConfig, chosen_texts, windows_of
from scripts.eval import likelihood


@pytest.mark.parametrize("batches", [1, 3, 7, 1000])
def test_a_limit_on_batches_is_filled_by_no_more_documents_than_it_takes(batches, tokenizer, texts, data):
    every = windows_of(tokenizer, data(texts), 16)[1]
    documents, windows = windows_of(tokenizer, data(texts, eval_batch_size=4, eval_max_batches=batches), 16)
    chosen = {(tuple(window.ids), window.seed) for window in windows}
    assert chosen <= {(tuple(window.ids), window.seed) for window in every}
    if batches == 1000:
        assert len(documents) == len(texts) and len(windows) == len(every)
    else:
        assert len(windows) >= 4 * batches
        assert sum(window.document < len(documents) - 1 for window in windows) < 4 * batches


def test_a_limit_counts_short_documents_as_windows(tokenizer, texts, data):
    """A document a window: as many documents as rows were asked for."""
    documents, windows = windows_of(tokenizer, data(texts, eval_batch_size=4, eval_max_batches=5), 1000)
    assert len(documents) == len(windows) == 20


@pytest.mark.parametrize("split", ["all", "validation"])
@pytest.mark.parametrize("batches", [1, 4])
def test_the_sample_does_not_depend_on_the_order_of_the_rows(batches, split, tokenizer, texts, data):
    more = {"eval_batch_size": 4, "eval_max_batches": batches, "eval_split": split, "val_fraction": 0.5}
    samples = []
    for rows in (texts, texts[::-1], texts[30:] + texts[:30]):
        windows = windows_of(tokenizer, data(rows, **more), 16)[1]
        samples.append(sorted((window.ids, window.seed) for window in windows))
    assert samples[0] == samples[1] == samples[2]


def test_the_sample_prefers_neither_what_training_held_out_nor_the_beginning_of_the_file(data):
    texts = [f"text {number}" for number in range(3000)]
    chosen = chosen_texts(data(texts, eval_batch_size=10, eval_max_batches=60))
    assert len(chosen) == len(set(chosen)) == 600
    held_out = sum(is_validation(text, 0.2) for text in chosen) / 600
    expected = sum(is_validation(text, 0.2) for text in texts) / 3000
    assert held_out == pytest.approx(expected, abs=4 * (0.16 / 600) ** 0.5)
    assert sum(int(text[5:]) for text in chosen) / 600 == pytest.approx(1500, abs=4 * 3000 / (12 * 600) ** 0.5)


@pytest.mark.parametrize("split", ["all", "validation"])
def test_sampling_holds_no_more_than_the_sample_in_memory(split, data, monkeypatch):
    class Text(str):
        alive = most = 0

        def __init__(self, *_):
            Text.alive += 1
            Text.most = max(Text.most, Text.alive)

        def __del__(self):
            Text.alive -= 1

    monkeypatch.setattr(
        "scripts.engine.likelihood.windows.read_documents", lambda *_: (Text(f"text {n}") for n in range(2000))
    )
    gc.collect()
    config = data(["x"], eval_batch_size=4, eval_max_batches=5, eval_split=split, val_fraction=0.3)
    assert len(chosen_texts(config)) == 20
    assert Text.most <= 20 + 5


# -- what training held out --------------------------------------------------------------------------------------------


def held_out_by_training(path: Path, tokenizer, fraction: float) -> list[list[int]]:
    rows = PretrainDataset(PretrainData(data=path, max_seq_len=4096, packing=False, val_fraction=fraction), tokenizer)
    batch = rows.validation.batch(range(len(rows.validation)))
    return sorted(ids[real].tolist() for ids, real in zip(batch["input_ids"], batch["loss_mask"], strict=True))


def held_out_by_evaluation(config: DataEvalConfig, tokenizer) -> list[list[int]]:
    return sorted(window.ids for window in windows_of(tokenizer, config, 4096)[1])


def smallest(texts: list[str]) -> str:
    return min(texts, key=content_hash)


CORPORA = {
    "documents": lambda texts: texts,
    "reversed": lambda texts: texts[::-1],
    "empty ones among them": lambda texts: ["", *texts, ""],
    "the smallest three times": lambda texts: [smallest(texts), *texts, smallest(texts)],
    "the smallest with other spaces": lambda texts: [*texts, smallest(texts) + " ", "\n" + smallest(texts)],
    "two": lambda texts: texts[:2],
}


@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("fraction", [1e-12, 0.05, 0.3, 0.9])
def test_the_validation_split_is_what_training_holds_out(fraction, corpus, tokenizer, texts, data):
    """With a fraction that picks none, the document of the smallest hash with all its copies."""
    config = data(CORPORA[corpus](texts), eval_split="validation", val_fraction=fraction)
    if corpus == "two" and fraction == 0.9:
        config = data(texts[:2], eval_split="validation", val_fraction=0.2)  # something is left to train on
    expected = held_out_by_training(config.eval_data, tokenizer, config.val_fraction)
    assert expected and held_out_by_evaluation(config, tokenizer) == expected


@pytest.mark.parametrize("rows, fraction", [(60, 0.0), (1, 1e-12)])
def test_where_training_holds_nothing_out_there_is_nothing_to_evaluate(rows, fraction, tokenizer, texts, data):
    """Anything that were evaluated here would have been trained on."""
    config = data(texts[:rows], eval_split="validation", val_fraction=fraction)
    assert held_out_by_training(config.eval_data, tokenizer, fraction) == []
    with pytest.raises(ValueError, match="val-fraction|held out|holds out"):
        held_out_by_evaluation(config, tokenizer)


def test_a_text_file_has_a_validation_split_too(tokenizer, texts, workspace):
    path = workspace / "corpus.txt"
    path.write_text("\n\n".join(texts), encoding="utf-8")
    config = DataEvalConfig(eval_data=path, eval_split="validation", val_fraction=0.4)
    assert held_out_by_evaluation(config, tokenizer) == held_out_by_training(path, tokenizer, 0.4) != []


def test_the_command_evaluates_the_validation_split(eval_argv, command, texts, tokenizer):
    argv = [*eval_argv["likelihood"], "--eval-split", "validation", "--val-fraction", "0.2"]
    said = command(likelihood, argv)
    held_out = [text for text in texts if is_validation(text, 0.2)]
    tokens = sum(len(encode(tokenizer, text)) + 1 for text in held_out)
    assert said.code == 0 and said.out.startswith(f"all: {len(held_out)} documents, {tokens:,} tokens")
