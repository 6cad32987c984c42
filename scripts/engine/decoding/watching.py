"""Watching a decoder at work: --trace, and the live view of a chat."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

from dataset.tokenizer import PreTrainedTokenizerFast
from model.decoding.canvas import Canvas, DecodingStep
from scripts.engine.decoding.generation import Observe, Watch
from scripts.engine.decoding.trace import REPLACEMENT, Trace, Vocabulary, assemble
from scripts.engine.decoding.trace_files import check_trace_path, write_trace
from scripts.engine.decoding.trace_terminal import LiveView, on_screen


@dataclass(frozen=True)
class TraceConfig:
    """Watching the text come to be."""

    trace: Annotated[
        str | None, "record every step in this file, .html, .gif or .json; or, with the word terminal, show it live"
    ] = None

    def __post_init__(self):
        if self.trace is not None:
            check_trace_path(self.trace)

    @property
    def file(self) -> Path | None:
        return None if self.trace in (None, "terminal") else Path(self.trace)


class Recorder:
    """Traces of several decodings, for one file."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, target: str | None):
        self.vocabulary, self.target, self.traces = Vocabulary(tokenizer), target, list[Trace]()

    def observer(self, **info: Any) -> Observe | None:
        """Return what records the first row of the next decoding, with `info`; None if nothing is to be recorded."""
        if self.target is None:
            return None

        def observe(canvas: Canvas) -> Watch:
            trace = Trace(self.vocabulary, *canvas.text(0), info)
            self.traces.append(trace)
            if self.target != "terminal":
                return trace.add
            if "title" in info:
                print(info["title"], file=sys.stderr)
            return LiveView(trace)

        return observe

    def write(self) -> list[str]:
        """Write the file, if there is one; returns lines that say so."""
        if self.target in (None, "terminal"):
            return []
        write_trace(Path(self.target), self.traces)
        return [f"saved {self.target}"]


class Typing:
    """A `watch` callback: adds every step to `trace` and types the text from position `start` on as it grows."""

    def __init__(self, trace: Trace, start: int, stream: TextIO):
        self.trace, self.start, self.stream, self.typed = trace, start, stream, ""

    def __call__(self, step: DecodingStep) -> None:
        self.trace.add(step)
        tokens = [self.trace.tokens[i] for i in self.trace.ids[self.start :]]
        text = "".join(assemble(tokens))
        # A character may still lack bytes; what is typed cannot be taken back.
        text = text.rstrip(REPLACEMENT) if len(text.rstrip(REPLACEMENT)) >= len(self.typed) else self.typed
        self.stream.write(on_screen(text[len(self.typed) :]))
        self.stream.flush()
        self.typed = text
