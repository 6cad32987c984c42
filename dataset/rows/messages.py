"""Messages of a conversation, from the forms that files give them to {"role", "content"}.

The chat template knows ROLES and strings. All else is written into the contents as MiniMind's template does, which is
that of Qwen 3: tools after the system prompt, reasoning and calls in the assistant's content, results of tools as the
user's. A message with "learnt": False is a reply that is shown and not learnt.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from dataset.reading.parse import JSON_TYPES, parsed_json

Row = dict[str, Any]
Message = dict[str, Any]
Messages = list[Message]
ROLES = ("system", "user", "assistant")

TOOL, CALL = "tool", "call"  # roles of files only: the result of a tool, and a call as a message of its own
SPEAKERS = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "tool": TOOL,
    "function": TOOL,
    "observation": TOOL,
    "tool_response": TOOL,
    "function_call": CALL,
    "tool_call": CALL,
}
ROLE_FIELDS, CONTENT_FIELDS = ("role", "from"), ("content", "value")
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
CALL_FIELDS = ("tool_calls", "function_call")
TOOL_FIELDS = ("tools", "functions")
MARKS = {  # what a reply is marked with, and the value of one that is learnt
    "weight": True,
    "loss": True,
    "loss_weight": True,
    "loss_mask": True,
    "train": True,
    "mask": False,
}
SPELT = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}  # marks as strings, which a CSV file has
TOOLS_PROMPT = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>{tools}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
    'XML tags:\n<tool_call>\n{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)

# Names of fields that describe a row, such as id, prompt_id or tags. Their text is not part of a conversation.
METADATA = re.compile(
    r"(?:\w+_)?(?:id|idx|index|uid|uuid|hash|name|source|dataset|category|categorie|domain|topic|tag|task|type|kind|lang|"
    r"language|license|copyright|url|link|avatarUrl|metadata|meta|extra|model|generator|author|annotator|date|created|at|"
    r"time|timestamp|split|subset|version|difficulty|level|quality|score|rating|match)s?"
)
ARRAYS = ("messages", "conversations", "rejected_messages", "choices", "options", "endings")
EXPLANATIONS = (  # names of fields that explain the answer to a question, which is asked without them
    *("explanation", "explanations", "rationale", "rationales", "analysis", "cot_content"),
    *("solution", "lecture", "exp"),
)
TOPICS = (  # names of fields that describe a question
    *("subject", "Subject", "subject_name", "topic_name", "skill", "grade", "meta_info", "question_concept"),
)
GROUPS = ("split", "kind", "direction", "seen_in_pretrain")  # fields by which a report may group questions
LABEL = re.compile(r"[\w.:/@+#=-]*", re.ASCII)
MAX_LABEL = 64  # characters


def checked_messages(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """(role, content) of each message; ValueError names the message at fault."""
    if not messages:
        raise ValueError("a conversation needs at least one message, and has none")
    pairs = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(_no_message(message, number))
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise ValueError(f"message {number} has role {role!r}; expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"content of message {number} is {type(content).__name__}; expected a string")
        pairs.append((role, content))
    return pairs


def is_learnt(message: Message) -> bool:
    """Return whether a message is a reply that fine-tuning learns."""
    return message["role"] == "assistant" and message.get("learnt", True)


def without_null(fields: Row) -> Row:
    """The fields that are not null, which is how merged files write absent ones; a CSV file has "" for an array."""
    return {name: v for name, v in fields.items() if v is not None and not (v == "" and name in ARRAYS)}


def text_in(row: Row, name: str) -> str:
    """The text in a field. ValueError if it holds something else."""
    if not isinstance(row[name], str):
        raise ValueError(f'field "{name}" is {JSON_TYPES[type(row[name])]}, expected a string')
    return row[name]


def labels_of(row: Row) -> dict[str, str]:
    """The fields of GROUPS."""
    return {name: str(row[name]) for name in GROUPS if isinstance(row.get(name), str | bool)}


def mark(name: str, value: Any, place: str) -> bool:
    """Return whether the mark `name` says that a reply is learnt."""
    if isinstance(value, str):
        value = SPELT.get(value.strip().lower(), value)
    if not isinstance(value, int | float) or value not in (0, 1):
        raise ValueError(
            f'field "{name}" of {place} is {json.dumps(value)[:40]}; expected 0 or 1, learnt or only shown'
        )
    return bool(value) == MARKS[name]


def require_used(fields: Row, used: Collection[str], contents: Iterable[str], text_fields: Collection[str]) -> None:
    """ValueError for a field outside `used` with a text that stands in none of the contents.

    METADATA is never text, and neither is a label (one ASCII word, such as an id or a date), except in a field of
    `text_fields`.
    """
    for name in fields.keys() - used:
        if METADATA.fullmatch(name):
            continue
        for text in _strings(fields[name]):
            is_label = name not in text_fields and len(text) <= MAX_LABEL and LABEL.fullmatch(text)
            if text.strip() and not is_label and not any(text in content for content in contents):
                raise ValueError(
                    f'field "{name}" carries text that is not used; delete it, or put it into a field that is'
                )


def holds_text(name: str, value: Any, contents: Iterable[str]) -> bool:
    """Return whether a field has words that stand in none of the contents: in one of METADATA more than a label, in
    another a single word, too, but not a mark."""
    words = [text for text in _strings(value) if any(map(str.isalpha, text)) and text.strip().lower() not in SPELT]
    if METADATA.fullmatch(name):
        words = [text for text in words if not (text.isascii() and len(text.split()) == 1)]
    return any(not any(text in content for content in contents) for text in words)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            if not (name in ROLE_FIELDS and isinstance(item, str) and item in SPEAKERS):
                yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


# -- one message -------------------------------------------------------------------------------------------------------

TEXT_FIELDS = {*ROLE_FIELDS, *CONTENT_FIELDS, *REASONING_FIELDS, *CALL_FIELDS, *TOOL_FIELDS, "text"}


def read_messages(messages: Any) -> Messages:
    """Messages of a file with their role, which may also be TOOL, content, and `learnt` and `tools` if there are any.

    ValueError names the message at fault.
    """
    if not isinstance(messages, list):
        raise ValueError(f"the conversation is {JSON_TYPES[type(messages)]}, expected an array of messages")
    if not messages:
        raise ValueError("a conversation needs at least one message, and has none")
    return [_read_message(message, number) for number, message in enumerate(messages, start=1)]


def _no_message(message: Any, number: int) -> str:
    keys = ", ".join(message) if isinstance(message, dict) else type(message).__name__
    return f'message {number} needs the keys "role" and "content"; found: {keys or "none"}'


def _first_of(names: Sequence[str], fields: Row) -> str | None:
    return next((name for name in names if name in fields), None)


def _read_message(message: Any, number: int) -> Message:
    fields = without_null(message) if isinstance(message, dict) else {}
    role_field, content_field = _first_of(ROLE_FIELDS, fields), _first_of(CONTENT_FIELDS, fields)
    call_field, reasoning_field = _first_of(CALL_FIELDS, fields), _first_of(REASONING_FIELDS, fields)
    if role_field is None or (content_field is None and call_field is None):
        raise ValueError(_no_message(message, number))
    speaker = fields[role_field]
    role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise ValueError(f"message {number} has role {speaker!r}; expected one of {', '.join(SPEAKERS)}")
    place = f"message {number}"
    content = written = _content(fields.get(content_field, ""), place)
    used = {role_field, content_field, *MARKS}
    result = {"role": role}
    if role == CALL:
        result["role"] = "assistant"
        if not content.startswith("<tool_call>"):
            written = _calls(content, place)
    elif role == "assistant":
        used |= {call_field, reasoning_field}
        if fields.get(reasoning_field):
            reasoning = _content(fields[reasoning_field], f"{place} ({reasoning_field})").strip("\n")
            written = f"<think>\n{reasoning}\n</think>\n\n" + content.lstrip("\n")
        if fields.get(call_field):
            written += ("\n" if content else "") + _calls(fields[call_field], place)
    elif role == "system" and (tool_field := _first_of(TOOL_FIELDS, fields)):
        used.add(tool_field)
        result["tools"] = read_array(fields[tool_field], tool_field)
    require_used(fields, used, [written], TEXT_FIELDS)
    marks = [mark(name, fields[name], place) for name in MARKS.keys() & fields.keys()]
    if result["role"] == "assistant" and not all(marks):
        result["learnt"] = False
    return result | {"content": written}


def _content(content: Any, place: str) -> str:
    """A content, which may be a list of parts of text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ValueError(f"content of {place} is {JSON_TYPES[type(content)]}; expected a string")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            name = kind if isinstance(kind, str) else JSON_TYPES[type(part)]
            raise ValueError(f"content of {place} has a part that is no text ({name}); only text can be learnt")
        require_used(part, {"type", "text"}, [part["text"]], TEXT_FIELDS)
        texts.append(part["text"])
    return "".join(texts)


