"""What a row of conversation is: messages, in one of several formats.

Each format is one entry of a table. To add one, write a function (row) -> messages and list it in FORMATS with the
fields that it needs. Training, likelihood, reports, the data doctor and preference tuning all read rows through this
file. A system prompt, tools and earlier turns may stand beside each format. A field that carries text and is not used
makes a row bad: nothing is dropped in silence.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dataset.reading.bad_rows import BadRows
from dataset.reading.files import Observer
from dataset.reading.parse import JSON_TYPES
from dataset.reading.rows import Check, read_as
from dataset.rows.messages import (
    MARKS,
    REASONING_FIELDS,
    SPELT,
    TOOL_FIELDS,
    Messages,
    Row,
    conversation,
    from_json,
    is_learnt,
    mark,
    read_array,
    read_messages,
    require_used,
    without_null,
)
from dataset.rows.messages import text_in as _text

SYSTEM_FIELDS = ("system", "system_prompt")
CONTEXT_FIELDS = {*SYSTEM_FIELDS, *TOOL_FIELDS, "history"}  # beside a row of any format
BAD_REPLY_LABELS = ("label", "kto_tag")  # false for a reply that is not to be learnt


class RowFormat(NamedTuple):
    fields: tuple[str, ...]  # that a row of this format has
    messages: Callable[[Row], Messages]
    optional: tuple[str, ...] = ()  # fields that it uses besides


def _exchange(prompt: str, response: str) -> Messages:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def messages_in(row: Row, name: str, role: str = "user") -> Messages:
    """The messages that a field holds: an array of them, one of them, or the content of one by `role`."""
    if isinstance(row[name], str):
        return [{"role": role, "content": row[name]}]
    if not isinstance(row[name], dict | list):
        raise ValueError(f'field "{name}" is {JSON_TYPES[type(row[name])]}, expected a string or messages')
    if isinstance(row[name], list) and any(isinstance(part, str) for part in row[name]):
        raise ValueError(f'field "{name}" is an array of strings, expected one string, or messages')
    try:
        return read_messages([row[name]] if isinstance(row[name], dict) else row[name])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


# Fields of a prompt, and those whose text follows it on lines of its own.
PROMPTS = {
    "instruction": ("input", "context"),
    "prompt": (),
    "query": (),
    "question": (),
    "problem": (),
    "input": (),
    "q": (),
}
EXCHANGES = (  # fields of a prompt and of the reply to it, the first that a row has
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("query", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("problem", "solution"),
    ("input", "target"),
    ("input", "output"),
    ("q", "a"),
)


def prompt_of(row: Row, name: str) -> Messages:
    """The prompt in a field of PROMPTS, and in those that follow it."""
    below = [_text(row, other) for other in PROMPTS.get(name, ()) if other in row and row[other] != ""]
    if below:
        return [{"role": "user", "content": "\n".join([_text(row, name), *below])}]
    return messages_in(row, name)


def _asked_and_answered(prompt: str, reply: str, row: Row) -> Messages:
    return [*prompt_of(row, prompt), *messages_in(row, reply, "assistant")]


def _all_messages(row: Row, name: str) -> Messages:
    return read_messages(from_json(row[name], name))


FORMATS = {
    **{name: RowFormat((name,), partial(_all_messages, name=name)) for name in ("conversations", "messages")},
    **{
        " + ".join(fields): RowFormat(fields, partial(_asked_and_answered, *fields), PROMPTS[fields[0]])
        for fields in EXCHANGES
    },
}
MEDIA = ("image", "images", "video", "videos", "audio", "audios")  # whose names are no text, and cannot be learnt
OTHER_TEXTS = ("rejected_response", "rejected_messages", "chosen", "rejected", "choices", "options", "answerKey")
TEXT_FIELDS = {  # which carry text even if it is a single word
    *(name for row_format in FORMATS.values() for name in (*row_format.fields, *row_format.optional)),
    *CONTEXT_FIELDS,
    *REASONING_FIELDS,
    *OTHER_TEXTS,
    *MEDIA,
    *"ABCD",
}


def format_of(row: Row) -> RowFormat | None:
    """The first format of which a row has all fields; None if there is none."""
    return next((form for form in FORMATS.values() if all(row.get(name) is not None for name in form.fields)), None)


def is_conversation(row: Row) -> bool:
    """Return whether a row has the fields of a conversation."""
    return format_of(row) is not None


def messages_of(row: Row) -> Messages:
    """The conversation of a row, [{"role", "content"}, ...]; ValueError if it has none that can be learnt."""
    row = without_null(row)
    row_format = format_of(row)
    if row_format is None:
        known = ", ".join(" + ".join(form.fields) for form in FORMATS.values())
        raise ValueError(f"expected the fields of a conversation ({known}); fields present: {', '.join(row) or 'none'}")
    _refuse_not_to_be_learnt(row)
    messages = with_context(row, row_format.messages(row))
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("the conversation has no assistant message, so nothing can be learnt from it")
    if not any(map(is_learnt, messages)):
        raise ValueError("the conversation has no reply that is to be learnt; delete that row")
    used = {*row_format.fields, *row_format.optional, *CONTEXT_FIELDS, *MARKS, "text"}
    require_used(row, used, [message["content"] for message in messages], TEXT_FIELDS)
    return messages


def _refuse_not_to_be_learnt(row: Row) -> None:
    for name in BAD_REPLY_LABELS:
        if name in row and (row[name] in (False, 0) or SPELT.get(str(row[name]).strip().lower()) == 0):
            raise ValueError(f'field "{name}" is {row[name]}: a reply that is not to be learnt; delete that row')
    for name in MARKS.keys() & row.keys():
        if not mark(name, row[name], "the row"):
            raise ValueError(f'field "{name}" says that nothing of the row is to be learnt; delete that row')


def with_context(row: Row, messages: Messages) -> Messages:
    """A conversation with the system prompt, the tools and the earlier turns that stand beside it."""
    systems = {text for name in SYSTEM_FIELDS if name in row and (text := _text(row, name))}
    if len(systems) > 1:
        raise ValueError(f"fields {' and '.join(SYSTEM_FIELDS)} are two system prompts; delete one of them")
    tools = [array for name in TOOL_FIELDS if name in row and (array := read_array(row[name], name))]
    if len(tools) > 1 and tools[0] != tools[1]:
        raise ValueError(f"fields {' and '.join(TOOL_FIELDS)} are two lists of tools; delete one of them")
    earlier = [message for turn in read_array(row.get("history", []), "history") for message in _earlier(turn)]
    head = 1 if earlier and messages and messages[0]["role"] == "system" else 0
    return conversation([*messages[:head], *earlier, *messages[head:]], *systems or [""], *tools[:1])


def _earlier(turn: Any) -> Messages:
    """Messages of one entry of a history: a message, or a prompt and the reply to it."""
    try:
        if isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn):
            return _exchange(*turn)
        return read_messages([turn])
    except ValueError as error:
        raise ValueError(f"history: {error}") from None


def read_conversations(
    path: Path, observe: Observer | None = None, bad: BadRows | None = None, check: Check = str
) -> Iterator[tuple[int, Messages]]:
    """Yield (row number from 1, conversation) as `read_as`; rows with a content that fails `check` are bad rows."""

    def checked_conversation(row: Row) -> Messages:
        messages = messages_of(row)
        for message in messages:
            check(message["content"])
        return messages

    return read_as(path, checked_conversation, observe, bad)
