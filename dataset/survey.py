"""What a file of training data holds, in one reading, by the functions that training reads it with.

Memory is constant except for 14 bytes per row, to find copies.
"""

import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset import preferences, replies
from dataset.cache import unchanged
from dataset.content import content_hash, language_of
from dataset.conversations import Conversations
from dataset.reading.bad_rows import BadRow, BadRows
from dataset.reading.documents import numbered_documents
from dataset.reading.files import container_of, describe_files, is_plain_text
from dataset.reading.rows import chunked
from dataset.rows.choice_formats import read_questions
from dataset.rows.exercise_formats import read_exercises
from dataset.rows.formats import read_conversations
from dataset.rows.messages import ROLES, Messages, is_learnt
from dataset.rows.pair_formats import read_pairs
from dataset.spelling import control_names, spelling_check
from dataset.tokenise import CHUNK_CHARACTERS, Pass, template_size
from dataset.tokenizer import PreTrainedTokenizerFast, encode_batch, encode_conversations, fingerprint, render_chat

MAX_REASONS = 1000  # counted separately
IN_LINES = {".txt", ".jsonl"}  # containers that are read line by line
MAX_EXAMPLES = 5  # of copies, and of rows that spell control tokens


class AllBadRows(BadRows):
    """All bad rows, counted by reason. A file with nothing else is not refused."""

    max_kept = 20

    def __init__(self, several_files: bool = False) -> None:
        super().__init__("skip", several_files=several_files)
        self.reasons: Counter[str] = Counter()

    def add(self, row: BadRow) -> None:
        super().add(row)
        # Without what differs from row to row: numbers, brackets and what follows a semicolon.
        reason = re.sub(r"(?<![-\w])\d+", "N", re.split(r";| \(", row.reason)[0])
        self.reasons[reason if reason in self.reasons or len(self.reasons) < MAX_REASONS else "other"] += 1

    def refuse_all(self, path: Path) -> None:
        pass


class Row(NamedTuple):
    """A tokenised row."""

    number: int
    texts: list[str]  # its contents, for the number of characters and the language
    key: str  # equal for copies
    length: int  # in tokens, as in training
    text_tokens: int  # tokens of `texts` alone


