"""What a row is: a conversation or a pair of replies to one prompt, in one of several formats.

Each format is one entry of a table. To add a format of conversations, write a function (row) -> messages and list it in
FORMATS with the fields that it needs; a format of pairs goes into PAIR_FORMATS. Training, likelihood, reports, the data
doctor and preference tuning all read rows through this file.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dataset.bad_rows import BadRows
from dataset.jsonl import JSON_TYPES, Check, Observer, read_as

Row = dict[str, Any]
Messages = list[dict[str, str]]
ROLES = ("system", "user", "assistant")


def checked_messages(messages: Sequence[dict[str, str]]) -> list[tuple[str, str]]:
    """(role, content) of each message; ValueError names the message at fault."""
    if not messages:
        raise ValueError("a conversation needs at least one message, and has none")
    pairs = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            keys = ", ".join(message) if isinstance(message, dict) else type(message).__name__
            raise ValueError(f'message {number} needs the keys "role" and "content"; found: {keys or "none"}')
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise ValueError(f"message {number} has role {role!r}; expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"content of message {number} is {type(content).__name__}; expected a string")
        pairs.append((role, content))
    return pairs


def _text(row: Row, name: str) -> str:
    if not isinstance(row[name], str):
        raise ValueError(f'field "{name}" is {JSON_TYPES[type(row[name])]}, expected a string')
    return row[name]


def _fields_of(row: Row) -> str:
    return ", ".join(row) or "none"


# -- conversations -----------------------------------------------------------------------------------------------------


class RowFormat(NamedTuple):
    fields: tuple[str, ...]  # that a row of this format has
    messages: Callable[[Row], Messages]


def _exchange(prompt: str, response: str) -> Messages:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _instruction(row: Row) -> Messages:
    prompt = _text(row, "instruction")
    if row.get("input") is not None and _text(row, "input"):
        prompt += "\n" + row["input"]
    return _exchange(prompt, _text(row, "output"))


FORMATS = {
    "conversations": RowFormat(("conversations",), lambda row: row["conversations"]),
    "messages": RowFormat(("messages",), lambda row: row["messages"]),
    "instruction": RowFormat(("instruction", "output"), _instruction),
    "prompt": RowFormat(("prompt", "response"), lambda row: _exchange(_text(row, "prompt"), _text(row, "response"))),
}


def is_conversation(row: Row) -> bool:
    """Return whether a row has the fields of a conversation."""
    return any(row.keys() >= set(row_format.fields) for row_format in FORMATS.values())


def messages_of(row: Row) -> Messages:
    """The conversation of a row, [{"role", "content"}, ...]; ValueError if it has none that can be learnt."""
    for row_format in FORMATS.values():
        if all(name in row for name in row_format.fields):
            messages = row_format.messages(row)
            break
    else:
        known = ", ".join(" + ".join(row_format.fields) for row_format in FORMATS.values())
        raise ValueError(f"expected the fields of a conversation ({known}); fields present: {_fields_of(row)}")
    if not isinstance(messages, list):
        raise ValueError(f"the conversation is {JSON_TYPES[type(messages)]}, expected an array of messages")
    if not any(role == "assistant" for role, _ in checked_messages(messages)):
        raise ValueError("the conversation has no assistant message, so nothing can be learnt from it")
    return messages


def read_conversations(
    path: Path, observe: Observer | None = None, bad: BadRows | None = None, check: Check = str
) -> Iterator[tuple[int, Messages]]:
    """Yield (row number from 1, conversation) as `read_as`; rows with a content that fails `check` are bad rows."""

    def conversation(row: Row) -> Messages:
        messages = messages_of(row)
        for message in messages:
            check(message["content"])
        return messages

    return read_as(path, conversation, observe, bad)


# -- pairs of replies --------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    prompt: Messages
    chosen: str
    rejected: str

    @property
    def contents(self) -> list[str]:
        """The contents of the prompt, and both replies."""
        return [*(message["content"] for message in self.prompt), self.chosen, self.rejected]


class PairFormat(NamedTuple):
    fits: Callable[[Row], bool]
    parts: Callable[[Row], tuple[Messages, Any, Any]]  # prompt, chosen, rejected; a reply is a string or a message


def _two_conversations(row: Row) -> tuple[Messages, Any, Any]:
    """Both sides hold the prompt; other fields are not read."""
    chosen, rejected = (_side(row, name) for name in ("chosen", "rejected"))
    prompt, other = ([(m["role"], m["content"]) for m in side[:-1]] for side in (chosen, rejected))
    if prompt != other:
        raise ValueError("chosen and rejected differ before their last message; expected two replies to one prompt")
    return chosen[:-1], chosen[-1], rejected[-1]


def _side(row: Row, name: str) -> Messages:
    messages = row[name]
    if not isinstance(messages, list):
        raise ValueError(f'field "{name}" is {JSON_TYPES[type(messages)]}, the other one an array; expected two arrays')
    try:
        checked_messages(messages)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return messages


def _after_messages(row: Row) -> tuple[Messages, Any, Any]:
    prompt = row["messages"]
    if not isinstance(prompt, list):
        raise ValueError(f'field "messages" is {JSON_TYPES[type(prompt)]}, expected an array of messages')
    checked_messages(prompt)
    return prompt, row["chosen"], row["rejected"]


def _after_prompt(row: Row) -> tuple[Messages, Any, Any]:
    return [{"role": "user", "content": _text(row, "prompt")}], row["chosen"], row["rejected"]


PAIR_FORMATS = {  # the first that fits
    "conversations": PairFormat(
        lambda row: isinstance(row["chosen"], list) or isinstance(row["rejected"], list), _two_conversations
    ),
    "messages": PairFormat(lambda row: "messages" in row, _after_messages),
    "prompt": PairFormat(lambda row: "prompt" in row, _after_prompt),
}
PAIR_FIELDS = "chosen + rejected as two conversations, or as replies to prompt or messages"


def is_pair(row: Row) -> bool:
    """Return whether a row has the fields of a pair of replies."""
    return {"chosen", "rejected"} <= row.keys()


def pair_of(row: Row) -> Pair:
    """The prompt of a row and the two replies to it; ValueError if it has no such pair."""
    if not is_pair(row):
        raise ValueError(f"expected the fields of a pair ({PAIR_FIELDS}); fields present: {_fields_of(row)}")
    for pair_format in PAIR_FORMATS.values():
        if pair_format.fits(row):
            prompt, chosen, rejected = pair_format.parts(row)
            break
    else:
        raise ValueError(f"chosen and rejected stand without a prompt; expected {PAIR_FIELDS}")
    if not prompt or prompt[-1]["role"] == "assistant":
        raise ValueError("the prompt must be a conversation that ends before the assistant's reply")
    return Pair(prompt, _reply("chosen", chosen), _reply("rejected", rejected))


def _reply(name: str, reply: Any) -> str:
    """The content of a reply, which is a string or the assistant's message."""
    if isinstance(reply, dict):
        ((role, content),) = checked_messages([reply])
        if role != "assistant":
            raise ValueError(f"{name} ends with a message of role {role!r}; expected the assistant's reply")
        return content
    if not isinstance(reply, str):
        raise ValueError(f'field "{name}" is {JSON_TYPES[type(reply)]}, expected a string or a message')
    return reply


def read_pairs(
    path: Path, observe: Observer | None = None, bad: BadRows | None = None, check: Check = str
) -> Iterator[tuple[int, Pair]]:
    """Yield (row number from 1, pair) as `read_as`; rows with a content that fails `check` are bad rows."""

    def pair(row: Row) -> Pair:
        result = pair_of(row)
        for content in result.contents:
            check(content)
        return result

    return read_as(path, pair, observe, bad)
