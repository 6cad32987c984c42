"""What is said of a place that holds no checkpoint: what is there, and what may have been meant."""

from pathlib import Path

import pytest

from model.checkpoint import load_checkpoint

FILES = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n": "git lfs pull",
    b"GGUF\3\0\0\0" * 20: "GGUF",
    b"<!DOCTYPE html>\n<title>404</title>": "web page",
    b'{"text": "a"}\n' * 20: "JSON",
    b" \n": "empty",
    b"": "empty",
    b"hello": "damaged",
    b"{" + b"\0" * 7 + b'{"a": {"dtype": "F32"': "damaged",  # a header of 123 bytes, cut off
}


@pytest.mark.parametrize("content", FILES, ids=FILES.values())
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_file_that_is_something_else_is_called_what_it_is(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=FILES[content].replace("damaged", "damaged|may hold code")):
        load_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    "files, given, words",
    [
        ([], "w", "no checkpoint is in it"),
        (["config.json", "model.safetensors"], "w", "--load-from"),
        (["a.pt", "a_best.pt", "b_state_dict.pt"], "w", "such as w/b_state_dict.pt"),
        (["a.pt", "a_best.pt", "a_state_dict.pt"], "w/a", "did you mean w/a_state_dict.pt?"),
        (["sft_state_dict.pt"], "w/sft_statedict.pt", "did you mean w/sft_state_dict.pt?"),
        (["sft_state_dict.pt"], "w/dpo.pt", "there is no checkpoint w/dpo.pt; training writes"),
        (["a.pt"], "v/a.pt", "there is no checkpoint v/a.pt; training writes"),
    ],
)
def test_a_place_without_a_checkpoint_is_said_with_what_is_there_instead(files, given, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("w").mkdir()
    for name in files:
        Path("w", name).touch()
    with pytest.raises((OSError, ValueError)) as error:
        load_checkpoint(Path(given))
    assert words in str(error.value)