class Survey:
    """One reading of files; `result` is what they hold, in types of JSON.

    kind: of their rows, one of dataset/rows/kinds.py. ValueError, FileNotFoundError: a file cannot be read to its end.
    """

    def __init__(
        self, files: Sequence[Path], kind: str, tokenizer: PreTrainedTokenizerFast, max_seq_len: int, field="text"
    ):
        self.files, self.tokenizer, self.max_seq_len, self.field = (*files,), tokenizer, max_seq_len, field
        self.bad, self.names = AllBadRows(several_files=len(files) > 1), control_names(tokenizer)
        self.check = spelling_check(tokenizer)
        self.rows = self.empty = 0
        self.lengths: Counter[int] = Counter()
        self.characters: Counter[int] = Counter()  # by bit length
        self.longest = 0, 0, 0  # tokens, and minus file and row, so that the first of several is the largest
        self.languages: dict[str, Counter[str]] = {}
        self.control_tokens: Counter[str] = Counter()  # rows that spell each
        self.spelling_rows: list[int | str] = []
        self.hashes, self.numbers, self.file_numbers = array("Q"), array("I"), array("H")
        self.counts: Counter[str] = Counter()
        readers = {"text": self._documents, "chat": self._chats, "pairs": self._pairs, "choices": self._questions}
        read = readers.get(kind) or partial(self._exercises, form=kind)
        with unchanged(files), Pass(files, "reading") as self.observe:
            for number, path in enumerate(files):
                for row in read(path):
                    self._count(number, row)
        self.result = self._result(kind)

    def _count(self, file: int, row: Row) -> None:
        self.rows += 1
        size = sum(map(len, row.texts))
        self.lengths[row.length] += 1
        self.characters[size.bit_length()] += 1
        self.longest = max(self.longest, (row.length, -file, -row.number))
        language = self.languages.setdefault(language_of("\n".join(row.texts)), Counter())
        language.update(rows=1, characters=size, text_tokens=row.text_tokens)
        names = sorted({name for text in row.texts for name in self.names.findall(text)})
        if names:
            self.control_tokens.update(names)
            self.counts["spelling_rows"] += 1
            self.counts["barred_rows"] += not {self.tokenizer.mask_token, self.tokenizer.pad_token}.isdisjoint(names)
            if len(self.spelling_rows) < MAX_EXAMPLES:
                self.spelling_rows.append(self._place(file, row.number))
        self.hashes.append(content_hash(row.key))
        self.numbers.append(row.number)
        self.file_numbers.append(file)

    def _place(self, file: int, row: int) -> int | str:
        """The number of a row, with the name of its file if there are several."""
        return f"{row} of {self.files[file].name}" if len(self.files) > 1 else row

    # -- the kinds of rows ---------------------------------------------------------------------------------------------

    def _documents(self, path: Path) -> Iterator[Row]:
        documents = numbered_documents(path, self.field, self.bad, self.check, self.observe)
        for chunk in chunked(documents, lambda numbered: len(numbered[1]), CHUNK_CHARACTERS):
            texts = [(number, text) for number, text in chunk if text]
            self.empty += len(chunk) - len(texts)
            encoded = encode_batch(self.tokenizer, [text for _, text in texts])
            for (number, text), ids in zip(texts, encoded, strict=True):
                length = len(ids) + 2
                self.counts.update(tokens=length, longer=length > self.max_seq_len, blank_rows=not text.strip())
                yield Row(number, [text], text, length, len(ids))

    def _chats(self, path: Path) -> Iterator[Row]:
        around = self._tokens_around_content()
        rows = read_conversations(path, self.observe, self.bad, self.check)
        for chunk in chunked(rows, _chat_size, CHUNK_CHARACTERS):
            encoded = encode_conversations(self.tokenizer, [messages for _, messages in chunk])
            chats = Conversations.of(encoded, [0] * len(chunk))
            for name, all_replies in (("ar", True), ("diffusion", False)):
                layout = replies.RowLayout(all_replies, self.max_seq_len, pad_id=0, eos_id=0)
                whole = replies.ReplyRows.of(chats, layout).whole_items()
                self._count_shortened(name, whole.lengths, replies.shortened(whole, self.max_seq_len))
            for (number, messages), chat in zip(chunk, encoded, strict=True):
                roles, contents = zip(*((message["role"], message["content"]) for message in messages), strict=True)
                replies_learnt = [message["content"] for message in messages if is_learnt(message)]
                num_replies = len(replies_learnt)
                self.counts.update(f"{role} messages" for role in roles)
                self.counts.update(replies=num_replies, several_replies=num_replies > 1)
                self.counts["empty_replies"] += replies_learnt.count("")
                self.counts["only_shown"] += roles.count("assistant") - num_replies
                content_tokens = len(chat.ids) - sum(around[role] for role in roles)
                yield Row(number, list(contents), render_chat(messages, False), len(chat.ids), content_tokens)

    def _pairs(self, path: Path) -> Iterator[Row]:
        around = self._tokens_around_content()
        rows = read_pairs(path, self.observe, self.bad, self.check)
        for chunk in chunked(rows, lambda row: template_size(row[1].contents), CHUNK_CHARACTERS):
            pairs = preferences.Pairs.of(self.tokenizer, [pair for _, pair in chunk])
            every = np.arange(len(pairs))
            items = preferences.items_of(pairs, every, self.max_seq_len)
            prompts, chosen, rejected = np.diff(pairs.starts).reshape(-1, 3).T
            lengths = prompts + np.maximum(chosen, rejected)
            self._count_shortened("pairs", lengths, items.rows)
            empty = preferences.empty_replies(items)
            equal = preferences.equal_replies(pairs, every, items) & ~empty
            self.counts.update(empty_replies=int(empty.sum()), equal_replies=int(equal.sum()))
            self.counts.update(longer_chosen=int((chosen > rejected).sum()))
            tokens = prompts + chosen + rejected
            for (number, pair), length, count in zip(chunk, lengths.tolist(), tokens.tolist(), strict=True):
                template = sum(around[message["role"]] for message in pair.prompt) + around["two replies"]
                key = "\n".join([render_chat(pair.prompt, True), pair.chosen, "", pair.rejected])
                yield Row(number, pair.contents, key, length, count - template)

    def _questions(self, path: Path) -> Iterator[Row]:
        for number, question in read_questions(path, self.observe, self.bad, self.check):
            texts = [question.text, *question.choices]
            asked, *choices = self._sizes(texts)
            self.counts[f"questions with {len(choices)} choices"] += 1
            yield Row(number, texts, question.content, asked + max(choices), asked + sum(choices))

    def _exercises(self, path: Path, form: str) -> Iterator[Row]:
        for number, exercise in read_exercises(path, form, self.observe, self.bad, self.check):
            texts = [exercise.text, exercise.reference]
            size = sum(self._sizes(texts))
            self.counts.update(empty_replies=not exercise.complete, wanted_end=exercise.wanted not in (None, texts[1]))
            yield Row(number, texts, "\n".join(texts), size, size)

    def _sizes(self, texts: list[str]) -> list[int]:
        return [len(ids) for ids in encode_batch(self.tokenizer, texts)]

    def _tokens_around_content(self) -> dict[str, int]:
        """Tokens besides the content, of a message of each role and of two replies to a prompt."""
        messages = encode_conversations(self.tokenizer, [[{"role": role, "content": ""}] for role in ROLES])
        around = {role: len(chat.ids) for role, chat in zip(ROLES, messages, strict=True)}
        (begin, _), *_ = messages[ROLES.index("assistant")].replies
        return around | {"two replies": begin + 2}  # an open turn, and the EOS of both

    def _count_shortened(self, name: str, lengths: np.ndarray, items: replies.Items) -> None:
        self.counts.update(
            {
                f"{name} rows": len(items),
                f"{name} tokens": int(lengths.sum()),
                f"{name} lost": int((lengths - items.lengths).sum()),
                f"{name} shortened": items.num_shortened,
                f"{name} cut_prompts": items.cut_prompts,
                f"{name} cut_replies": items.cut_bodies,
            }
        )

    # -- the result ----------------------------------------------------------------------------------------------------

    def _result(self, kind: str) -> dict[str, Any]:
        length, minus_file, minus_number = self.longest
        copies, first_copies = self._copies()
        in_lines = is_plain_text(self.files[0])  # whose documents are cut from the lines that are not bad
        return {
            "file": describe_files(self.files),
            "kind": kind,
            "bytes": sum(file.stat().st_size for file in self.files),
            "unpacked_bytes": self.observe.size,
            "data_sha256": self.observe.digest.hexdigest(),
            "tokenizer": fingerprint(self.tokenizer),
            "max_seq_len": self.max_seq_len,
            "lines": self.observe.lines if {*map(container_of, self.files)} <= IN_LINES else None,
            "rows": self.rows + self.empty + (0 if in_lines else self.bad.count),
            "used_rows": self.rows,
            "empty_rows": self.empty,
            "bad_rows": self.bad.count,
            "bad_unit": "lines" if in_lines else "rows",
            "first_bad": self.bad.first,
            "bad_by_reason": dict(self.bad.reasons.most_common()),
            "copies": copies,
            "first_copies": first_copies,
            "languages": {name: dict(counts) for name, counts in sorted(self.languages.items(), reverse=True)},
            "control_tokens": dict(self.control_tokens.most_common()),
            "first_spelling_rows": self.spelling_rows,
            "lengths": {str(length): self.lengths[length] for length in sorted(self.lengths)},
            "characters_by_bit_length": {str(size): self.characters[size] for size in sorted(self.characters)},
            "longest": {"tokens": length, "row": self._place(-minus_file, -minus_number)},
            "counts": dict(self.counts),
        }

    def _copies(self) -> tuple[int, list[tuple[int | str, int | str]]]:
        """The number of rows that repeat an earlier one, and (row, the row it repeats) for the first of them."""
        if not self.hashes:
            return 0, []
        hashes, numbers = np.frombuffer(self.hashes, np.uint64), np.frombuffer(self.numbers, np.uint32)
        order = np.argsort(hashes, kind="stable")
        ascending = hashes[order]
        copies = np.sort(order[1:][ascending[1:] == ascending[:-1]])
        first = copies[:MAX_EXAMPLES]
        originals = order[np.searchsorted(ascending, hashes[first])]
        files = np.frombuffer(self.file_numbers, np.uint16)
        places = [[*map(self._place, files[rows].tolist(), numbers[rows].tolist())] for rows in (first, originals)]
        return len(copies), list(zip(*places, strict=True))


def _chat_size(numbered: tuple[int, Messages]) -> int:
    return template_size(message["content"] for message in numbered[1])
