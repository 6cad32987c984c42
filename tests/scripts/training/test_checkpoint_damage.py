"""Files that are no checkpoints, or no longer: refused by name, and no code in them is run."""

import hashlib
import io
import pickle
import random
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model.checkpoint import SEAL_BYTES, load_checkpoint, load_model, read_archive
from model.config import ModelConfig
from model.import_weights import starting_weights
from scripts.train import train_pretrain


class Trap:
    """Unpickled by plain pickle, it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def saved_by_torch(value, **options) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def zip_of_something_else() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return file.getvalue()


KINDS = {  # what is in the file, of the content of a good one and a payload with a trap
    "empty": lambda good, evil: b"",
    "text": lambda good, evil: b"these are no weights\n" * 50,
    "pickle with code": lambda good, evil: pickle.dumps(evil),
    "torch file with code": lambda good, evil: saved_by_torch(evil),
    "old torch file with code": lambda good, evil: saved_by_torch(evil, _use_new_zipfile_serialization=False),
    "zip of something else": lambda good, evil: zip_of_something_else(),
    "tensor": lambda good, evil: saved_by_torch(torch.zeros(3)),
    "whole module": lambda good, evil: saved_by_torch(torch.nn.Linear(2, 2)),
    "garbled directory": lambda good, evil: good[:-200] + bytes(200),
    "first half": lambda good, evil: good[: len(good) // 2],
    "all but the end": lambda good, evil: good[: len(good) * 999 // 1000],
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_checkpoint_is_refused_by_every_reader_and_never_executed(kind, saved, tmp_path):
    _, path = saved()
    trap = tmp_path / "sprung"
    path.write_bytes(KINDS[kind](path.read_bytes(), {"format": "nano-llada", "config": Trap(trap)}))
    for read in (load_checkpoint, load_model, lambda p: starting_weights(p, ModelConfig(), frozenset(), "any")):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read(path)
    assert not trap.exists()


def changes_of(content: bytes) -> Iterator[bytes]:
    """The content cut at every percent of its length; with a bit flipped, a stretch made zero, a byte lost, a byte too
    many at places throughout, among them each of the last, which hold the archive's directory and the checksum."""
    size = len(content)
    yield from (content[: size * percent // 100] for percent in range(100))
    places = sorted({*random.Random(0).sample(range(size), 300), *range(size - SEAL_BYTES - 30, size)})
    for number, place in enumerate(places):
        yield content[:place] + bytes([content[place] ^ 1 << number % 8]) + content[place + 1 :]
    for place in places[:: len(places) // 50]:
        hole = content[:place] + bytes(64) + content[place + 64 :]
        if hole != content:
            yield hole[:size]
        yield content[:place] + content[place + 1 :]
        yield content[:place] + b"x" + content[place:]


def test_no_byte_of_a_checkpoint_can_be_lost_or_changed_without_notice(saved, tmp_path):
    _, path = saved()
    tried = 0
    for changed in changes_of(path.read_bytes()):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            load_checkpoint(path)
        tried += 1
    assert tried > 500


@pytest.mark.parametrize("version, whole", [(1, True), (2, True), (3, False)])
def test_files_of_before_the_seal_are_read_and_later_ones_without_it_are_not(version, whole, saved):
    _, path = saved()
    payload = load_checkpoint(path)
    torch.save(payload | {"version": version}, path)
    if whole:
        assert load_checkpoint(path)["weights"].keys() == payload["weights"].keys()
        content = bytearray(path.read_bytes())
        content[bytes(content).index(payload["weights"]["lm_head.weight"].numpy().tobytes()[:64]) + 3] ^= 0x40
        path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(path)


def test_a_damaged_file_of_the_old_kind_is_refused_or_read_but_never_a_traceback(tmp_path):
    path = tmp_path / "old.pth"
    tensors = {f"model.layers.{i}.weight": torch.ones(3, 3) for i in range(6)}
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    content, refused = path.read_bytes(), 0
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            read_archive(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 50


def test_a_sealed_file_is_an_archive_to_others(saved):
    """torch reads it without us, and the checksum in it is that of what `sha256sum` would be given."""
    model, path = saved()
    assert torch.equal(torch.load(path, weights_only=True)["weights"]["lm_head.weight"], model.lm_head.weight)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.comment == b"sha256:" + hashlib.sha256(content[:-SEAL_BYTES]).hexdigest().encode()


@pytest.mark.parametrize("what", ["missing.pt", "."])
def test_a_path_without_a_file_says_who_writes_one(what, tmp_path):
    with pytest.raises(FileNotFoundError, match="_state_dict.pt"):
        read_archive(tmp_path / what)


def test_foreign_weights_of_another_layout_are_refused(refused, workspace, pretrain_argv):
    torch.save({"decoder.embed_tokens.weight": torch.zeros(4, 4)}, "foreign.pt")
    refused(train_pretrain, [*pretrain_argv, "--load-from", "foreign.pt"], "foreign.pt", "embed_tokens")
