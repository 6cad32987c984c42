import json
import re
import shutil
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from dataset.tokenizer import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    decode,
    encode,
    encode_batch,
    encode_chat,
    fingerprint,
    load_tokenizer,
    render_chat,
    save_tokenizer,
    token_ids,
    train_bpe,
    train_characters,
)

ROOT = Path(__file__).parents[2]
ENGLISH = [
    "The old man walked slowly to the river, and there he sat down to think about his children.",
    "She did not know what to say, so she smiled and asked him whether he would like some tea.",
    "In the morning the streets were full of people who had come to see the new king.",
    "Water boils at a lower temperature on a mountain because the air pressure is lower there.",
    "A computer program is a list of instructions which tells the machine what it should do next.",
    "I don't think we've met before; I'm a teacher at the school near the station.",
]
CHINESE = [
    "今天天气很好，我们一起去公园散步，看到很多人在湖边唱歌跳舞。",
    "他说自己从小就喜欢读书，可是家里没有钱，只好到城里去做工。",
    "人工智能可以帮助我们解决很多问题，但是也需要注意安全。",
    "如果你感到压力很大，可以试着和朋友聊一聊，或者出去运动一下。",
    "公司应当按照国家有关规定建立健全管理制度，并向主管部门报告。",
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
]
CHAT = [
    {"role": "system", "content": "你是一个助手。"},
    {"role": "user", "content": "What is 12 + 30?"},
    {"role": "assistant", "content": "答案是 42。\n\nThat's it."},
]
PIECES = [*SPECIAL_TOKENS, " ", "\n", "\r\n", "\t", "，", "。", "我", "ab", "e\u0301", "<|", "1"]
SPELLED = "a<|im_end|>b <|mask|><|im_start|>user\n<|buffer3|> <|endoftext|>"


@pytest.fixture(scope="module")
def shipped():
    return load_tokenizer(ROOT)


@pytest.fixture(scope="module")
def small():
    return train_bpe(ENGLISH + CHINESE + ["2026 2026 2026"] * 9, 330)


@pytest.fixture(scope="module")
def characters():
    return train_characters(ENGLISH + CHINESE + ["\n \t"])


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


# --- ids and roles ---


def test_control_tokens_have_the_documented_ids(shipped, small, characters):
    for tokenizer in (shipped, small, characters):
        assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(16))
    assert SPECIAL_TOKENS[:4] == ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>")
    assert SPECIAL_TOKENS[4:] == ("<|delete|>", "<|insert|>", *(f"<|buffer{i}|>" for i in range(10)))


def test_roles_of_the_shipped_tokenizer(shipped):
    expected = {"vocab_size": 6400, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "mask_token_id": 3}
    assert token_ids(shipped) == expected


def test_every_id_below_the_vocabulary_size_has_a_token(shipped, small, characters):
    for tokenizer in (shipped, small, characters):
        assert sorted(tokenizer.get_vocab().values()) == list(range(token_ids(tokenizer)["vocab_size"]))


# --- round trips ---


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_any_text_comes_back_exactly(shipped, small, text):
    for tokenizer in (shipped, small):
        ids = encode(tokenizer, text)
        assert decode(tokenizer, ids) == text
        assert not set(ids) & set(range(16))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES)))
def test_text_that_spells_control_tokens_is_plain_text(shipped, characters, pieces):
    """With every control token spelled among line breaks and blanks, where a tokenizer is most tempted to join them."""
    text = "".join(pieces)
    ids = encode(shipped, text)
    assert decode(shipped, ids) == text
    assert not set(ids) & set(range(16))


@pytest.mark.parametrize("text", ["", " ", "   a", "a   ", "\n\n\n", "\r\n\r", "\0", "\ufeffa", "\u200b", "\U0010ffff"])
def test_awkward_text_comes_back_exactly(shipped, text):
    assert decode(shipped, encode(shipped, text)) == text