def from_json(value: Any, name: str) -> Any:
    """The value of a field; that of its JSON if it is a string, as in a CSV file, that begins as an array or object."""
    return _parsed(value, name) if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") else value


def _parsed(text: str, name: str) -> Any:
    try:
        return parsed_json(text)
    except ValueError as error:
        raise ValueError(f'field "{name}" is a string, but no JSON ({error})') from None


def read_array(value: Any, name: str) -> list[Any]:
    """An array that may be written as a string of JSON, "" as an empty one."""
    if isinstance(value, str):
        value = _parsed(value, name) if value else []
    if not isinstance(value, list):
        raise ValueError(f'field "{name}" is {JSON_TYPES[type(value)]}, expected an array')
    return value


def _calls(calls: Any, place: str) -> str:
    """Calls of tools as the assistant writes them."""
    if isinstance(calls, str):
        try:
            calls = parsed_json(calls)
        except ValueError as error:
            raise ValueError(f"the call of a tool in {place} is no JSON ({error})") from None
    return "\n".join(_call(call, place) for call in (calls if isinstance(calls, list) else [calls]))


def _call(call: Any, place: str) -> str:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" not in function:
        raise ValueError(f'a call of a tool in {place} needs "name" and "arguments"')
    arguments = function["arguments"]
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    if function is not call:
        require_used(call, {"function"}, (), TEXT_FIELDS)
    require_used(function, {"name", "arguments"}, (), TEXT_FIELDS)
    return f'<tool_call>\n{{"name": "{function["name"]}", "arguments": {written}}}\n</tool_call>'


