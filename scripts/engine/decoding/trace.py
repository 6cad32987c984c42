"""How a text came to be: the record of one row of a decoding, as deltas, and its JSON file.

`write_trace` also makes a page (`trace_page`), an animation (`trace_gif`); `trace_terminal.LiveView` shows it live.

The file, version 1: {"format", "version", "traces": [...]}, and each trace {
  "info": {...},                                   circumstances, as the caller gave them; in "record" those of a
                                                   result's file (`evaluation.circumstances`)
  "tokens": {id: {"text"}, {"bytes"} or {"text", "special"}},   every id that occurs; bytes in hexadecimal, where
                                                   a token is only a part of a character; special: its role
  "initial": [id, ...], "open": [0 or 1, ...],     before the first step; 1 = to be filled
  "steps": [{"forward_passes", "writes": [[position, id, confidence], ...]}, ...]
}. Forward passes are counted from the beginning; a confidence is the model's probability of what it wrote, from 0 to 1,
to 4 decimals. What stands at a position is what was written there last.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import decoders, pre_tokenizers
from torch import Tensor

from dataset.tokenizer import PreTrainedTokenizerFast, decode
from model.decode import DecodingStep
from scripts.engine.files import write_bytes, write_text

FORMAT, VERSION = "nano-llada trace", 1
RECORD = "record"  # of `Trace.info`: kept, not shown
SUFFIXES = (".html", ".gif", ".json")
REPLACEMENT = "\ufffd"
SIGNS = {"eos": "\u25a0", "pad": "\u25a1", "bos": "\u25b8", "other": "\u25c6"}


class Token(NamedTuple):
    """An entry of the vocabulary: what it spells, and its role if that is not text."""

    spelling: bytes  # UTF-8; a part of a character's bytes is possible
    special: str | None = None  # mask, eos, bos, pad or other

    @property
    def whole(self) -> bool:
        """No character of it lies partly in another token."""
        try:
            self.spelling.decode()
        except UnicodeDecodeError:
            return False
        return True


class Write(NamedTuple):
    position: int
    id: int
    confidence: float  # the model's probability of the token


class Step(NamedTuple):
    num_forward_passes: int  # since the beginning
    writes: tuple[Write, ...]


class Cell(NamedTuple):
    """A position of the canvas after some step."""

    id: int
    text: str  # the characters that begin in this token; none for [MASK] and other special tokens
    confidence: float | None = None  # none: given
    written: int = 0  # the step, from 1; 0 = given or still masked
    before: int | None = None  # the id that an edit has replaced


class Trace:
    """One row of a decoding: what was given, and what each step wrote.

    ids (L,) and open (L,): the row as it was before the first step, without padding (`Canvas.ids[row, :length]`, ...).
    info: circumstances; "prompt" and "title" become the headings where the trace is shown.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        ids: Sequence[int] | Tensor,
        open: Sequence[bool] | Tensor,
        info: dict[str, Any] | None = None,
    ):
        self._begin(_Tokens(tokenizer), [int(i) for i in ids], [bool(o) for o in open], info or {})

    def _begin(self, tokens: dict[int, Token], ids: list[int], open: list[bool], info: dict[str, Any]) -> None:
        if len(ids) != len(open):
            raise ValueError(f"{len(ids)} ids, but open has {len(open)} entries")
        self.initial, self.open, self.steps = ids, open, list[Step]()
        self.info = json.loads(json.dumps(info, default=str))  # as it will be read back; a Path is its name
        self.tokens = tokens
        self._ids = list(ids)
        for token in ids:
            tokens[token]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Trace) and self._as_json() == other._as_json()

    __hash__ = None

    def add(self, step: DecodingStep, row: int = 0) -> None:
        """Record row `row` of a step; columns beyond the trace's length are padding."""
        canvas = step.canvas[row, : len(self._ids)].tolist()
        written = step.written[row, : len(self._ids)].tolist()
        confidence = step.confidence[row, : len(self._ids)].tolist()
        writes = tuple(
            Write(i, token, round(confidence[i], 4))
            for i, token in enumerate(canvas)
            if written[i] or token != self._ids[i]
        )
        self._append(Step(int(step.num_forward_passes), writes))

    def _append(self, step: Step) -> None:
        for position, token, confidence in step.writes:
            if not (0 <= position < len(self._ids) and 0 <= confidence <= 1):
                raise ValueError(f"a write of confidence {confidence} at position {position} of {len(self._ids)}")
            self.tokens[token]
            self._ids[position] = token
        if step.num_forward_passes < self.num_forward_passes:
            raise ValueError(f"{step.num_forward_passes} forward passes after {self.num_forward_passes}")
        self.steps.append(step)

    @property
    def num_forward_passes(self) -> int:
        return self.steps[-1].num_forward_passes if self.steps else 0

    @property
    def ids(self) -> list[int]:
        """The row after the last step."""
        return list(self._ids)

    @property
    def text(self) -> str:
        """`decode` of the row after the last step; special tokens are left out."""
        return "".join(assemble([self.tokens[i] for i in self._ids]))

    @property
    def edits(self) -> list[tuple[int, int, int, int]]:
        """(step, position, id before, id after) wherever another token stood; [MASK] is none."""
        found, ids = [], list(self.initial)
        for number, step in enumerate(self.steps, start=1):
            for position, token, _ in step.writes:
                if self.is_edit(ids[position], token):
                    found.append((number, position, ids[position], token))
                ids[position] = token
        return found

    def is_edit(self, before: int, after: int) -> bool:
        return self.tokens[before].special != "mask" and before != after

    def frames(self) -> Iterator[list[Cell]]:
        """The row before the first step, then after each."""
        cells = self.first_frame()
        yield cells
        for number in range(1, len(self.steps) + 1):
            cells = self.next_frame(cells, number)
            yield cells

    def first_frame(self) -> list[Cell]:
        return self._with_texts([Cell(token, "") for token in self.initial])

    def next_frame(self, cells: list[Cell], number: int) -> list[Cell]:
        """`cells` after step `number`, counted from 1."""
        cells = list(cells)
        for position, token, confidence in self.steps[number - 1].writes:
            old = cells[position]
            before = old.id if self.is_edit(old.id, token) else old.before
            cells[position] = Cell(token, "", confidence, number, before)
        return self._with_texts(cells)

    def num_written(self, cells: list[Cell]) -> int:
        """Tokens of a frame that decoding has written."""
        return sum(cell.written > 0 and self.tokens[cell.id].special != "mask" for cell in cells)

    def _with_texts(self, cells: list[Cell]) -> list[Cell]:
        texts = assemble([self.tokens[cell.id] for cell in cells])
        return [c if c.text == text else c._replace(text=text) for c, text in zip(cells, texts, strict=True)]

    @classmethod
    def load(cls, path: Path) -> "Trace":
        """The only trace of a .json file; ValueError if it holds several or is unusable."""
        traces = load_traces(path)
        if len(traces) != 1:
            raise ValueError(f"{path} holds {len(traces)} traces, not one")
        return traces[0]

    def _as_json(self) -> dict[str, Any]:
        used = {*self.initial, *(write.id for step in self.steps for write in step.writes)}
        return {
            "info": self.info,
            "tokens": {str(i): _token_as_json(self.tokens[i]) for i in sorted(used)},
            "initial": self.initial,
            "open": [int(o) for o in self.open],
            "steps": [
                {"forward_passes": step.num_forward_passes, "writes": [list(write) for write in step.writes]}
                for step in self.steps
            ],
        }

    @classmethod
    def _from_json(cls, value: dict[str, Any]) -> "Trace":
        tokens = {int(i): _token_from_json(token) for i, token in value["tokens"].items()}
        trace = cls.__new__(cls)
        trace._begin(tokens, value["initial"], [bool(o) for o in value["open"]], dict(value["info"]))
        for step in value["steps"]:
            trace._append(Step(int(step["forward_passes"]), tuple(Write(*write) for write in step["writes"])))
        return trace


