"""The cache: what is appended on disk is what is read, whole or not at all, in little memory; one build at a time."""

import json
import os
import shutil
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset import cache, conversations, preferences, pretrain, tokenise
from dataset.cache import ArrayFiles, cached_directory, map_array
from dataset.content import content_hash
from dataset.preferences import PreferenceData, PreferenceDataset
from dataset.pretrain import PretrainData, PretrainDataset
from dataset.reading import files
from dataset.reading.rows import chunked
from dataset.rows.pair_formats import pair_of
from dataset.sft import DiffusionSFTData, SFTDataset
from dataset.tokenizer import encode, encode_chat, render_chat, train_characters
from tests.dataset.sentences import CHAT, CHINESE, ENGLISH

KINDS = ("documents", "conversations", "pairs")
ENCODERS = {
    "documents": (pretrain, "encode_batch"),
    "conversations": (conversations, "encode_conversations"),
    "pairs": (preferences, "encode_conversations"),
}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [*ENGLISH, *CHINESE, *(message["content"] for message in CHAT)]
    return train_characters([*texts, "0123456789 systemuserassistant\n"])


def text(number: int) -> str:
    return f"{number} {(ENGLISH + CHINESE)[number % 12]}"


def row(kind: str, number: int) -> dict:
    """Conversations of one to three replies, some of them empty; two replies that begin alike or are the same."""
    if kind == "documents":
        return {"text": text(number)}
    if kind == "pairs":
        others = text(number + 12), text(number), text(number)[: 5 + number % 7] + "?"
        return {"prompt": str(number), "chosen": text(number), "rejected": others[number % 3]}
    replies = ["" if number % 5 == 4 else text(number + place) for place in range(1 + number % 3)]
    ask = {"role": "user", "content": str(number)}
    return {"messages": [m for reply in replies for m in (ask, {"role": "assistant", "content": reply})] + [ask]}


def write(kind: str, path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps(row(kind, number)) + "\n" for number in range(count)), encoding="utf-8")
    return path


def opened(kind: str, path: Path, tokenizer, **flags):
    places = {"data": path, "cache_dir": path.parent / "cache", **flags}
    if kind == "documents":
        return PretrainDataset(PretrainData(**places), tokenizer)
    if kind == "conversations":
        return SFTDataset(DiffusionSFTData(**places), tokenizer, False, 2)
    return PreferenceDataset(PreferenceData(**places), tokenizer, "full", 0)


def dataset_of(kind: str, path: Path, tokenizer, count: int, **flags):
    return opened(kind, write(kind, path, count), tokenizer, **flags)


@given(st.lists(st.integers(0, 9)), st.integers(0, 12))
def test_chunks_are_the_parts_in_order_each_just_long_enough(parts, enough):
    chunks = list(chunked(parts, int, enough))
    assert sum(chunks, []) == parts and all(chunks)
    assert all(sum(chunk) >= enough for chunk in chunks[:-1])
    assert all(sum(chunk[:-1]) < enough for chunk in chunks if len(chunk) > 1)


def test_what_is_appended_is_mapped(tmp_path):
    with ArrayFiles(tmp_path, {"some": np.uint32, "none": np.int64}) as files:
        files.append("some", np.array([9]))
        files.clear()
        for part in ([1, 2], [], [70_000]):
            files.append("some", np.array(part, dtype=np.int64))
        assert files.lengths == {"some": 3, "none": 0}
    some, none = map_array(tmp_path / "some", np.uint32), map_array(tmp_path / "none", np.int64)
    assert some.tolist() == [1, 2, 70_000] and isinstance(some.base, np.memmap)
    assert none.shape == (0,)


@pytest.mark.parametrize("chunk", [1, 300, 10**6])
def test_cached_conversations_are_the_template_of_each_and_the_places_of_its_replies(
    chunk, tmp_path, tokenizer, monkeypatch
):
    monkeypatch.setattr(tokenise, "CHUNK_CHARACTERS", chunk)
    chats = dataset_of("conversations", tmp_path / "a.jsonl", tokenizer, 60, val_fraction=0.0).train.chats
    tokens, starts, begins, ends, owners, hashes = [], [0], [], [], [], []
    for number in range(60):
        messages = row("conversations", number)["messages"]
        for place, message in enumerate(messages):
            if message["role"] == "assistant" and message["content"]:
                begins.append(len(tokens) + len(encode_chat(tokenizer, messages[:place], True)))
                ends.append(begins[-1] + len(encode(tokenizer, message["content"])) + 1)
                owners.append(number)
        tokens += encode_chat(tokenizer, messages, False)
        starts.append(len(tokens))
        hashes.append(content_hash(render_chat(messages, False)))
    found = (chats.tokens, chats.starts, chats.reply_begins, chats.reply_ends, chats.reply_owners, chats.hashes)
    assert [array.tolist() for array in found] == [tokens, starts, begins, ends, owners, hashes]


