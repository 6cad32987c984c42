"""Values of JSON, refused unless they can be used: a row is an object without doubled keys and half characters."""

import json
import re
from collections import Counter
from typing import Any

Row = dict[str, Any]

SURROGATE_ESCAPE = re.compile(r"\\u[dD][89abABcdefCDEF]")
MAX_NESTING = 200  # of a row; Python's own limit depends on the depth of the call
JSON_TYPES = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def parsed_row(text: str) -> Row:
    """The object that a text spells in JSON; ValueError if it is anything else."""
    row = parsed_json(text)
    if not isinstance(row, dict):
        expected = 'expected an object such as {"text": "..."}'
        remedy = "name a file of one array .json" if isinstance(row, list) else "correct or delete that row"
        raise ValueError(f"{expected}, found {JSON_TYPES[type(row)]}; {remedy}")
    return row


def parsed_json(text: str) -> Any:
    """The value that a text spells in JSON; ValueError if there is none that can be used."""
    try:
        value = PARSER.decode(text)
        if text.count("[") + text.count("{") > MAX_NESTING and _is_deep(value):
            raise RecursionError
    except json.JSONDecodeError as error:
        reason = f"not valid JSON at column {error.pos + 1} ({error.msg})"
        raise ValueError(f"{reason}; correct or delete that row") from None
    except RecursionError:
        raise ValueError("nested too deeply to be read; delete that row") from None
    except ValueError as error:  # a key twice, or an integer of more than 4300 digits
        reason = str(error).partition("; use sys.")[0]  # advice to programmers
        raise ValueError(f"not readable JSON: {reason}; correct or delete that row") from None
    if SURROGATE_ESCAPE.search(text):
        refuse_lone_surrogates(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):  # of equal keys a dict would silently keep the last
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f'key "{key}" stands twice in an object')
    return row


PARSER = json.JSONDecoder(object_pairs_hook=_object)


def _is_deep(row: Any) -> bool:
    """Return whether arrays and objects are nested more than MAX_NESTING deep."""
    level = [row]  # arrays and objects of one depth
    for _ in range(MAX_NESTING):
        items = [item for holder in level for item in (holder.values() if isinstance(holder, dict) else holder)]
        level = [item for item in items if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def refuse_lone_surrogates(row: Any) -> None:
    # JSON can spell half a surrogate pair, which is not a character: it has no UTF-8 form, so no bytes and no hash.
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"{surrogate} is half a surrogate pair and no character; correct or delete that row") from None