# -- a conversation ----------------------------------------------------------------------------------------------------


def conversation(messages: Messages, system: str = "", tools: Sequence[Any] = ()) -> Messages:
    """Messages of ROLES from those of `read_messages`, after a system prompt and tools that stand beside them."""
    first = messages[0] if messages and messages[0]["role"] == "system" else None
    if system and first and first["content"] != system:
        raise ValueError('field "system" and the first message are two different system prompts; delete one of them')
    if system and not first:
        messages = [{"role": "system", "content": system}, *messages]
    for message in messages:
        if message.get("tools"):
            if tools and tools != message["tools"] or message is not messages[0]:
                raise ValueError("tools stand in two places, or after the first message; expected them once, and there")
            tools = message["tools"]
    if tools:
        listed = "".join(f"\n{json.dumps(tool, ensure_ascii=False)}" for tool in tools)
        prompt = TOOLS_PROMPT.format(tools=listed)
        if messages and messages[0]["role"] == "system":
            prompt = f"{messages[0]['content']}\n\n{prompt}"
            messages = messages[1:]
        messages = [{"role": "system", "content": prompt}, *messages]
    return _with_results_as_users(messages)


def _with_results_as_users(messages: Messages) -> Messages:
    """Results of tools as messages of the user, successive ones as one message."""
    result: Messages = []
    last = None
    for message in messages:
        role, content = message["role"], message["content"]
        if role == TOOL:
            wrapped = (
                content if content.startswith("<tool_response>") else f"<tool_response>\n{content}\n</tool_response>"
            )
            if last == TOOL:
                result[-1]["content"] += f"\n{wrapped}"
            else:
                result.append({"role": "user", "content": wrapped})
        else:
            result.append({name: message[name] for name in ("role", "content", "learnt") if name in message})
        last = role
    return result
