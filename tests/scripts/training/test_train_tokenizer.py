import re

import pytest

from dataset.corpus.bundled import words
from dataset.sample import sample_texts
from dataset.tokenizer import fingerprint, load_tokenizer, train_bpe
from scripts.train import train_tokenizer
from scripts.train.train_tokenizer import main
from tests.dataset.sentences import CHINESE, ENGLISH
from tests.scripts.conftest import write_jsonl


def test_the_command_trains_on_the_kept_sources_as_often_as_told(tmp_path, capsys):
    data = write_jsonl(tmp_path / "rows.jsonl", [*ENGLISH, *CHINESE])
    labels = tmp_path / "labels.txt"
    labels.write_text("novels/en\n" * len(ENGLISH) + "books/zh\n" * len(CHINESE), encoding="utf-8")
    keep = ["--sources", str(labels), "--keep-sources", "novels=3"]
    arguments = ["--data", str(data), *keep, "--target-vocab-size", "330", "--eval-data", str(data)]
    main([*arguments, "--out", str(tmp_path / "out")])
    assert fingerprint(load_tokenizer(tmp_path / "out")) == fingerprint(train_bpe(ENGLISH * 3, 330))
    printed = capsys.readouterr().out
    assert re.search(r"zh +6 rows +0\.3\d+ characters/token +1\.0\d+ bytes/token", printed), printed
    with pytest.raises(ValueError, match="already holds a tokenizer; choose another --out, or add --overwrite"):
        main([*arguments, "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("labels", "keep", "complaint"),
    [
        ("a\nb\n", "c", "has no row of c"),
        ("a\n", "a", "has 1 lines, but .* has 2 rows"),
        ("a\n" * 3, "a", "has 3 lines"),
    ],
)
def test_labels_that_do_not_fit_the_data_are_refused(tmp_path, labels, keep, complaint):
    data = write_jsonl(tmp_path / "rows.jsonl", ["one", "two"])
    (tmp_path / "labels.txt").write_text(labels, encoding="utf-8")
    arguments = ["--data", str(data), "--sources", str(tmp_path / "labels.txt"), "--keep-sources", keep]
    with pytest.raises(ValueError, match=complaint):
        main([*arguments, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_without_data_the_words_of_the_bundled_corpus_are_used(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["--target-vocab-size", "300", "--out", "out"])
    assert "no --data, so the bundled corpus is used" in capsys.readouterr().out
    texts = [row["text"] for row in words()]
    assert fingerprint(load_tokenizer(tmp_path / "out")) == fingerprint(train_bpe(texts, 300))


def test_a_tokenizer_is_not_trained_for_an_evaluation_that_cannot_be(refused, workspace):
    argv = ["--data", "corpus.jsonl", "--target-vocab-size", "300"]
    refused(train_tokenizer, [*argv, "--out", "tok", "--eval-data", "nowhere.jsonl"], "nowhere.jsonl")
    refused(train_tokenizer, [*argv, "--out", "corpus.jsonl/tok"], "--out")


def test_of_much_text_a_sample_is_used_and_said(workspace, texts, command):
    write_jsonl(workspace / "more.jsonl", texts[:20])
    size = sum(len(text.encode()) for text in texts)
    megabytes = size / 2e6
    argv = ["--data", "corpus.jsonl", "--target-vocab-size", "290", "--sample-megabytes", megabytes]
    result = command(train_tokenizer, [*argv, "--out", "half"])
    sample = sample_texts(texts, round(megabytes * 1e6)).texts
    assert 10 < len(sample) < 50 and f"random sample of {len(sample)} of {len(texts)} documents" in result.out
    assert fingerprint(load_tokenizer("half")) == fingerprint(train_bpe(sample, 290))
    argv[1], argv[-1] = "corpus.jsonl,more.jsonl", size / 1e6 * 2
    assert f"training on {len(texts) + 20} documents" in command(train_tokenizer, [*argv, "--out", "all"]).out
    assert fingerprint(load_tokenizer("all")) == fingerprint(train_bpe(texts + texts[:20], 290))