def assemble(tokens: Sequence[Token]) -> list[str]:
    """What to show for each token, so that all of it joined is the tokens' text.

    A character whose bytes are spread over several tokens is shown at the first of them once all are there, and nothing
    at the others; bytes that form no character become U+FFFD, as in `decode`. Special tokens show nothing and separate
    nothing, again as in `decode`; but [MASK] separates, for what will stand there is not known.
    """
    texts = ["" if token.special or not token.whole else token.spelling.decode() for token in tokens]
    run: list[int] = []
    for i, token in enumerate(tokens):
        if token.special and token.special != "mask":
            continue
        if not token.special and not token.whole:
            run.append(i)
            continue
        _join(tokens, run, texts)
        run = []
    _join(tokens, run, texts)
    return texts


def _join(tokens: Sequence[Token], run: list[int], texts: list[str]) -> None:
    """Fill in the texts of a run of tokens that are none of them whole."""
    owners = [i for i in run for _ in tokens[i].spelling]
    data, start = b"".join(tokens[i].spelling for i in run), 0
    while start < len(data):
        try:
            good, bad = data[start:].decode(), 0
        except UnicodeDecodeError as error:
            good, bad = data[start : start + error.start].decode(), error.end - error.start
        for character in good:
            texts[owners[start]] += character
            start += len(character.encode())
        if bad:
            texts[owners[start]] += REPLACEMENT
            start += bad