def test_bytes_that_are_not_yet_a_character_decode_to_a_replacement(shipped):
    ids = encode(shipped, "🜁")
    assert len(ids) > 1
    assert set(decode(shipped, ids[:-1])) == {"\ufffd"}


def test_decode_leaves_out_control_tokens_unless_told(shipped, characters):
    assert decode(characters, range(16)) == decode(shipped, range(16)) == ""
    ids = [1, *encode(shipped, "Hello , world ."), 3, 2]
    assert decode(shipped, ids) == "Hello , world ."
    assert decode(shipped, ids, skip_special=False) == "<|im_start|>Hello , world .<|mask|><|im_end|>"


def test_half_a_surrogate_pair_is_refused(shipped, characters):
    for tokenizer in (shipped, characters):
        with pytest.raises(ValueError, match=r"U\+D83D at character 2: half of a surrogate pair"):
            encode(tokenizer, "ok\ud83d")
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        train_bpe(["\udc00"], 300)


def test_digits_are_encoded_one_by_one(shipped, small):
    for tokenizer in (shipped, small):
        assert [decode(tokenizer, [i]) for i in encode(tokenizer, "20260801")] == list("20260801")


@pytest.mark.parametrize("after", ["word", "汉字", "，然后", " indented", "7"])
def test_no_token_reaches_over_a_line_break(shipped, after):
    """So the header of a chat turn has the same ids whatever follows."""
    head = encode(shipped, "user\n")
    assert encode(shipped, "user\n" + after)[: len(head)] == head


def test_batch_equals_single_even_after_transformers_used_the_backend(shipped):
    texts = [*ENGLISH, *CHINESE, "", SPELLED]
    alone = [encode(shipped, text) for text in texts]
    shipped(texts, padding=True, truncation=True, max_length=4)  # leaves padding and truncation switched on
    assert encode_batch(shipped, texts) == alone
    assert encode(shipped, SPELLED) == alone[-1]
    assert encode_batch(shipped, []) == []


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


@pytest.mark.parametrize("value", ["false", "true"])
def test_a_parallelism_setting_of_the_user_changes_nothing(shipped, monkeypatch, value):
    texts = (ENGLISH + CHINESE) * 20
    alone = [encode(shipped, text) for text in texts]
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
    assert encode_batch(shipped, texts) == alone


# --- chat ---


def test_a_conversation_renders_as_minimind_does():
    golden = (
        "<|im_start|>system\n你是一个助手。<|im_end|>\n"
        "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n"
        "<|im_start|>assistant\n答案是 42。\n\nThat's it.<|im_end|>\n"
    )
    assert render_chat(CHAT, False) == golden
    assert render_chat(CHAT, True) == golden + "<|im_start|>assistant\n"


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("prompt", [False, True])
def test_chat_ids_equal_those_of_the_stored_template(shipped, small, count, prompt):
    for tokenizer in (shipped, small):
        messages = CHAT[:count]
        theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        assert encode_chat(tokenizer, messages, prompt) == theirs
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False) == render_chat(
            messages, prompt
        )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=20) | st.sampled_from([SPELLED, "\n", " x"]), min_size=1, max_size=4))
def test_contents_never_become_control_tokens(shipped, contents):
    messages = [{"role": "user", "content": content} for content in contents]
    ids = encode_chat(shipped, messages, True)
    assert decode(shipped, ids, skip_special=False) == render_chat(messages, True)
    assert [i for i in ids if i < 16] == [1, 2] * len(contents) + [1]


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=20))
def test_a_prompt_is_a_prefix_of_the_prompt_with_its_answer(shipped, answer):
    prompt = encode_chat(shipped, CHAT[:2], True)
    whole = encode_chat(shipped, [*CHAT[:2], {"role": "assistant", "content": answer}], False)
    assert whole == prompt + encode(shipped, answer) + [2] + encode(shipped, "\n")


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "needs at least one message"),
        ([{"role": "user"}], 'message 1 needs the keys "role" and "content"; found: role'),
        ([CHAT[1], "hello"], "message 2 needs the keys .* found: str"),
        ([{"role": "human", "content": ""}], "message 1 has role 'human'; expected one of system, user, assistant"),
        ([{"role": ["user"], "content": ""}], "message 1 has role"),
        ([CHAT[1], {"role": "assistant", "content": None}], "content of message 2 is NoneType; expected a string"),
    ],
)
def test_a_malformed_conversation_is_refused(shipped, messages, complaint):
    with pytest.raises(ValueError, match=complaint):
        render_chat(messages, False)
    with pytest.raises(ValueError, match=complaint):
        encode_chat(shipped, messages, False)


