"""What a file of training data holds, in one reading, by the functions that training reads it with.

Memory does not grow with the file, but for 12 bytes a row, by which copies are found.
"""

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from dataset import preferences, replies
from dataset.cache import unchanged
from dataset.jsonl import (
    BadRow,
    BadRows,
    chunked,
    content_hash,
    is_gzip_name,
    language_of,
    numbered_documents,
    read_rows,
    text_format,
)
from dataset.sft import FORMATS, TEMPLATE_CHARACTERS, read_conversations
from dataset.spelling import control_names, spelling_check
from dataset.tokenizer import (
    ROLES,
    PreTrainedTokenizerFast,
    encode_batch,
    encode_conversations,
    fingerprint,
    render_chat,
    token_dtype,
)

CHUNK_CHARACTERS = 1_000_000  # of text tokenised at a time
FIRST_ROWS = 100  # by which the kind of rows is told
MAX_REASONS = 1000  # told apart
SHOWN_COPIES = 5


class Findings(BadRows):
    """All bad rows, by reason."""

    shown = 20

    def __init__(self) -> None:
        super().__init__("skip")
        self.reasons: Counter[str] = Counter()

    def meet(self, row: BadRow) -> None:
        super().meet(row)
        # What differs from row to row, numbers and what stands in brackets or behind a semicolon, is left out.
        reason = re.sub(r"(?<![-\w])\d+", "N", re.split(r";| \(", row.reason)[0])
        self.reasons[reason if reason in self.reasons or len(self.reasons) < MAX_REASONS else "other"] += 1

    def refuse_all(self, path: Path) -> None:
        """A file of bad rows alone is a finding, too."""


def kind_of_rows(path: Path, field: str) -> str:
    """ "pairs", "chat" or "text": what most of the first rows are; "text" where they are neither."""
    if text_format(path) == ".txt":
        return "text"
    votes: Counter[str] = Counter()
    for _, row in islice(read_rows(path, bad=Findings()), FIRST_ROWS):
        if {"chosen", "rejected"} <= row.keys():
            votes["pairs"] += 1
        elif any(row.keys() >= set(form.fields) for form in FORMATS.values()):
            votes["chat"] += 1
        elif field in row:
            votes["text"] += 1
    return votes.most_common(1)[0][0] if votes else "text"


class Row(NamedTuple):
    """A row, tokenised."""

    number: int
    texts: list[str]  # its contents, whose characters and language count
    key: str  # by which copies are told
    length: int  # tokens that training would make of it
    text_tokens: int  # of them, those of `texts`


