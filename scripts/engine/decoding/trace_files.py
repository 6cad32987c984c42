"""Traces as files: a page (.html), an animation (.gif), or JSON, {"format", "version", "traces"}, which reads back."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from scripts.engine.decoding.trace import Trace
from scripts.engine.decoding.trace_page import page
from scripts.engine.files import write_bytes, write_text

FORMAT, VERSION = "nano-llada trace", 1
SUFFIXES = (".html", ".gif", ".json")


def write_trace(path: Path, traces: Sequence[Trace]) -> None:
    """Write .html, .gif or .json, as the name of `path` says; the file appears whole or not at all."""
    check_trace_path(path)
    path = Path(path)
    if not traces:
        raise ValueError(f"nothing was decoded that could be written to {path}")
    if path.suffix == ".html":
        write_text(path, page(traces))
    elif path.suffix == ".gif":
        from scripts.engine.decoding.trace_gif import write_gif  # matplotlib takes a second to load

        with tempfile.TemporaryDirectory() as folder:
            write_gif(Path(folder) / path.name, traces)
            write_bytes(path, (Path(folder) / path.name).read_bytes())
    else:
        value = {"format": FORMAT, "version": VERSION, "traces": [trace.to_json() for trace in traces]}
        write_text(path, json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n")


def check_trace_path(path: str | Path) -> None:
    """Raise ValueError, before anything is decoded, unless `path` can be written or is `terminal`, no file."""
    if str(path) == "terminal":
        return
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"a trace is written as {', '.join(SUFFIXES)} or shown on the `terminal`, not as {str(path)!r}"
        )
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the trace the name of a file")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} for the trace {path.name}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"folder {path.parent} is not writable; the trace {path.name} needs another one")


def load_traces(path: Path) -> list[Trace]:
    """Read a .json file of `write_trace`. ValueError: no such file, another format or version, or damage."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no trace {path}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a trace: it is not JSON ({error})") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ValueError(f"{path} is not a trace: it does not say that its format is {FORMAT!r}")
    if value.get("version") != VERSION:
        raise ValueError(f"{path} is a trace of version {value.get('version')}; this code reads version {VERSION}")
    try:
        return [Trace.from_json(trace) for trace in value["traces"]]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is a damaged trace: {type(error).__name__} {error}") from None