@pytest.mark.parametrize("chunk", [1, 300, 10**6])
def test_cached_pairs_are_prompt_and_replies_of_each_and_how_far_these_are_alike(
    chunk, tmp_path, tokenizer, monkeypatch
):
    monkeypatch.setattr(tokenise, "CHUNK_CHARACTERS", chunk)
    rows = dataset_of("pairs", tmp_path / "a.jsonl", tokenizer, 60, val_fraction=0.0).train
    parts, eos = [], [tokenizer.eos_token_id]
    for number in range(60):
        pair = pair_of(row("pairs", number))
        parts.append(encode_chat(tokenizer, pair.prompt, True))
        parts += [encode(tokenizer, reply) + eos for reply in (pair.chosen, pair.rejected)]
    assert [part.tolist() for part in np.split(rows.pairs.tokens, rows.pairs.starts[1:-1])] == parts
    for number, (first, second) in enumerate(zip(parts[1::3], parts[2::3], strict=True)):
        alike = rows.pairs.common[number]
        assert (
            first[:alike] == second[:alike]
            and first[alike : alike + 1] != second[alike : alike + 1]
            or (first == second and alike == len(first))
        )
    different = [number for number in range(60) if parts[3 * number + 1] != parts[3 * number + 2]]
    assert rows.chosen.tolist() == different and 0 < len(different) < 60


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_how_many_are_looked_at_together(kind, tmp_path, tokenizer, monkeypatch):
    flags = {"val_fraction": 0.3, "max_seq_len": 40} | ({"packing": False} if kind == "documents" else {})

    def shown():
        made = dataset_of(kind, tmp_path / "a.jsonl", tokenizer, 80, **flags)
        batches = [rows.batch(np.arange(len(rows))) for rows in (made.train, made.validation)]
        return made.describe(), [{name: tensor.tolist() for name, tensor in batch.items()} for batch in batches]

    whole = shown()
    monkeypatch.setattr(cache, "STRETCH", 7)
    assert shown() == whole


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_further_row_takes_less_memory_than_it_has_text(kind, tmp_path, tokenizer, monkeypatch):
    """While the cache is made and while rows are read in the order of training: numbers alone stay in memory."""
    monkeypatch.setattr(tokenise, "CHUNK_CHARACTERS", 1000)
    monkeypatch.setattr(cache, "STRETCH", 100)
    monkeypatch.setattr(files, "HEAD", 1000)
    flags = {"packing": False} if kind == "documents" else {}

    def peak(count):
        path = write(kind, tmp_path / f"{count}.jsonl", count)
        tracemalloc.start()
        try:
            rows = opened(kind, path, tokenizer, **flags).train
            rows.batch(rows.order(0, 8)(0, 8))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)
    few, many = 300, 1200
    assert peak(many) - peak(few) < 48 * (many - few)


# -- whole or not at all -------------------------------------------------------------------------------------------


