"""Tokenised conversations: arrays of a file, from its rows to the cache."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import numpy as np

from dataset.cache import ArrayFiles
from dataset.content import content_hash
from dataset.reading.bad_rows import BadRows
from dataset.reading.files import Observer
from dataset.rows.formats import read_conversations
from dataset.rows.messages import Messages, is_learnt
from dataset.spelling import spelling_check
from dataset.tokenise import FileTokeniser, template_size
from dataset.tokenizer import ChatIds, encode_conversations, fingerprint, render_chat, token_dtype


@dataclass(frozen=True)
class Conversations:
    """Conversations back to back. Empty replies are left out: they would teach to answer nothing."""

    tokens: np.ndarray  # (T,) of all conversations
    starts: np.ndarray  # (C + 1,) where each begins, and the end
    reply_begins: np.ndarray  # (R,) first content token of each reply
    reply_ends: np.ndarray  # (R,) one past its EOS
    reply_owners: np.ndarray  # (R,) its conversation
    hashes: np.ndarray  # (C,) uint64, content_hash of the conversation

    @classmethod
    def of(cls, encoded: list[ChatIds], hashes: list[int], dtype: Any = np.int64) -> "Conversations":
        starts = np.cumsum([0, *(len(chat.ids) for chat in encoded)])
        spans = [
            (starts[owner] + begin, starts[owner] + end, owner)
            for owner, chat in enumerate(encoded)
            for begin, end in chat.replies
            if end - begin > 1
        ]
        replies = np.array(spans, dtype=np.int64).reshape(-1, 3).T
        tokens = np.fromiter(chain.from_iterable(chat.ids for chat in encoded), dtype, int(starts[-1]))
        return cls(tokens, starts, *replies, np.array(hashes, dtype=np.uint64))


class ConversationTokeniser(FileTokeniser):
    """The conversations of files."""

    unit, version, kind = "conversations", 5, "chat"
    num_replies = 0  # read so far, empty ones included

    def dtypes(self) -> dict[str, Any]:
        dtypes = {field.name: np.int64 for field in fields(Conversations)}
        return dtypes | {"tokens": token_dtype(self.tokenizer), "hashes": np.uint64}

    def read(self, observe: Observer | None, bad: BadRows) -> Iterator[Messages]:
        for file in self.files:
            for _, messages in read_conversations(file, observe, bad, spelling_check(self.tokenizer)):
                yield messages

    def size(self, row: Messages) -> int:
        return template_size(message["content"] for message in row)

    def encode(self, rows: list[Messages]) -> Conversations:
        hashes = [conversation_hash(messages) for messages in rows]
        return Conversations.of(encode_conversations(self.tokenizer, rows), hashes, token_dtype(self.tokenizer))

    def append(self, files: ArrayFiles, rows: list[Messages]) -> None:
        chats = self.encode(rows)
        self.num_replies += count_replies(rows)
        num_tokens, num_conversations = files.lengths["tokens"], files.lengths["hashes"]
        starts = chats.starts[1:] if num_conversations else chats.starts  # the first chunk begins with 0
        files.append("tokens", chats.tokens)
        files.append("starts", starts + num_tokens)
        files.append("reply_begins", chats.reply_begins + num_tokens)
        files.append("reply_ends", chats.reply_ends + num_tokens)
        files.append("reply_owners", chats.reply_owners + num_conversations)
        files.append("hashes", chats.hashes)

    def counts(self, files: ArrayFiles, bad: BadRows) -> dict[str, Any]:
        return {
            "conversations": files.lengths["hashes"],
            "replies": files.lengths["reply_begins"],
            "empty_replies": self.num_replies - files.lengths["reply_begins"],
            "tokens": files.lengths["tokens"],
            "tokenizer_fingerprint": fingerprint(self.tokenizer),
        }


def count_replies(rows: list[Messages]) -> int:
    """Number of replies that are to be learnt, empty ones included."""
    return sum(is_learnt(message) for messages in rows for message in messages)


def conversation_hash(messages: Messages) -> int:
    return content_hash(render_chat(messages, add_generation_prompt=False))