def write_trace(path: Path, traces: Sequence[Trace]) -> None:
    """Write .html, .gif or .json, as the name of `path` says; the file appears whole or not at all."""
    check_trace_path(path)
    path = Path(path)
    if not traces:
        raise ValueError(f"nothing was decoded that could be written to {path}")
    # Imported here: they import this module.
    if path.suffix == ".html":
        from scripts.engine.decoding.trace_page import page

        write_text(path, page(traces))
    elif path.suffix == ".gif":
        from scripts.engine.decoding.trace_gif import write_gif

        with tempfile.TemporaryDirectory() as folder:
            write_gif(Path(folder) / path.name, traces)
            write_bytes(path, (Path(folder) / path.name).read_bytes())
    else:
        value = {"format": FORMAT, "version": VERSION, "traces": [trace._as_json() for trace in traces]}
        write_text(path, json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n")


def check_trace_path(path: str | Path) -> None:
    """ValueError, before anything is decoded, unless `write_trace` can write there or `path` is `terminal`, no file."""
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
    """What `write_trace` wrote to a .json file. ValueError: no such file, another format or version, or damage."""
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
        return [Trace._from_json(trace) for trace in value["traces"]]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is a damaged trace: {type(error).__name__} {error}") from None


class _Tokens(dict[int, Token]):
    """The tokens met so far; a new one is looked up."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        roles = (("pad", tokenizer.pad_token_id), ("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id))
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self.roles = dict.fromkeys((i for i, token in added.items() if token.special), "other")
        self.roles |= {i: role for role, i in roles if i in self.roles} | {tokenizer.mask_token_id: "mask"}
        self.byte_level = isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)

    def __missing__(self, token: int) -> Token:
        name = self.tokenizer.backend_tokenizer.id_to_token(token)
        if name is None:
            raise ValueError(f"the tokenizer has no token {token}")
        if token in self.roles:
            spelling = name.encode()
        elif self.byte_level:
            spelling = _spelled(name)
        else:
            spelling = decode(self.tokenizer, [token]).encode()
        self[token] = Token(spelling, self.roles.get(token))
        return self[token]


def _spelled(name: str) -> bytes:
    """The bytes that a byte-level token stands for."""
    if all(character in _BYTES for character in name):
        return bytes(_BYTES[character] for character in name)
    return name.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable bytes of Latin-1 stand for themselves, the others for the characters from U+0100 on."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    own = {character: ord(character) for character in alphabet if ord(character) < 256}
    others = sorted(character for character in alphabet if ord(character) >= 256)
    return own | dict(zip(others, sorted(set(range(256)) - set(own.values())), strict=True))


_BYTES = _byte_alphabet()


def _token_as_json(token: Token) -> dict[str, str]:
    if not token.whole:
        return {"bytes": token.spelling.hex()}
    return {"text": token.spelling.decode()} | ({"special": token.special} if token.special else {})


def _token_from_json(value: dict[str, str]) -> Token:
    if "bytes" in value:
        return Token(bytes.fromhex(value["bytes"]))
    special = value.get("special")
    if special not in (None, "mask", *SIGNS):
        raise ValueError(f"special {special!r}")
    return Token(value["text"].encode(), special)
