"""A trace, or several side by side, as one self-contained HTML page; its layout and script are in trace_page.html."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.engine.decoding.trace import RECORD, REPLACEMENT, Cell, Token, Trace
from scripts.engine.decoding.trace_terminal import SIGNS

TEMPLATE = Path(__file__).with_name("trace_page.html")


def page(traces: Sequence[Trace]) -> str:
    """Return the page. Several traces play in step by forward passes; one plays step by step."""
    template = TEMPLATE.read_text(encoding="utf-8")
    first = traces[0].info
    title = str(first.get("prompt") or first.get("title") or "a decoding")
    values = {
        "TITLE": html.escape(" ".join(title.split())),
        "TEXT": html.escape("\n\n".join(trace.text for trace in traces)),
        "DATA": embedded([page_data(trace) for trace in traces]),
        # Only this style and this script may run, even if a text found a way into the page.
        "STYLE_HASH": _hash(template, "style"),
        "SCRIPT_HASH": _hash(template, "script"),
    }
    return re.sub(r"\{\{([A-Z_]+)\}\}", lambda match: values[match[1]], template)


def page_data(trace: Trace) -> dict[str, Any]:
    """Return what the script draws from.

    "cells": the history of each position, as [from step, text, id, confidence, step of writing, id before an edit]. The
    frame of a step is the last entry of each position up to it.
    """
    cells: list[list[Cell]] = [[] for _ in trace.initial]
    since: list[list[int]] = [[] for _ in trace.initial]
    for number, frame in enumerate(trace.frames()):
        for i, cell in enumerate(frame):
            if not cells[i] or cells[i][-1] != cell:
                cells[i].append(cell)
                since[i].append(number)
    info = {name: value for name, value in trace.info.items() if name not in ("title", "prompt", RECORD)}
    return {
        "title": str(trace.info.get("title") or ""),
        "prompt": str(trace.info.get("prompt") or ""),
        "info": [[name.replace("_", " "), _text(value)] for name, value in info.items() if value is not None],
        RECORD: trace.info.get(RECORD),
        "open": [int(o) for o in trace.open],
        "passes": [0, *(step.num_forward_passes for step in trace.steps)],
        "tokens": {i: _label(trace.tokens[i]) for i in sorted(trace.tokens)},
        "signs": SIGNS,
        "cells": [
            [
                [number, c.text, c.id, c.confidence, c.written, c.before]
                for number, c in zip(numbers, history, strict=True)
            ]
            for numbers, history in zip(since, cells, strict=True)
        ],
    }


def embedded(value: Any) -> str:
    """JSON for a <script> element: nothing in it ends the element or opens another."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _label(token: Token) -> list[str]:
    """A token's name in a tooltip, and its role."""
    if token.whole:
        return [token.spelling.decode(), token.special or ""]
    return [
        token.spelling.decode(errors="replace").replace(REPLACEMENT, "") + f" + bytes {token.spelling.hex(' ')}",
        "",
    ]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _hash(template: str, element: str) -> str:
    """sha256-..., as a Content-Security-Policy names the element's content."""
    content = re.search(rf"<{element}>(.*?)</{element}>", template, re.DOTALL)[1]
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