# --- training ---


def test_training_twice_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        save_tokenizer(train_bpe(iter(ENGLISH + CHINESE), 330), tmp_path / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_the_vocabulary_has_exactly_the_size_asked_for(small):
    assert len(small) == 330
    assert len(train_bpe(["any"], 16 + 256)) == 272


def test_no_token_joins_han_characters_and_marks():
    """So a prompt may end on either side of a comma without meeting a token unseen in training."""
    tokenizer = train_bpe(["你好，世界。再见！"] * 99, 307)
    pieces = [decode(tokenizer, [i]) for i in encode(tokenizer, "你好，世界。再见！")]
    assert pieces == ["你好", "，", "世界", "。", "再见", "！"]


def test_a_role_name_of_the_chat_format_is_one_token(shipped, small):
    for tokenizer in (shipped, small):
        for role in ("system", "user", "assistant"):
            assert len(encode(tokenizer, f"{role}\n")) == 2


@pytest.mark.parametrize(
    ("texts", "size", "complaint"),
    [
        (ENGLISH, 271, "needs at least 272 entries, not 271"),
        ([], 300, "no text"),
        (["", ""], 300, "no text"),
        (["one two"], 5000, "fills only [0-9]+ of 5000 vocabulary entries"),
    ],
)
def test_training_that_cannot_give_the_vocabulary_is_refused(texts, size, complaint):
    with pytest.raises(ValueError, match=complaint):
        train_bpe(texts, size)


def test_another_mask_token_takes_the_same_place():
    tokenizer = train_bpe(ENGLISH, 300, mask_token="[MASK]")
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("[MASK]", 3)
    for name in ("<|im_end|>", "x"):
        with pytest.raises(ValueError, match="must be a name of its own"):
            train_characters(ENGLISH, mask_token=name)


# --- characters ---


def test_a_character_is_a_token(characters):
    text = ENGLISH[0] + "\n\t " + CHINESE[0]
    assert len(encode(characters, text)) == len(text)
    assert decode(characters, encode(characters, text)) == text
    assert characters.get_vocab().keys() - set(SPECIAL_TOKENS) == set("".join(ENGLISH + CHINESE) + "\n \t")


def test_characters_are_numbered_in_code_point_order():
    tokenizer = train_characters(["cab", "\nb我"])
    assert encode(tokenizer, "\nabc我") == [16, 17, 18, 19, 20]


def test_an_unknown_character_is_named(characters, tmp_path):
    save_tokenizer(characters, tmp_path)
    for tokenizer in (characters, load_tokenizer(tmp_path)):
        with pytest.raises(ValueError, match=r"character '龘' \(U\+9F98\) is not in the vocabulary"):
            encode_batch(tokenizer, ["the", "th龘"])


def test_characters_of_a_control_token_stay_characters():
    tokenizer = train_characters([SPELLED])
    ids = encode(tokenizer, "<|im_end|>")
    assert len(ids) == 10 and min(ids) >= 16
    assert decode(tokenizer, ids) == "<|im_end|>"


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


# --- the shipped tokenizer ---


def test_the_shipped_tokenizer_compresses_both_languages(shipped):
    """The bounds lie 3 % below what was measured when it was trained (1.453 and 3.830 characters per token)."""
    for texts, characters_per_token in ((CHINESE, 1.41), (ENGLISH, 3.72)):
        tokens = sum(map(len, encode_batch(shipped, texts)))
        assert sum(map(len, texts)) / tokens > characters_per_token
