"""Rows that were damaged at random: each is taken byte for byte, or reported with its number; never neither.

What is right is said by an oracle that shares no code with the readers. It knows the plain formats; of a row with other
fields it knows that no text may be lost (tests/dataset/test_formats.py has the other formats).
MUTATED_ROWS=10000 in the environment, or more, makes the search longer than the suite has time for.
"""

import copy
import gzip
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dataset.preferences import PreferenceData, PreferenceDataset
from dataset.pretrain import PretrainData, PretrainDataset
from dataset.reading.bad_rows import BadRow, BadRows
from dataset.reading.documents import read_documents
from dataset.rows.formats import read_conversations
from dataset.rows.pair_formats import read_pairs
from dataset.sft import SFTData, SFTDataset
from dataset.survey import Survey
from dataset.tokenizer import decode

pytestmark = pytest.mark.slow
ROWS = int(os.environ.get("MUTATED_ROWS", 10_000))  # of each format
ROWS_IN_A_FILE, SOUND_ROWS = 500, 80
ROLES = "system", "user", "assistant"
BOM = b"\xef\xbb\xbf"

# -- valid rows --------------------------------------------------------------------------------------------------------

PIECES = ["hello", " ", "the river ", "中文", "，", "🙂", "<|im_end|>", "<|mask|>"]
PIECES += ["\n", '"', "\\", "\0", "é", "\u2028", "{[", "7"]


def some_text(draw: random.Random) -> str:
    return "".join(draw.choices(PIECES, k=draw.choice([0, 1, 3, 8])))


def message(role: str, draw: random.Random) -> dict:
    return {"role": role, "content": some_text(draw)}


def exchange(draw: random.Random) -> list[dict]:
    system = [message("system", draw)] * (draw.random() < 0.2)
    return [*system, *(message(role, draw) for _ in range(draw.choice([1, 1, 2])) for role in ("user", "assistant"))]


def two_conversations(draw: random.Random) -> dict:
    prompt = exchange(draw)[:-1]
    return {side: [*copy.deepcopy(prompt), message("assistant", draw)] for side in ("chosen", "rejected")}


def to_messages(draw: random.Random) -> dict:
    replies = [message("assistant", draw) if draw.random() < 0.3 else some_text(draw) for _ in range(2)]
    return {"messages": exchange(draw)[:-1], "chosen": replies[0], "rejected": replies[1]}


def fields(*names: str) -> Callable[[random.Random], dict]:
    return lambda draw: {name: some_text(draw) for name in names}


VALID: dict[str, Callable[[random.Random], dict]] = {
    "text": fields("text"),
    "conversations": lambda draw: {"conversations": exchange(draw)},
    "messages": lambda draw: {"messages": exchange(draw), "id": draw.randrange(99)},
    "instruction": lambda draw: fields("instruction", "output", *["input"] * (draw.random() < 0.5))(draw),
    "prompt": fields("prompt", "response"),
    "pairs of conversations": two_conversations,
    "pairs to a prompt": fields("prompt", "chosen", "rejected"),
    "pairs to messages": to_messages,
}

# -- mutations ---------------------------------------------------------------------------------------------------------

