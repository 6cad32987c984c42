"""What a row of preference data is: a pair of replies to one prompt, in one of several formats.

Each format is one entry of a table and gives two conversations, which must differ in their last reply alone. To add
one, list it in PAIR_FORMATS. What may stand beside it, and what makes a row bad, is as in dataset/rows/formats.py.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dataset.reading.bad_rows import BadRows
from dataset.reading.files import Observer
from dataset.reading.parse import JSON_TYPES
from dataset.reading.rows import Check, read_as
from dataset.rows.formats import CONTEXT_FIELDS, PROMPTS, TEXT_FIELDS, format_of, messages_in, prompt_of, with_context
from dataset.rows.messages import Message, Messages, Row, from_json, is_learnt, require_used, without_null

SIDES = ("chosen", "rejected")
MESSAGES = ("messages", "conversations", "rejected_messages")
SPELT_MESSAGES = re.compile(r'\s*\[\s*\{\s*"(?:role|from|content|value)"')  # the beginning of an array of messages
SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")  # of a dialogue in one string, as in HH-RLHF


class Pair(NamedTuple):
    prompt: Messages
    chosen: str
    rejected: str

    @property
    def contents(self) -> list[str]:
        """The contents of the prompt, and both replies."""
        return [*(message["content"] for message in self.prompt), self.chosen, self.rejected]


class Sides(NamedTuple):
    """A row as two conversations, and the fields that they were read from."""

    chosen: Messages
    rejected: Messages
    fields: tuple[str, ...] = SIDES


class PairFormat(NamedTuple):
    fits: Callable[[Row], bool]
    sides: Callable[[Row], Sides]


# -- formats -----------------------------------------------------------------------------------------------------------

PROMPT_FIELDS = ("messages", "conversations", *PROMPTS)


def _has(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(name in row for name in names)


def _is_dialogue(text: Any) -> bool:
    return isinstance(text, str) and text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def _dialogues(row: Row) -> list[str]:
    """Both sides as a dialogue in one string; the prompt may be the beginning of both."""
    beginning = row["prompt"] if _is_dialogue(row.get("prompt")) else ""
    return [f"{beginning}{row[name]}" if isinstance(row.get(name), str) else "" for name in SIDES]


def _spoken(dialogue: str) -> Messages:
    _, *parts = SPEAKER.split(dialogue.lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[speaker], "content": text.removeprefix(" ")} for speaker, text in turns]


def _two_dialogues(row: Row) -> Sides:
    chosen, rejected = map(_spoken, _dialogues(row))
    return Sides(chosen, rejected, (*SIDES, "prompt") if _is_dialogue(row.get("prompt")) else SIDES)


def _prompt_field(row: Row) -> str | None:
    return next((name for name in PROMPT_FIELDS if name in row), None)


def _hold_prompt(row: Row) -> bool:
    """Return whether one of the replies is an array that holds its prompt, too."""
    arrays = [row[name] for name in SIDES if isinstance(row.get(name), list)]
    return _has(*SIDES)(row) and (
        any(len(array) != 1 for array in arrays) or (bool(arrays) and _prompt_field(row) is None)
    )


def _two_conversations(row: Row) -> Sides:
    for name in SIDES:
        if not isinstance(row[name], list):
            kind = JSON_TYPES[type(row[name])]
            raise ValueError(f'field "{name}" is {kind}, the other one an array; expected two arrays')
    return Sides(messages_in(row, "chosen"), messages_in(row, "rejected"))


def _two_lists(row: Row) -> Sides:
    names = "messages", "rejected_messages"
    return Sides(messages_in(row, names[0]), messages_in(row, names[1]), names)


def _another_reply(row: Row) -> Sides:
    """A conversation of any format, and a reply that is worse than its last."""
    row_format = format_of(row)
    if row_format is None:
        raise ValueError(
            "rejected_response stands without a conversation, expected one that ends with the better reply; fields "
            f"present: {', '.join(row)}"
        )
    messages = row_format.messages(row)
    rejected = [*messages[:-1], *messages_in(row, "rejected_response", "assistant")]
    return Sides(messages, rejected, ("rejected_response", *row_format.fields, *row_format.optional))


def _replies_to_prompt(row: Row) -> Sides:
    name = _prompt_field(row)
    if name not in PROMPTS and not isinstance(row[name], list):
        raise ValueError(f'field "{name}" is {JSON_TYPES[type(row[name])]}, expected an array of messages')
    prompt = prompt_of(row, name)
    chosen, rejected = (messages_in(row, side, "assistant") for side in SIDES)
    return Sides([*prompt, *chosen], [*prompt, *rejected], (*SIDES, name, *PROMPTS.get(name, ())))


PAIR_FORMATS = {  # the first that fits
    "rejected_response": PairFormat(_has("rejected_response"), _another_reply),
    "rejected_messages": PairFormat(_has("messages", "rejected_messages"), _two_lists),
    "dialogues": PairFormat(lambda row: all(map(_is_dialogue, _dialogues(row))), _two_dialogues),
    "conversations": PairFormat(_hold_prompt, _two_conversations),
    "prompt": PairFormat(lambda row: _has(*SIDES)(row) and _prompt_field(row) is not None, _replies_to_prompt),
}
PAIR_FIELDS = (
    f"chosen + rejected as two conversations, or as replies to {', '.join(PROMPT_FIELDS)}; or a conversation with "
    "rejected_response or rejected_messages"
)


# -- a pair ------------------------------------------------------------------------------------------------------------


def is_pair(row: Row) -> bool:
    """Return whether a row has the fields of a pair of replies."""
    names = without_null(row).keys()
    return set(SIDES) <= names or not {"rejected_response", "rejected_messages"}.isdisjoint(names)


def pair_of(row: Row) -> Pair:
    """The prompt of a row and the two replies to it; ValueError if it has no such pair."""
    row = _without_json(without_null(row))
    if not is_pair(row):
        raise ValueError(f"expected the fields of a pair ({PAIR_FIELDS}); fields present: {', '.join(row) or 'none'}")
    pair_format = next((pair_format for pair_format in PAIR_FORMATS.values() if pair_format.fits(row)), None)
    if pair_format is None:
        raise ValueError(
            f"chosen and rejected stand without a prompt, or one without the other; expected {PAIR_FIELDS}"
        )
    sides = pair_format.sides(row)
    chosen, rejected = (with_context(row, side) for side in (sides.chosen, sides.rejected))
    prompt, other = ([(m["role"], m["content"]) for m in side[:-1]] for side in (chosen, rejected))
    if prompt != other:
        raise ValueError("chosen and rejected differ before their last message; expected two replies to one prompt")
    if not prompt or prompt[-1][0] == "assistant":
        raise ValueError("the prompt must be a conversation that ends before the assistant's reply")
    pair = Pair(chosen[:-1], _reply("chosen", chosen[-1]), _reply("rejected", rejected[-1]))
    require_used(row, {*sides.fields, *CONTEXT_FIELDS, "text"}, pair.contents, TEXT_FIELDS)
    return pair


def _without_json(row: Row) -> Row:
    """A row whose arrays of messages, and replies that are such arrays, may be strings of JSON, as in a CSV file."""
    row = row | {name: from_json(row[name], name) for name in MESSAGES if name in row}
    if all(isinstance(row.get(name), str) and SPELT_MESSAGES.match(row[name]) for name in SIDES):
        row |= {name: from_json(row[name], name) for name in SIDES}
    return row


def _reply(name: str, message: Message) -> str:
    if message["role"] != "assistant":
        raise ValueError(f"{name} ends with a message of role {message['role']!r}; expected the assistant's reply")
    if not is_learnt(message):
        raise ValueError(f"{name} ends with a reply that is marked as not to be learnt; delete that row")
    return message["content"]


def read_pairs(
    path: Path, observe: Observer | None = None, bad: BadRows | None = None, check: Check = str
) -> Iterator[tuple[int, Pair]]:
    """Yield (row number from 1, pair) as `read_as`; rows with a content that fails `check` are bad rows."""

    def checked_pair(row: Row) -> Pair:
        pair = pair_of(row)
        for content in pair.contents:
            check(content)
        return pair

    return read_as(path, checked_pair, observe, bad)