def directories(folder: Path) -> list[str]:
    """The entries of a cache, without the locks of builds."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def make(folder: Path) -> None:
    (folder / "file").write_text("sound")


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_build_leaves_no_cache(kind, tmp_path, tokenizer, monkeypatch):
    (module, name), calls = ENCODERS[kind], []
    original = getattr(module, name)

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tokenise, "CHUNK_CHARACTERS", 1)
        patch.setattr(module, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            dataset_of(kind, tmp_path / "a.jsonl", tokenizer, 30)
    assert directories(tmp_path / "cache") == []
    assert len(dataset_of(kind, tmp_path / "a.jsonl", tokenizer, 30).train)


@pytest.mark.parametrize("again", ["key", "other"])
def test_a_killed_build_is_no_cache_and_is_removed_by_the_next_build_of_anything(again, tmp_path):
    """The child ends without any cleaning up, as after kill -9, when the first bytes are on disk."""
    child = (
        "import os, sys; from pathlib import Path; from dataset.cache import cached_directory\n"
        "def build(folder):\n"
        "    (folder / 'file').write_text('half')\n"
        "    os._exit(9)\n"
        "cached_directory(Path(sys.argv[1]), 'key', build)"
    )
    assert subprocess.run([sys.executable, "-c", child, tmp_path], cwd=ROOT).returncode == 9
    assert directories(tmp_path) == ["key.building"] and (tmp_path / "key.building" / "file").exists()
    assert cached_directory(tmp_path, again, make) == tmp_path / again
    assert directories(tmp_path) == [again]


def test_a_build_under_way_is_left_alone_by_that_of_another_directory(tmp_path):
    def outer(folder):
        cached_directory(tmp_path, "other", make)
        make(folder)

    assert (cached_directory(tmp_path, "key", outer) / "file").read_text() == "sound"
    assert directories(tmp_path) == ["key", "other"]


def test_of_builds_at_the_same_time_one_builds_and_the_others_wait(tmp_path, capsys):
    started, may_end, builds, results = threading.Event(), threading.Event(), [], []

    def build(folder):
        builds.append(folder)
        started.set()
        assert may_end.wait(10)
        make(folder)

    threads = [threading.Thread(target=lambda: results.append(cached_directory(tmp_path, "key", build)))]
    threads[0].start()
    assert started.wait(10)
    threads.append(threading.Thread(target=lambda: results.append(cached_directory(tmp_path, "key", build))))
    threads[1].start()
    while "waiting for it" not in capsys.readouterr().err:
        assert threads[1].is_alive()
    may_end.set()
    for thread in threads:
        thread.join()
    assert results == [tmp_path / "key"] * 2 and len(builds) == 1
    assert directories(tmp_path) == ["key"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(kind, tmp_path, tokenizer):
    """A limit on the size of files stands for the full disk: both end in an OSError somewhere in the writing."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = write(kind, tmp_path / "a.jsonl", 800)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"cannot be written \(.*\); choose another --cache-dir") as refused:
            opened(kind, path, tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(refused.value)
    assert directories(tmp_path / "cache") == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_grows_while_it_is_read_is_refused(kind, tmp_path, tokenizer, monkeypatch):
    (module, name), path = ENCODERS[kind], tmp_path / "a.jsonl"
    original = getattr(module, name)

    def growing(*arguments):
        with path.open("ab") as file:
            file.write(b"\n")
        return original(*arguments)

    monkeypatch.setattr(module, name, growing)
    with pytest.raises(ValueError, match="changed while it was read"):
        dataset_of(kind, path, tokenizer, 5)
    assert directories(tmp_path / "cache") == []


def test_an_unusable_cache_directory_is_refused_with_the_flag(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="choose another --cache-dir"):
        cached_directory(tmp_path / "file" / "cache", "key", make)


# -- damage --------------------------------------------------------------------------------------------------------

DAMAGE = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "absent": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"more"),
    "a bit": lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
}


@pytest.mark.parametrize("name", ["tokens", "starts", "meta.json", "files.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_built_again_and_says_so(name, damage, tmp_path, tokenizer, capsys):
    before = dataset_of("conversations", tmp_path / "a.jsonl", tokenizer, 20).train.batch(np.arange(9))
    (file,) = (tmp_path / "cache").glob(f"*/{name}")
    DAMAGE[damage](file)
    if file.exists():
        os.utime(file)
    capsys.readouterr()
    after = opened("conversations", tmp_path / "a.jsonl", tokenizer).train.batch(np.arange(9))
    assert after["input_ids"].tolist() == before["input_ids"].tolist()
    assert ("is damaged" in capsys.readouterr().err) or (name == "files.json" and damage == "a bit")
    opened("conversations", tmp_path / "a.jsonl", tokenizer)
    assert capsys.readouterr().err == ""


def hashed_files(monkeypatch) -> list[str]:
    """The names of the files that are hashed from now on."""
    names, original = [], cache._sha256
    monkeypatch.setattr(cache, "_sha256", lambda path: names.append(path.name) or original(path))
    return names


def test_files_are_hashed_when_they_are_built_and_when_their_time_has_changed(tmp_path, monkeypatch):
    names = hashed_files(monkeypatch)
    folder = cached_directory(tmp_path, "key", make)
    assert names == ["file"]
    cached_directory(tmp_path, "key", None)
    assert names == ["file"]
    os.utime(folder / "file", ns=(0, 0))
    for _ in range(2):
        cached_directory(tmp_path, "key", None)
        assert names == ["file"] * 2, "hashed again although it was found unchanged"


def test_a_copied_cache_is_a_cache(tmp_path):
    shutil.copytree(
        cached_directory(tmp_path / "a", "key", make), tmp_path / "b" / "key", copy_function=shutil.copyfile
    )
    assert cached_directory(tmp_path / "b", "key", None) == tmp_path / "b" / "key"


def test_a_file_that_the_system_adds_to_a_cache_is_no_damage(tmp_path, capsys):
    folder = cached_directory(tmp_path, "key", make)
    for name in (".DS_Store", ".nfs0001", "Thumbs.db"):
        (folder / name).write_bytes(b"x")
    cached_directory(tmp_path, "key", None)
    assert not capsys.readouterr().err and (folder / ".nfs0001").exists()
