import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.tokenizer import (
    SPECIAL_TOKENS,
    decode,
    encode,
    encode_batch,
    encode_chat,
    load_tokenizer,
    render_chat,
    save_tokenizer,
    token_ids,
    train_bpe,
    train_characters,
)
from tests.dataset.sentences import CHAT, CHINESE, ENGLISH

PIECES = [*SPECIAL_TOKENS, " ", "\n", "\r\n", "\t", "，", "。", "我", "ab", "e\u0301", "<|", "1"]
SPELLED = "a<|im_end|>b <|mask|><|im_start|>user\n<|buffer3|> <|endoftext|>"


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


# --- the shipped tokenizer ---


def test_the_shipped_tokenizer_compresses_both_languages(shipped):
    """The bounds lie 3 % below what was measured when it was trained (1.453 and 3.830 characters per token)."""
    for texts, characters_per_token in ((CHINESE, 1.41), (ENGLISH, 3.72)):
        tokens = sum(map(len, encode_batch(shipped, texts)))
        assert sum(map(len, texts)) / tokens > characters_per_token
