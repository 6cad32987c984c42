import json
import re
import shutil
import socket
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from dataset.tokenizer import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    decode,
    encode,
    encode_chat,
    fingerprint,
    load_tokenizer,
    render_chat,
    save_tokenizer,
    token_ids,
    train_bpe,
)
from tests.dataset.sentences import CHAT, CHINESE, ENGLISH

ROOT = Path(__file__).parents[2]
SPELLED = "a<|im_end|>b <|mask|><|im_start|>user\n<|buffer3|> <|endoftext|>"


def minimind_like(directory: Path, extra_tokens: list[str]) -> Path:
    """A directory as MiniMind ships it: byte-level BPE, no mask token, reserved tokens that are not marked special."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(name, special=True, normalized=False) for name in (*SPECIAL_TOKENS[:3], *extra_tokens)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(ENGLISH, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    edit_json(directory / "tokenizer.json", mark_as_ordinary)
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "additional_special_tokens": [],
        "legacy": True,
        "model_max_length": 32768,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def mark_as_ordinary(state: dict) -> None:
    for token in state["added_tokens"]:
        token["special"] = token["special"] and "buffer" not in token["content"]


def edit_json(path: Path, change) -> None:
    state = json.loads(path.read_text(encoding="utf-8"))
    change(state)
    path.write_text(json.dumps(state), encoding="utf-8")


# --- directories ---


def test_a_saved_directory_means_the_same_to_transformers_and_to_us(small, characters, tmp_path):
    for name, tokenizer in (("bpe", small), ("characters", characters)):
        save_tokenizer(tokenizer, tmp_path / name)
        ours, theirs = load_tokenizer(tmp_path / name), AutoTokenizer.from_pretrained(tmp_path / name)
        for text in (ENGLISH[0], CHINESE[0]):
            ids = encode(tokenizer, text)
            assert encode(ours, text) == ids
            assert theirs(text, add_special_tokens=False).input_ids == ids
            assert theirs.decode(ids) == text
        assert token_ids(ours) == token_ids(theirs) == token_ids(tokenizer)
        assert theirs.apply_chat_template(CHAT[:1], tokenize=False) == render_chat(CHAT[:1], False)


def test_saving_again_changes_no_byte(shipped, tmp_path):
    shipped(["a", "b c"], padding=True, truncation=True, max_length=2)
    save_tokenizer(shipped, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()


def test_loading_needs_no_network(small, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("something asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    save_tokenizer(small, tmp_path)
    assert len(load_tokenizer(tmp_path)) == 330
    with pytest.raises(ValueError, match="tokenizer directory gpt2 does not exist"):
        load_tokenizer(Path("gpt2"))


def test_a_directory_without_mask_token_gives_the_role_to_its_first_buffer_token(tmp_path):
    directory = minimind_like(tmp_path, ["<|box_start|>", "<|buffer1|>", "<|buffer2|>"])
    tokenizer = load_tokenizer(directory)
    ids = token_ids(tokenizer)
    assert ids == {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "mask_token_id": 4}
    text = "".join(SPECIAL_TOKENS)
    assert decode(tokenizer, encode(tokenizer, text)) == text
    assert min(encode(tokenizer, text)) > 5
    assert decode(tokenizer, [4, 5]) == ""


def test_a_directory_without_any_reserved_token_grows_by_one(tmp_path):
    tokenizer = load_tokenizer(minimind_like(tmp_path, []))
    assert token_ids(tokenizer)["mask_token_id"] == 300
    assert token_ids(tokenizer)["vocab_size"] == 301
    assert decode(tokenizer, [300], skip_special=False) == "<|mask|>"


@pytest.mark.parametrize("extra", [[], ["<|buffer1|>"]])
def test_an_assigned_mask_token_survives_saving(tmp_path, extra):
    tokenizer = load_tokenizer(minimind_like(tmp_path / "theirs", extra))
    save_tokenizer(tokenizer, tmp_path / "ours")
    again = load_tokenizer(tmp_path / "ours")
    assert token_ids(again) == token_ids(tokenizer)
    assert fingerprint(again) == fingerprint(tokenizer)


def test_a_mask_token_of_another_name_keeps_its_role(tmp_path):
    save_tokenizer(train_bpe(ENGLISH, 300, mask_token="[MASK]"), tmp_path)
    assert load_tokenizer(tmp_path).mask_token_id == 3


def test_a_mask_token_in_other_use_is_refused(small, tmp_path):
    save_tokenizer(small, tmp_path)
    for name in ("<|im_end|>", "t"):
        with pytest.raises(ValueError, match="already has another use"):
            load_tokenizer(tmp_path, mask_token=name)


def test_minimind_chat_ids_equal_those_of_its_template(tmp_path):
    tokenizer = load_tokenizer(minimind_like(tmp_path, []))
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert encode_chat(tokenizer, CHAT, True) == ids


def lower_case(state):
    state["normalizer"] = {"type": "Lowercase"}


def compose(state):
    state["normalizer"] = {"type": "NFC"}


@pytest.mark.parametrize("change", [lower_case, compose])
def test_a_tokenizer_that_alters_text_is_refused(small, tmp_path, change):
    save_tokenizer(small, tmp_path)
    edit_json(tmp_path / "tokenizer.json", change)
    with pytest.raises(ValueError, match="does not keep text exactly"):
        load_tokenizer(tmp_path)


def test_a_word_piece_tokenizer_is_refused(small, tmp_path):
    save_tokenizer(small, tmp_path)
    vocabulary = {name: i for i, name in enumerate([*SPECIAL_TOKENS, "[UNK]", "the", "##re"])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="does not keep text exactly"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("role", ["bos_token", "eos_token", "pad_token"])
def test_a_missing_role_is_named(small, tmp_path, role):
    save_tokenizer(small, tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", lambda config: config.update({role: "</s>"}))
    with pytest.raises(ValueError, match=f"{role} is required, and the file names '</s>', which is not in"):
        load_tokenizer(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", lambda config: config.pop(role))
    with pytest.raises(ValueError, match=f"{role} is required, and the file names none"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_missing_and_damaged_files_are_named(small, tmp_path, name):
    for content, complaint in (("{", "is not JSON"), ("", "is not JSON"), ("[]", "expected an object")):
        save_tokenizer(small, tmp_path)
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=complaint) as caught:
            load_tokenizer(tmp_path)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"holds no {re.escape(name)}"):
        load_tokenizer(tmp_path)


def test_json_that_is_no_tokenizer_is_refused(small, tmp_path):
    save_tokenizer(small, tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Oracle"}}', encoding="utf-8")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_file_in_place_of_the_directory_is_refused():
    with pytest.raises(ValueError, match="does not exist; give one that holds tokenizer.json"):
        load_tokenizer(ROOT / "tokenizer.json")


# --- fingerprint ---


def test_the_fingerprint_is_of_the_content_alone(small, tmp_path):
    save_tokenizer(small, tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    edit_json(tmp_path / "there" / "tokenizer.json", lambda state: state["model"].update(field_of_a_later_version=None))
    moved = load_tokenizer(tmp_path / "there")
    moved(["a", "b c"], padding=True, truncation=True, max_length=2)
    assert fingerprint(moved) == fingerprint(load_tokenizer(tmp_path / "here")) == fingerprint(small)
    assert re.fullmatch("[0-9a-f]{16}", fingerprint(small))


def swap_merges(state):
    merges = state["model"]["merges"]
    merges[-1], merges[-2] = merges[-2], merges[-1]


def drop_pre_tokenizer(state):
    state["pre_tokenizer"] = state["pre_tokenizer"]["pretokenizers"][-1]


@pytest.mark.parametrize("change", [swap_merges, drop_pre_tokenizer])
def test_the_fingerprint_changes_with_the_encoding(small, tmp_path, change):
    save_tokenizer(small, tmp_path)
    edit_json(tmp_path / "tokenizer.json", change)
    assert fingerprint(load_tokenizer(tmp_path)) != fingerprint(small)


def test_the_fingerprint_changes_with_a_role(small, tmp_path):
    save_tokenizer(small, tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", lambda config: config.update(mask_token="<|buffer0|>"))
    assert fingerprint(load_tokenizer(tmp_path, "<|buffer0|>")) != fingerprint(small)


def test_encoding_adds_nothing_where_transformers_would(tmp_path):
    """A post-processor that adds BOS is for other programs."""
    directory = minimind_like(tmp_path, [])
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    backend.save(str(directory / "tokenizer.json"))
    tokenizer = load_tokenizer(directory)
    assert tokenizer("word").input_ids[0] == 1
    assert decode(tokenizer, encode(tokenizer, "word"), skip_special=False) == "word"
