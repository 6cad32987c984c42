"""Text to token ids and back: load, train and save tokenizers, and the chat format.

Contract: `encode` treats text as plain data. A document that spells <|im_end|> or <|mask|> gets the ids of those
characters; only code that names an id (`encode_chat`, packing, noising), or that asks for it with `control=True`, can
put a control token into a sequence.
(Tokens that a foreign tokenizer declares as ordinary text, such as MiniMind's <think>, are text.)
Every tokenizer accepted here is lossless: decode(encode(text)) == text.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from operator import length_hint
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dataset.rows.messages import ROLES, Messages, checked_messages, is_learnt

MASK_TOKEN = "<|mask|>"
SPECIAL_TOKENS = (
    "<|endoftext|>",  # padding
    "<|im_start|>",  # BOS
    "<|im_end|>",  # EOS
    MASK_TOKEN,
    "<|delete|>",
    "<|insert|>",
    *(f"<|buffer{i}|>" for i in range(10)),  # reserved: a later stage can take one without resizing the model
)
BYTE_ALPHABET_SIZE = 256
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# How text is cut before byte pairs are merged; no merge crosses a cut. In order: English contractions; a run of Han
# characters; a run of other letters with at most one leading space; one digit; marks with the line breaks after them;
# line breaks; blanks, leaving the last one to the word that follows.
# Han characters and marks are kept apart, so that a prompt may end on either side of a comma. Joining a mark to the run
# after it saved 2 % of Chinese tokens, but a fifth more characters were then split over two tokens, which diffusion
# decodes independently. A line break is never joined to text after it: a chat header has the same ids in every turn.
SPLIT_PATTERN = (
    r"'(?:[sdmtSDMT]|ll|LL|ve|VE|re|RE)"
    r"|\p{Han}+"
    r"| ?[^\P{L}\p{Han}]+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
# What a lossy tokenizer gets wrong: case, accents, composed forms, runs of blanks, unusual blanks, control words.
PROBE = "  Ab é e\u0301 ﬁ Ⅷ\t 12 ， 你好。\n\n \u3000\u200b\u00a0🙂 don't <|im_end|> <|mask|> \x00 "


def load_tokenizer(directory: Path, mask_token: str = MASK_TOKEN) -> PreTrainedTokenizerFast:
    """Load tokenizer.json and tokenizer_config.json from `directory`, never from the network.

    A directory without `mask_token` (MiniMind's) gives the role to its own mask token, else to its first reserved
    <|buffer...|> token; failing both, one token is added, and the vocabulary grows by one.
    ValueError: missing or corrupt files, no BOS, EOS or padding token, or a tokenizer that does not keep text exactly.
    """
    directory = Path(directory)
    _check_files(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    _assign_mask(tokenizer, mask_token, directory)
    _check_lossless(tokenizer, directory)
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write a directory for `load_tokenizer` and transformers.AutoTokenizer; each file appears whole or not at all."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "mask_token": tokenizer.mask_token,
        "model_max_length": 32768,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _write_atomically(directory / "tokenizer.json", json.dumps(_stateless(tokenizer), ensure_ascii=False, indent=1))
    _write_atomically(directory / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2))


def token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The ModelConfig fields that a tokenizer determines; `vocab_size` counts added tokens, too."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")
    return {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in names}}


def token_dtype(tokenizer: PreTrainedTokenizerFast) -> np.dtype:
    """The smallest type of unsigned integer, of 2 or 4 bytes, that holds every id."""
    return np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """16 hex digits that change when any text would be encoded otherwise, or a control token has another id.

    Independent of where the files lie, of truncation and padding left switched on, and of fields that other library
    versions write with an empty or false value.
    """
    state = {key: value for key, value in _stateless(tokenizer).items() if key not in ("version", "post_processor")}
    state["roles"] = token_ids(tokenizer)
    text = json.dumps(_without_empty(state), ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def encode(tokenizer: PreTrainedTokenizerFast, text: str, control: bool = False) -> list[int]:
    """Ids of `text` as plain data: nothing added, nothing cut. ValueError: a character the vocabulary cannot spell.

    control: text that spells a control token becomes that token.
    """
    return encode_batch(tokenizer, [text], control)[0]


def encode_batch(tokenizer: PreTrainedTokenizerFast, texts: list[str], control: bool = False) -> list[list[int]]:
    """`encode` of every text, on all cores unless TOKENIZERS_PARALLELISM=false."""
    backend = tokenizer.backend_tokenizer
    # transformers leaves these three set on the shared backend after a call, and sets them anew before each of its own.
    backend.encode_special_tokens = not control
    backend.no_truncation()
    backend.no_padding()
    _check_spellable(backend, texts, control)
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def decode(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int], skip_special: bool = True) -> str:
    """The exact text of `ids`; incomplete UTF-8 becomes U+FFFD. `skip_special=False` spells out control tokens."""
    # Not tokenizer.decode: that may remove spaces before punctuation (clean_up_tokenization_spaces).
    return tokenizer.backend_tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special)


def render_chat(messages: Messages, add_generation_prompt: bool) -> str:
    """A conversation as text, to be shown; to get ids use `encode_chat`. Raises ValueError as that does."""
    turns = [f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in checked_messages(messages)]
    return "".join(turns) + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def encode_chat(
    tokenizer: PreTrainedTokenizerFast,
    messages: Messages,
    add_generation_prompt: bool,
    control: bool = False,
) -> list[int]:
    """Ids of a conversation: BOS role newline content EOS newline per message; add_generation_prompt opens a turn.

    Each part is encoded alone, so a prompt's ids are a prefix of the ids of the same prompt with its answer, and
    content that spells a control token stays content. ValueError: no message, an unknown role, content not a string.

    control: what is not the assistant's may hold control tokens (see `encode`); what a model has written is text.
    """
    ids = encode_conversations(tokenizer, [messages], control)[0].ids
    return ids + ([tokenizer.bos_token_id, *encode(tokenizer, "assistant\n")] if add_generation_prompt else [])


class ChatIds(NamedTuple):
    """A conversation as `encode_chat` writes it."""

    ids: list[int]
    replies: list[tuple[int, int]]  # of each that is learnt: where its content begins, one past its EOS


def encode_conversations(
    tokenizer: PreTrainedTokenizerFast, conversations: Sequence[Messages], control: bool = False
) -> list[ChatIds]:
    """`encode_chat` of many conversations at once, with the places of their replies. Raises ValueError as that does."""
    checked = [checked_messages(messages) for messages in conversations]
    messages = [message for pairs in checked for message in pairs]
    written = [content for role, content in messages if role == "assistant"]
    given = [content for role, content in messages if role != "assistant"]
    written_ids, given_ids = iter(encode_batch(tokenizer, written)), iter(encode_batch(tokenizer, given, control))
    headers = dict(zip(ROLES, encode_batch(tokenizer, [f"{role}\n" for role in ROLES]), strict=True))
    bos, eos, newline = tokenizer.bos_token_id, tokenizer.eos_token_id, encode(tokenizer, "\n")
    encoded = []
    for conversation in conversations:
        ids, replies = [], []
        for message in conversation:
            role = message["role"]
            ids += [bos, *headers[role]]
            begin = len(ids)
            ids += [*next(written_ids if role == "assistant" else given_ids), eos]
            if is_learnt(message):
                replies.append((begin, len(ids)))
            ids += newline
        encoded.append(ChatIds(ids, replies))
    return encoded


def train_bpe(texts: Iterable[str], vocab_size: int, mask_token: str = MASK_TOKEN) -> PreTrainedTokenizerFast:
    """Byte-level BPE of exactly `vocab_size` entries: SPECIAL_TOKENS, 256 bytes, merges. Same texts, same tokenizer.

    No normalisation, and every byte has a token, so any text round-trips. The names in ROLES count once per text, too,
    which makes each of them one token in the turn headers of SFT data. ValueError: no text, `vocab_size` too small
    for the fixed entries, or too little text to fill it (a vocabulary of another size than asked would surprise later).
    """
    specials = _special_tokens(mask_token)
    smallest = len(specials) + BYTE_ALPHABET_SIZE
    if vocab_size < smallest:
        raise ValueError(f"a byte-level vocabulary needs at least {smallest} entries, not {vocab_size}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    pieces = (piece for text in _nonempty(texts) for piece in (text, *ROLES))
    backend.train_from_iterator(pieces, trainer, length=length_hint(texts) * (1 + len(ROLES)))  # of the progress bar
    if backend.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the training text fills only {backend.get_vocab_size()} of {vocab_size} vocabulary entries; "
            "give more text or ask for a smaller vocabulary"
        )
    return _with_roles(backend, mask_token)


def train_characters(texts: Iterable[str], mask_token: str = MASK_TOKEN) -> PreTrainedTokenizerFast:
    """One token per character that occurs in `texts`, after SPECIAL_TOKENS, in code point order.

    Encoding any other character is a ValueError, for there is no unknown token. ValueError: no text.
    """
    specials = _special_tokens(mask_token)
    characters = sorted(set().union(*map(set, _nonempty(texts))))
    entries = [str(token) for token in specials] + characters
    backend = Tokenizer(models.WordLevel({entry: i for i, entry in enumerate(entries)}, unk_token=""))
    backend.add_special_tokens(specials)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return _with_roles(backend, mask_token)


def _special_tokens(mask_token: str) -> list[AddedToken]:
    names = [mask_token if name == MASK_TOKEN else name for name in SPECIAL_TOKENS]
    if len(set(names)) < len(names) or len(mask_token) < 2:
        raise ValueError(f"mask token {mask_token!r} must be a name of its own, of more than one character")
    return [AddedToken(name, special=True, normalized=False) for name in names]


def _with_roles(backend: Tokenizer, mask_token: str) -> PreTrainedTokenizerFast:
    pad, bos, eos = SPECIAL_TOKENS[:3]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        mask_token=mask_token,
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _nonempty(texts: Iterable[str]) -> Iterator[str]:
    """Pass texts on; ValueError if all are empty, or if one holds half a surrogate pair (which UTF-8 cannot spell)."""
    length = 0
    for text in texts:
        _check_unicode(text)
        length += len(text)
        yield text
    if not length:
        raise ValueError("there is no text to train a tokenizer on")


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text holds U+{ord(text[error.start]):04X} at character {error.start}: half of a surrogate pair, "
            "which is not a Unicode character; remove it from the data"
        ) from None


def _check_spellable(backend: Tokenizer, texts: list[str], control: bool) -> None:
    for text in texts:
        _check_unicode(text)
    if isinstance(backend.model, models.WordLevel):
        if control:
            names = [re.escape(token.content) for token in backend.get_added_tokens_decoder().values()]
            texts = [re.sub("|".join(names), "", text) for text in texts]
        for character in sorted(set().union(*texts)):
            if backend.token_to_id(character) is None:
                raise ValueError(
                    f"character {character!r} (U+{ord(character):04X}) is not in the vocabulary of this character "
                    "tokenizer, which knows only the characters it was trained on"
                )


def _check_files(directory: Path) -> None:
    """Refuse what transformers would report unclearly, look up on the network, or quietly repair by adding a token."""
    if not directory.is_dir():
        raise ValueError(f"tokenizer directory {directory} does not exist; give one that holds tokenizer.json")
    remedy = "write one with: python -m scripts.train.train_tokenizer --out DIRECTORY"
    contents = {}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{directory} holds no {name}, which a tokenizer directory needs; {remedy}")
        try:
            contents[name] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); copy it again, or {remedy}") from None
        if not isinstance(contents[name], dict):
            raise ValueError(f"{path} holds a JSON {type(contents[name]).__name__}, expected an object; {remedy}")
    try:
        vocabulary = Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab()
    except Exception as error:  # the Rust library raises nothing more specific
        raise ValueError(f"{directory / 'tokenizer.json'} is not a tokenizer ({error}); {remedy}") from None
    for role in ("bos_token", "eos_token", "pad_token"):
        token = contents["tokenizer_config.json"].get(role)
        token = token["content"] if isinstance(token, dict) else token
        if token not in vocabulary:
            name = "none" if token is None else f"{token!r}, which is not in tokenizer.json"
            raise ValueError(f"{directory / 'tokenizer_config.json'}: {role} is required, and the file names {name}")


def _assign_mask(tokenizer: PreTrainedTokenizerFast, mask_token: str, directory: Path) -> None:
    backend = tokenizer.backend_tokenizer
    added = [token.content for _, token in sorted(backend.get_added_tokens_decoder().items())]
    taken = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    if mask_token in taken or (mask_token in tokenizer.get_vocab() and mask_token not in added):
        raise ValueError(f"mask token {mask_token!r} already has another use in {directory}; choose another name")
    reserved = [name for name in added if re.fullmatch(r"<\|buffer\d+\|>", name)]
    # MiniMind marks its reserved tokens as ordinary ones, which text that spells them would then be turned into.
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in reserved])
    present = [name for name in (mask_token, tokenizer.mask_token, *reserved) if name in added]
    name = (present or [mask_token])[0]
    tokenizer.add_special_tokens({"mask_token": AddedToken(name, special=True, normalized=False)})


def _check_lossless(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    backend = tokenizer.backend_tokenizer
    if isinstance(backend.model, models.WordLevel):
        probe = "".join(sorted(token for token in backend.get_vocab() if len(token) == 1)) * 2
    else:
        probe = PROBE
    back = decode(tokenizer, encode(tokenizer, probe), skip_special=False)
    if back != probe:
        raise ValueError(
            f"the tokenizer in {directory} does not keep text exactly: {probe!r} comes back as {back!r}; "
            "use a byte-level BPE tokenizer without a normalizer"
        )


def _stateless(tokenizer: PreTrainedTokenizerFast) -> dict:
    """tokenizer.json as a dict, without what transformers sets on the backend while it works."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return {**state, "truncation": None, "padding": None, "post_processor": None}


def _without_empty(value):
    if isinstance(value, dict):
        return {key: _without_empty(item) for key, item in value.items() if item not in (None, False, "")}
    return [_without_empty(item) for item in value] if isinstance(value, list) else value


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text + "\n", encoding="utf-8", newline="\n")
    partial.replace(path)
