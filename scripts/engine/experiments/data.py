"""The documents of an experiment: held-out ones to measure on, and a small corpus that fills its rows exactly."""

import heapq
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from dataset.jsonl import content_hash, is_validation, read_documents
from dataset.tokenizer import PreTrainedTokenizerFast, decode, encode
from scripts.engine.files import write_text


def held_out_parts(
    source: Path, field: str, fraction: float, tokenizer: PreTrainedTokenizerFast, tokens: int
) -> tuple[list[str], list[str]]:
    """Two lists of different documents that training with this `fraction` holds out, each of about `tokens` tokens at
    most: to select by, and to measure on. ValueError if there are fewer than two such documents."""
    found = _some(source, field, fraction, True, 2 * tokens)
    if len(found) < 2:
        raise ValueError(
            f"{source}: --val-fraction {fraction} holds out {len(found)} documents; raise it to at least 2"
        )
    return _first(found[::2], tokenizer, tokens), _first(found[1::2], tokenizer, tokens)


def small_corpus(
    source: Path, field: str, fraction: float, tokenizer: PreTrainedTokenizerFast, rows: int, length: int
) -> list[str]:
    """Training documents, a random sample without copies, that packed fill `rows` rows of `length` tokens: a number of
    passes is then a number of steps. The last document is cut. ValueError if the corpus is too small."""
    room, chosen = rows * length, []
    for text in _some(source, field, fraction, False, room):
        text = _beginning(text, tokenizer, room, fraction)
        if text is not None:
            chosen.append(text)
            room -= len(encode(tokenizer, text)) + 2  # BOS and EOS
        if room < length:  # padding of the last row
            return chosen
    raise ValueError(
        f"{source}: its training documents have fewer than the {rows * length:,} tokens to be repeated; "
        "lower --repetition-tokens"
    )


def write_documents(path: Path, texts: Sequence[str]) -> Path:
    write_text(path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return path


def _some(source: Path, field: str, fraction: float, held_out: bool, tokens: int) -> list[str]:
    """Different documents of one side, in random order, always the same: all, or enough of them for `tokens`."""

    def side() -> Iterator[str]:
        seen = set()
        for text in read_documents(source, field):
            key = content_hash(text)
            if text.strip() and is_validation(text, fraction) == held_out and key not in seen:
                seen.add(key)
                yield text

    return heapq.nsmallest(tokens // 3 + 1, side(), key=content_hash)  # a document has three tokens at least


def _first(texts: list[str], tokenizer: PreTrainedTokenizerFast, tokens: int) -> list[str]:
    """As many as have `tokens` tokens, at least one."""
    chosen, left = [], tokens
    for text in texts:
        left -= len(encode(tokenizer, text)) + 2
        if chosen and left < 0:
            break
        chosen.append(text)
    return chosen


def _beginning(text: str, tokenizer: PreTrainedTokenizerFast, room: int, fraction: float) -> str | None:
    """As much of a document as with BOS and EOS takes `room` tokens, such that it is one for training, or None."""
    ids = encode(tokenizer, text)
    if len(ids) + 2 <= room:
        return text
    for end in range(room - 2, 0, -1):
        part = decode(tokenizer, ids[:end]).rstrip("\ufffd")  # of a character that was cut
        if part.strip() and not is_validation(part, fraction) and len(encode(tokenizer, part)) + 2 <= room:
            return part
    return None