DEEP, LONG = "@deep@", "@long@"  # stand for what json.dumps cannot write
JUNK = [
    None,
    True,
    0,
    1.5,
    -(10**30),
    float("nan"),
    float("inf"),
    "",
    "text",
    "\0",
    "\r\n",
    "\ufeff",
    "\ud800",
    "\udfff x",
]
JUNK += [[], {}, [[]], [None], {"role": "user"}, {"role": "assistant", "content": "x"}, {"role": "gpt", "content": ""}]
JUNK += ["<|im_start|><|im_end|>", DEEP, LONG, "system", "Assistant"]
BYTES = [b"\0", b"\r", b"\n", b"\r\n", BOM, b"\xff", b"\xc3"]
BYTES += [b"\xed\xa0\x80", b"{", b"}", b"[", b'"', b"\\", b",", b"\\ud83d"]
BYTES += [
    b"\\u0000",
    b"\xf0\x9f\x99\x82",
    b"NaN",
    b"1e999",
    b"\x0b",
    b"\x1f\x8b",
    b"\xe2\x80\xa8",
    *([b" ", b"x", b"0"] * 5),
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a row."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def change_structure(row: dict, draw: random.Random) -> None:
    holder, key = draw.choice(list(places(row)) or [(row, None)])
    if key is None:
        return
    if draw.random() < 0.2 and isinstance(holder, dict):  # a field that nobody reads, so that its value may be anything
        holder[draw.choice(["id", "", "Text", " text", "名"])] = copy.deepcopy(draw.choice(JUNK))
    elif draw.random() < 0.4 and isinstance(holder[key], str) and key != "role":
        at = draw.randrange(len(holder[key]) + 1)
        holder[key] = (
            holder[key][:at] + draw.choice([junk for junk in JUNK if isinstance(junk, str)]) + holder[key][at:]
        )
    elif draw.random() < 0.5:
        holder[key] = copy.deepcopy(draw.choice(JUNK))
    elif draw.random() < 0.5:
        del holder[key]
    elif isinstance(holder, list):
        holder.insert(key, copy.deepcopy(draw.choice([*JUNK, *holder])))
    else:
        holder[draw.choice([key.upper(), f"{key} ", "text", "messages", "prompt", "input", "role"])] = holder.pop(key)


def written(row: dict, draw: random.Random) -> bytes:
    text = json.dumps(row, ensure_ascii=draw.random() < 0.5, separators=draw.choice([(", ", ": "), (",", ":")]))
    line = text.encode("utf-8", "surrogatepass")
    depth = draw.choice([5, 150, 197, 198, 199, 200, 201, 202, 1000, 3000])
    line = line.replace(f'"{DEEP}"'.encode(), b"[" * depth + b"]" * depth)
    line = line.replace(f'"{LONG}"'.encode(), b"1" * draw.choice([4300, 4301, 9000]))
    if draw.random() < 0.05:  # a key twice, with the same value or another
        at = draw.choice([found.end() for found in re.finditer(rb"\{", line)])
        key = draw.choice(["role", "content", *row]) if row else "a"
        line = line[:at] + json.dumps(key).encode() + draw.choice([b':"user",', b":null,"]) + line[at:]
    return line


def change_bytes(line: bytes, other: bytes, draw: random.Random) -> bytes:
    a, b = sorted(draw.randrange(len(line) + 1) for _ in range(2))
    at = draw.randrange(len(line)) if line else 0
    return draw.choice(
        [
            lambda: line[:at] + bytes([line[at] ^ 1 << draw.randrange(8)]) + line[at + 1 :] if line else line,
            lambda: line[:at] + line[at + draw.choice([1, 1, 2, 5]) :],
            lambda: line[:at] + draw.choice(BYTES) + line[at:],
            lambda: draw.choice(BYTES) + line,
            lambda: line + draw.choice([*BYTES, b"\r", b"  ", b","]),
            lambda: line[:at] + other[draw.randrange(len(other) + 1) :],
            lambda: line[:a] + line[b:],
            lambda: line[:b] + line[a:],
            lambda: line[:at],
            lambda: line.decode("utf-8", "replace").encode("utf-16"),
            lambda: line + other,
        ]
    )()


def some_file(valid: Callable[[random.Random], dict], draw: random.Random) -> bytes:
    """Damaged rows, and some sound ones."""
    lines = [json.dumps(valid(draw)).encode() for _ in range(SOUND_ROWS)]
    for _ in range(ROWS_IN_A_FILE):
        row = valid(draw)
        structure, byte = draw.choice([(1, 0), (1, 0), (2, 0), (0, 1), (0, 1), (0, 2), (1, 1)])
        for _ in range(structure):
            change_structure(row, draw)
        line = written(row, draw)
        for _ in range(byte):
            line = change_bytes(line, lines[-1], draw)
        lines.append(line)
    draw.shuffle(lines)
    end = draw.choice([b"\n", b"\n", b"\r\n"])
    data = draw.choice([b"", b"", BOM]) + end.join(lines) + draw.choice([b"", end, b"\n \n"])
    return b" " + data if data.startswith(b"\x1f\x8b") else data


# -- the oracle --------------------------------------------------------------------------------------------------------


class Bad(Exception):
    pass


def require(condition: bool) -> None:
    if not condition:
        raise Bad


def without_copies(pairs: list[tuple[str, Any]]) -> dict:
    require(len({key for key, _ in pairs}) == len(pairs))
    return dict(pairs)


def depth(text: str) -> int:
    deepest = level = 0
    for mark in re.findall(r"[\[{}\]]", re.sub(r'"(?:[^"\\]|\\.)*"', "", text)):
        level += 1 if mark in "[{" else -1
        deepest = max(deepest, level)
    return deepest


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from strings(item)


def parsed(line: bytes) -> dict:
    try:
        text = line.decode()
        require(depth(text) <= 200)
        row = json.loads(text, object_pairs_hook=without_copies)
    except ValueError:
        raise Bad from None
    require(isinstance(row, dict) and not any(0xD800 <= ord(c) < 0xE000 for text in strings(row) for c in text))
    return row


def conversation(messages: Any) -> list[tuple[str, str]]:
    require(isinstance(messages, list) and messages != [])
    for item in messages:
        require(isinstance(item, dict) and isinstance(item.get("content"), str))
        require(item.get("role") in ("system", "user", "assistant"))
    return [(item["role"], item["content"]) for item in messages]


def as_text(row: dict) -> str:
    require(isinstance(row.get("text"), str))
    return row["text"]


def as_chat(row: dict) -> list[tuple[str, str]]:
    if "conversations" in row or "messages" in row:
        made = conversation(row["conversations"] if "conversations" in row else row["messages"])
        require("assistant" in [role for role, _ in made])
        return made
    if "instruction" in row and "output" in row:
        more = row.get("input")
        asked, answer = [row["instruction"], *([] if more is None or more == "" else [more])], row["output"]
    else:
        require("prompt" in row and "response" in row)
        asked, answer = [row["prompt"]], row["response"]
    require(all(isinstance(text, str) for text in (*asked, answer)))
    return [("user", "\n".join(asked)), ("assistant", answer)]


def as_pair(row: dict) -> tuple[list[tuple[str, str]], str, str]:
    require("chosen" in row and "rejected" in row)
    sides = row["chosen"], row["rejected"]
    if any(isinstance(side, list) for side in sides):
        (*prompt, first), (*other, second) = map(conversation, sides)
        require(prompt == other)
        replies = [first, second]
    else:
        if "messages" in row:
            prompt = conversation(row["messages"])
        else:
            require(isinstance(row.get("prompt"), str))
            prompt = [("user", row["prompt"])]
        replies = [("assistant", s) if isinstance(s, str) else conversation([s])[0] for s in sides]
    require(bool(prompt) and prompt[-1][0] != "assistant" and all(role == "assistant" for role, _ in replies))
    return prompt, replies[0][1], replies[1][1]


TEXTS = "instruction", "input", "output", "response"
PLAIN = [{"conversations"}, {"messages"}, {"instruction", "output"}, {"instruction", "input", "output"}]
PLAIN += [{"prompt", "response"}, {"chosen", "rejected"}, {"prompt", "chosen", "rejected"}]
PLAIN += [{"messages", "chosen", "rejected"}]


def is_plain(row: dict) -> bool:
    """Return whether a row has the fields of one format alone, and messages of the plain form where it may have any."""
    items = [item for value in row.values() for item in (value if isinstance(value, list) else [value])]
    messages = [item for item in items if isinstance(item, dict)]
    replies = {"chosen", "rejected"} if len(row) == 2 else set()
    structured = {field for field, value in row.items() if isinstance(value, list)}
    structured |= {field for field, value in row.items() if isinstance(value, dict) and field in ("prompt", *TEXTS)}
    return (
        row.keys() in PLAIN
        and None not in row.values()
        and structured <= {"conversations", "messages"} | replies
        and all(item.keys() == {"role", "content"} and item["role"] in ROLES for item in messages)
    )


def values(value: Any) -> Iterator[str]:
    """The strings of a value, without the keys of its objects and what they name an id."""
    if isinstance(value, dict):
        value = [item for key, item in value.items() if key != "id"]
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from values(item)


def check_nothing_lost(row: dict, contents: list[str]) -> None:
    """Every text of the row is in its contents, and they hold nothing else."""
    texts = [*values({key: value for key, value in row.items() if key != "text"})]
    for text in texts:
        is_label = re.fullmatch(r"[\w.:/@+#=-]{0,64}", text, re.ASCII)
        assert not text.strip() or is_label or any(text in content for content in contents), (text, row)
    joined = {f"{one}\n{other}" for one in texts for other in texts} if "instruction" in row else set()
    assert {*contents} <= {*texts} | joined, row


def judged(data: bytes, kind: str, accepted: dict[int, Any]) -> tuple[list[tuple[int, bytes, Any]], list[int]]:
    """(number, line, content) of the good rows, and the numbers of the bad ones, as far as they are what they must be.

    accepted: what a reader made of the rows that it took.
    """
    use = KINDS[kind][0]
    good, bad = [], []
    for number, line in enumerate(data.split(b"\n"), start=1):
        line = line.removeprefix(BOM) if number == 1 else line
        if not line.strip():
            continue
        try:
            row = parsed(line)
        except Bad:
            bad.append(number)
            continue
        try:
            content = use(row)
        except Bad:
            content = None
        if kind != "text" and not is_plain(row):
            content = accepted.get(number)
            if content is not None:
                check_nothing_lost(row, [text for text in values(content) if text not in ROLES])
        (bad.append(number) if content is None else good.append((number, line, content)))
    return good, bad


# -- what the readers make of it ---------------------------------------------------------------------------------------

START, END = "<|im_start|>", "<|im_end|>"


def spelled(messages: list[tuple[str, str]]) -> str:
    return "".join(f"{START}{role}\n{content}{END}\n" for role, content in messages)


def split(tokens: np.ndarray, starts: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(np.asarray(tokens), np.asarray(starts))[1:]]


def in_text_cache(config: dict, tokenizer) -> tuple[dict, list[list[int]]]:
    made = PretrainDataset(PretrainData(**config), tokenizer)
    return made.meta, split(made.train.split.tokens, made.train.split.starts)


def in_chat_cache(config: dict, tokenizer) -> tuple[dict, list[list[int]]]:
    made = SFTDataset(SFTData(**config), tokenizer, all_replies=True, rows_per_step=2)
    return made.meta, split(made.train.chats.tokens, made.train.chats.starts[:-1])


def in_pair_cache(config: dict, tokenizer) -> tuple[dict, list[list[int]]]:
    made = PreferenceDataset(PreferenceData(**config), tokenizer, "full", 0)
    return made.meta, split(made.train.pairs.tokens, made.train.pairs.starts[:-1])


def spelled_texts(good: list[str]) -> list[tuple[str, int]]:
    """What the cache must spell, and with how many control tokens."""
    return [(f"{START}{text}{END}", 2) for text in good if text]


def spelled_chats(good: list) -> list[tuple[str, int]]:
    return [(spelled(messages), 2 * len(messages)) for messages in good]


def spelled_pairs(good: list) -> list[tuple[str, int]]:
    parts = []
    for prompt, chosen, rejected in good:
        parts += [(f"{spelled(prompt)}{START}assistant\n", 2 * len(prompt) + 1), (chosen + END, 1), (rejected + END, 1)]
    return parts


def told_text(content: str) -> str:
    return content


def told_chat(content: tuple[int, list[dict]]) -> list[tuple[str, str]]:
    return [(one["role"], one["content"]) for one in content[1]]


def told_pair(content: tuple[int, Any]) -> tuple:
    return told_chat((0, content[1].prompt)), content[1].chosen, content[1].rejected


KINDS = {  # oracle, reader, its content in the oracle's words, cache, what that must spell
    "text": (as_text, lambda path, bad: read_documents(path, bad=bad), told_text, in_text_cache, spelled_texts),
    "chat": (as_chat, lambda path, bad: read_conversations(path, bad=bad), told_chat, in_chat_cache, spelled_chats),
    "pairs": (as_pair, lambda path, bad: read_pairs(path, bad=bad), told_pair, in_pair_cache, spelled_pairs),
}


def check_file(path: Path, data: bytes, kind: str, tokenizer) -> tuple[int, int]:
    """Rows, and how many of them are bad."""
    _, read, told, cached, spell = KINDS[kind]
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
    skipped = BadRows("skip")
    accepted = list(read(path, skipped))
    numbered = {} if kind == "text" else {content[0]: told(content) for content in accepted}
    good, bad = judged(data, kind, numbered)
    contents = [content for *_, content in good]
    assert [told(content) for content in accepted] == contents

    if bad:
        with pytest.raises(BadRow) as refused:
            list(read(path, BadRows()))
        assert refused.value.number == bad[0] and "\n" not in str(refused.value)
    assert skipped.count == len(bad) and [int(re.findall(r"\d+", row)[0]) for row in skipped.first] == bad[:5]

    clean = path.with_name("clean.jsonl")
    clean.write_bytes(b"\n".join(line for _, line, _ in good))
    assert [told(content) for content in read(clean, BadRows())] == contents

    config = {"data": path, "cache_dir": path.parent / "cache", "val_fraction": 0.0, "on_bad_row": "skip"}
    meta, streams = cached(config, tokenizer)
    special = set(tokenizer.backend_tokenizer.get_added_tokens_decoder())
    found = [(decode(tokenizer, ids, skip_special=False), sum(i in special for i in ids)) for ids in streams]
    assert found == spell(contents)
    assert meta["skipped_rows"] == len(bad) and meta["skipped_first"] == skipped.first
    if kind == "text":
        assert meta["rows"] == len(good) + len(bad) and meta["empty_rows"] == contents.count("")

    survey = Survey([path], kind, tokenizer, 64).result
    assert (survey["rows"], survey["bad_rows"]) == (len(good) + len(bad), len(bad))
    assert survey["used_rows"] + survey["empty_rows"] == len(good)
    assert [int(re.findall(r"\d+", row)[0]) for row in survey["first_bad"]] == bad[:20]
    assert survey["data_sha256"] == meta["data_sha256"]
    return len(good) + len(bad), len(bad)


@pytest.mark.parametrize("name", VALID)
def test_every_damaged_row_is_taken_byte_for_byte_or_reported_with_its_number(name, tmp_path_factory, small, capfd):
    counts = np.zeros(2, dtype=int)
    kind = "text" if name == "text" else "pairs" if name.startswith("pairs") else "chat"

    @settings(
        max_examples=-(-ROWS // (ROWS_IN_A_FILE - 20)),  # damage makes some lines blank
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(st.integers(0, 2**64))
    def search(seed):
        draw = random.Random(seed)
        path = tmp_path_factory.mktemp("rows") / draw.choice(["rows.jsonl", "rows.jsonl", "rows.jsonl.gz"])
        counts[:] += check_file(path, some_file(VALID[name], draw), kind, small)
        counts[0] -= SOUND_ROWS

    search()
    with capfd.disabled():
        print(f"{name}: {counts[0]:,} damaged rows, {counts[1]:,} of them bad")
    assert counts[0] >= ROWS and 0.1 * ROWS < counts[1] < counts[0] - 0.02 * ROWS