class Survey:
    """One reading of `path`; `result` is what was found, in types that JSON holds.

    kind: of its rows, "text", "chat" or "pairs". ValueError, FileNotFoundError: the file cannot be read to its end.
    """

    def __init__(
        self, path: Path, kind: str, tokenizer: PreTrainedTokenizerFast, max_seq_len: int, field: str = "text"
    ):
        self.path, self.tokenizer, self.max_seq_len, self.field = path, tokenizer, max_seq_len, field
        self.bad, self.check, self.names = Findings(), spelling_check(tokenizer), control_names(tokenizer)
        self.lines = self.size = 0
        self.digest = hashlib.sha256()
        self.rows = self.empty = 0
        self.lengths: Counter[int] = Counter()
        self.characters: Counter[int] = Counter()  # by bit length
        self.longest = 0, 0  # tokens and row
        self.languages: dict[str, Counter[str]] = {}
        self.spelled: Counter[str] = Counter()
        self.first_spelled: list[int] = []
        self.hashes, self.numbers = array("Q"), array("I")
        self.more: Counter[str] = Counter()
        read: Callable[[], Iterator[Row]] = {"text": self._documents, "chat": self._chats, "pairs": self._pairs}[kind]
        # How much text a .gz holds is not known, so its bar has a speed but no end. disable=None: terminals only.
        total = None if is_gzip_name(path) else path.stat().st_size
        with (
            unchanged(path),
            tqdm(total=total, desc="reading", unit="B", unit_scale=True, disable=None, leave=False) as self.bar,
        ):
            for row in read():
                self._count(row)
        self.result = self._result(kind)

    def _observe(self, line: bytes) -> None:
        self.lines += 1
        self.size += len(line)
        self.digest.update(line)
        self.bar.update(len(line))

    def _count(self, row: Row) -> None:
        self.rows += 1
        size = sum(map(len, row.texts))
        self.lengths[row.length] += 1
        self.characters[size.bit_length()] += 1
        self.longest = max(self.longest, (row.length, -row.number))
        language = self.languages.setdefault(language_of("\n".join(row.texts)), Counter())
        language.update(rows=1, characters=size, text_tokens=row.text_tokens)
        spelled = sorted({name for text in row.texts for name in self.names.findall(text)})
        if spelled:
            self.spelled.update(spelled)
            self.more["spelling_rows"] += 1
            self.more["barred_rows"] += not {self.tokenizer.mask_token, self.tokenizer.pad_token}.isdisjoint(spelled)
            if len(self.first_spelled) < SHOWN_COPIES:
                self.first_spelled.append(row.number)
        self.hashes.append(content_hash(row.key))
        self.numbers.append(row.number)

    # -- the kinds of rows ---------------------------------------------------------------------------------------------

    def _documents(self) -> Iterator[Row]:
        documents = numbered_documents(self.path, self.field, self.bad, self.check, self._observe)
        for chunk in chunked(documents, lambda pair: len(pair[1]), CHUNK_CHARACTERS):
            texts = [pair for pair in chunk if pair[1]]
            self.empty += len(chunk) - len(texts)
            encoded = encode_batch(self.tokenizer, [text for _, text in texts])
            for (number, text), ids in zip(texts, encoded, strict=True):
                length = len(ids) + 2
                self.more.update(tokens=length, longer=length > self.max_seq_len, blank_rows=not text.strip())
                yield Row(number, [text], text, length, len(ids))

    def _chats(self) -> Iterator[Row]:
        around = self._tokens_around_content()
        rows = read_conversations(self.path, self._observe, self.bad, self.check)
        for chunk in chunked(rows, lambda pair: _size(m["content"] for m in pair[1]), CHUNK_CHARACTERS):
            conversations = [messages for _, messages in chunk]
            encoded = encode_conversations(self.tokenizer, conversations)
            chats = replies.Conversations.of(encoded, [0] * len(chunk), token_dtype(self.tokenizer))
            for name, together in (("ar", True), ("diffusion", False)):
                every = np.arange(len(chats.reply_begins))
                first = every[replies.rows_begin(chats, every, self.max_seq_len, together)]
                whole = replies.items_of(chats, first, self.max_seq_len, together)
                self._count_shortened(name, whole.lengths, replies.shortened(whole, self.max_seq_len))
            for (number, messages), chat in zip(chunk, encoded, strict=True):
                roles = [message["role"] for message in messages]
                contents = [message["content"] for message in messages]
                empty = sum(not message["content"] for message in messages if message["role"] == "assistant")
                self.more.update(f"{role} messages" for role in roles)
                answered = roles.count("assistant")
                self.more.update(replies=answered, empty_replies=empty, several_replies=answered > 1)
                content_tokens = len(chat.ids) - sum(around[role] for role in roles)
                yield Row(number, contents, render_chat(messages, False), len(chat.ids), content_tokens)

    def _pairs(self) -> Iterator[Row]:
        around = self._tokens_around_content()
        rows = preferences.read_pairs(self.path, self._observe, self.bad, self.check)
        for chunk in chunked(rows, lambda pair: _size(preferences.contents_of(pair[1])), CHUNK_CHARACTERS):
            pairs = preferences.Pairs.of(self.tokenizer, [pair for _, pair in chunk])
            every = np.arange(len(pairs))
            items = preferences.items_of(pairs, every, self.max_seq_len)
            ends = pairs.starts[1:].reshape(-1, 3)
            prompts, chosen, rejected = np.diff(pairs.starts).reshape(-1, 3).T
            lengths = prompts + np.maximum(chosen, rejected)
            self._count_shortened("pairs", lengths, items.rows)
            equal = preferences.equal_replies(pairs, every, items)
            self.more.update(equal_replies=int(equal.sum()), longer_chosen=int((chosen > rejected).sum()))
            tokens = ends[:, 2] - pairs.starts[:-1:3]
            for (number, pair), length, count in zip(chunk, lengths.tolist(), tokens.tolist(), strict=True):
                template = sum(around[message["role"]] for message in pair.prompt) + around["reply"]
                key = "\n".join([render_chat(pair.prompt, True), pair.chosen, "", pair.rejected])
                yield Row(number, preferences.contents_of(pair), key, length, count - template)

    def _tokens_around_content(self) -> dict[str, int]:
        """Tokens of a message of each role besides its content; "reply": of an open turn, and two replies' EOS."""
        empty = [[{"role": role, "content": ""}] for role in ROLES]
        messages = encode_conversations(self.tokenizer, empty)
        around = {role: len(chat.ids) for role, chat in zip(ROLES, messages, strict=True)}
        (begin, _), *_ = messages[ROLES.index("assistant")].replies
        return around | {"reply": begin + 2}

    def _count_shortened(self, name: str, lengths: np.ndarray, kept: replies.Items) -> None:
        self.more.update(
            {
                f"{name} rows": len(kept),
                f"{name} tokens": int(lengths.sum()),
                f"{name} lost": int((lengths - kept.lengths).sum()),
                f"{name} shortened": kept.num_shortened,
                f"{name} cut_prompts": kept.cut_prompts,
                f"{name} cut_replies": kept.cut_bodies,
            }
        )

    # -- what was found ------------------------------------------------------------------------------------------------

    def _result(self, kind: str) -> dict[str, Any]:
        rows = self.rows + self.empty + self.bad.count
        length, minus_number = self.longest
        copies, first_copies = self._copies()
        return {
            "file": str(self.path),
            "kind": kind,
            "bytes": self.path.stat().st_size,
            "unpacked_bytes": self.size,
            "data_sha256": self.digest.hexdigest(),
            "tokenizer": fingerprint(self.tokenizer),
            "max_seq_len": self.max_seq_len,
            "lines": self.lines,
            "rows": rows,
            "used_rows": self.rows,
            "empty_rows": self.empty,
            "bad_rows": self.bad.count,
            "first_bad": self.bad.first,
            "bad_by_reason": dict(self.bad.reasons.most_common()),
            "copies": copies,
            "first_copies": first_copies,
            "languages": {name: dict(found) for name, found in sorted(self.languages.items(), reverse=True)},
            "control_tokens": dict(self.spelled.most_common()),
            "first_spelling_rows": self.first_spelled,
            "lengths": {str(length): self.lengths[length] for length in sorted(self.lengths)},
            "characters_by_bit_length": {str(size): self.characters[size] for size in sorted(self.characters)},
            "longest": {"tokens": length, "row": -minus_number},
            "counts": dict(self.more),
        }

    def _copies(self) -> tuple[int, list[tuple[int, int]]]:
        """How many rows repeat an earlier one, and of the first of them both numbers, the earlier one last."""
        if not self.hashes:
            return 0, []
        hashes, numbers = np.frombuffer(self.hashes, np.uint64), np.frombuffer(self.numbers, np.uint32)
        order = np.argsort(hashes, kind="stable")
        ascending = hashes[order]
        copies = np.sort(order[1:][ascending[1:] == ascending[:-1]])
        first = copies[:SHOWN_COPIES]
        originals = order[np.searchsorted(ascending, hashes[first])]
        return len(copies), list(zip(numbers[first].tolist(), numbers[originals].tolist(), strict=True))


def _size(contents: Iterable[str]) -> int:
    return sum(len(content) + TEMPLATE_CHARACTERS for content in contents)
