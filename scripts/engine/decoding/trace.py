"""How a text came to be: the record of one row of a decoding, as deltas. `trace_files` writes and reads it.

Its JSON form: {
  "info": {...},                                   what the caller says of the decoding; "record" holds the provenance
  "tokens": {id: {"text"}, {"bytes"} or {"text", "special"}},   every id that occurs; bytes in hexadecimal if the
                                                   token is only a part of a character; special: its role
  "initial": [id, ...], "open": [0 or 1, ...],     before the first step; 1 = to be filled
  "steps": [{"forward_passes", "writes": [[position, id, confidence], ...], "edited": [[position, id before], ...],
             "rejected": [[position, id], ...]}, ...]
}. Forward passes are cumulative; a confidence is the model's probability of the token it wrote, from 0 to 1, to 4
decimals. A position holds the token that was written there last. Edited are writes over another token, with what stood
there before; [MASK] is written where a token was taken back, to be written anew. Rejected are tokens that a speculative
decoder had drafted and took back; one that another token is written for at once is shown as replaced by it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import decoders, pre_tokenizers
from torch import Tensor

from dataset.tokenizer import PreTrainedTokenizerFast, decode
from model.decoding.canvas import DecodingStep

RECORD = "record"  # of `Trace.info`: kept, not shown
REPLACEMENT = "\ufffd"
ROLES = ("mask", "eos", "pad", "bos", "other")  # of tokens that are not text


class Token(NamedTuple):
    """An entry of the vocabulary: its UTF-8 bytes, possibly a part of a character, and its role if it is not text."""

    spelling: bytes
    special: str | None = None  # one of ROLES

    @property
    def whole(self) -> bool:
        """True if no character lies partly in another token."""
        try:
            self.spelling.decode()
        except UnicodeDecodeError:
            return False
        return True


class Write(NamedTuple):
    position: int
    id: int
    confidence: float  # the model's probability of the token


class TraceStep(NamedTuple):
    num_forward_passes: int  # since the beginning
    writes: tuple[Write, ...]
    rejected: tuple[tuple[int, int], ...] = ()  # (position, id) of drafts that were taken back


class Cell(NamedTuple):
    """A position of the canvas after some step."""

    id: int
    text: str  # the characters that begin in this token; empty for [MASK] and other special tokens
    confidence: float | None = None  # None: given
    written: int = 0  # the step that wrote it, from 1; 0 = given or still masked
    before: int | None = None  # the id that an edit replaced, or of the draft that was rejected for it


class Trace:
    """One row of a decoding: what was given, and what each step wrote.

    vocabulary: id -> Token, a `Vocabulary` while decoding. ids (L,) and open (L,): the row before the first step,
    without padding (`Canvas.ids[row, :length]`, ...). info: anything to keep with it; "prompt" and "title" become the
    headings of a page.
    """

    def __init__(
        self,
        vocabulary: Mapping[int, Token],
        ids: Sequence[int] | Tensor,
        open: Sequence[bool] | Tensor,
        info: dict[str, Any] | None = None,
    ):
        self.initial, self.open = [int(i) for i in ids], [bool(o) for o in open]
        if len(self.initial) != len(self.open):
            raise ValueError(f"{len(self.initial)} ids, but open has {len(self.open)} entries")
        self.info = json.loads(json.dumps(info or {}, default=str))  # as it will be read back; a Path is its name
        self.tokens = {i: vocabulary[i] for i in self.initial}  # those that occur
        self.steps: list[TraceStep] = []
        self._vocabulary, self._ids = vocabulary, list(self.initial)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Trace) and self.to_json() == other.to_json()

    def add(self, step: DecodingStep, row: int = 0) -> None:
        """Record row `row` of a step; columns beyond the trace's length are padding."""
        ids = step.ids[row, : len(self._ids)].tolist()
        written = step.written[row, : len(self._ids)].tolist()
        confidence = step.confidence[row, : len(self._ids)].tolist()
        writes = tuple(
            Write(i, token, round(confidence[i], 4))
            for i, token in enumerate(ids)
            if written[i] or token != self._ids[i]
        )
        rejected: tuple[tuple[int, int], ...] = ()
        if step.rejected is not None:
            drafts = step.rejected[row, : len(self._ids)].tolist()
            rejected = tuple((i, token) for i, token in enumerate(drafts) if self._vocabulary[token].special != "mask")
        self.append(TraceStep(int(step.num_forward_passes), writes, rejected))

    def append(self, step: TraceStep) -> None:
        """Raise ValueError if a write lies outside the row, or the forward passes decrease."""
        self.tokens |= {token: self._vocabulary[token] for _, token in step.rejected}
        for position, token, confidence in step.writes:
            if not (0 <= position < len(self._ids) and 0 <= confidence <= 1):
                raise ValueError(f"a write of confidence {confidence} at position {position} of {len(self._ids)}")
            self.tokens[token] = self._vocabulary[token]
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
        """`decode` of the row after the last step, without special tokens."""
        return "".join(assemble([self.tokens[i] for i in self._ids]))

    @property
    def edits(self) -> list[tuple[int, int, int, int]]:
        """(step, position, id before, id after) of every write over another token; [MASK] does not count as one."""
        edits, ids = [], list(self.initial)
        for number, step in enumerate(self.steps, start=1):
            for position, token, _ in step.writes:
                if self.is_edit(ids[position], token):
                    edits.append((number, position, ids[position], token))
                ids[position] = token
        return edits

    def is_edit(self, before: int, after: int) -> bool:
        return self.tokens[before].special != "mask" and before != after

    def frames(self) -> Iterator[list[Cell]]:
        """Yield the row before the first step, then after each."""
        cells = self.first_frame()
        yield cells
        for number in range(1, len(self.steps) + 1):
            cells = self.next_frame(cells, number)
            yield cells

    def first_frame(self) -> list[Cell]:
        return self._with_texts([Cell(token, "") for token in self.initial])

    def next_frame(self, cells: list[Cell], number: int) -> list[Cell]:
        """`cells` after step `number`, counted from 1."""
        cells, step = list(cells), self.steps[number - 1]
        rejected = dict(step.rejected)
        for position, token, confidence in step.writes:
            old = cells[position]
            before = old.id if self.is_edit(old.id, token) else rejected.get(position, old.before)
            cells[position] = Cell(token, "", confidence, number, before)
        return self._with_texts(cells)

    def num_written(self, cells: list[Cell]) -> int:
        """Number of a frame's tokens that decoding wrote."""
        return sum(cell.written > 0 and self.tokens[cell.id].special != "mask" for cell in cells)

    def _with_texts(self, cells: list[Cell]) -> list[Cell]:
        texts = assemble([self.tokens[cell.id] for cell in cells])
        return [c if c.text == text else c._replace(text=text) for c, text in zip(cells, texts, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """The form described above."""
        edited: dict[int, list[list[int]]] = {}
        for number, position, before, _ in self.edits:
            edited.setdefault(number, []).append([position, before])
        return {
            "info": self.info,
            "tokens": {str(i): _token_to_json(self.tokens[i]) for i in sorted(self.tokens)},
            "initial": self.initial,
            "open": [int(o) for o in self.open],
            "steps": [
                {"forward_passes": step.num_forward_passes, "writes": [list(write) for write in step.writes]}
                | ({"edited": edited[number]} if number in edited else {})
                | ({"rejected": [list(draft) for draft in step.rejected]} if step.rejected else {})
                for number, step in enumerate(self.steps, start=1)
            ],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Trace":
        tokens = {int(i): _token_from_json(token) for i, token in value["tokens"].items()}
        trace = cls(tokens, value["initial"], value["open"], dict(value["info"]))
        for step in value["steps"]:
            writes = tuple(Write(*write) for write in step["writes"])
            rejected = tuple((int(position), int(token)) for position, token in step.get("rejected", ()))
            trace.append(TraceStep(int(step["forward_passes"]), writes, rejected))
        return trace


def _token_to_json(token: Token) -> dict[str, str]:
    if not token.whole:
        return {"bytes": token.spelling.hex()}
    return {"text": token.spelling.decode()} | ({"special": token.special} if token.special else {})


def _token_from_json(value: dict[str, str]) -> Token:
    if "bytes" in value:
        return Token(bytes.fromhex(value["bytes"]))
    special = value.get("special")
    if special not in (None, *ROLES):
        raise ValueError(f"special {special!r}")
    return Token(value["text"].encode(), special)


# -- from tokens to characters -----------------------------------------------------------------------------------------


def assemble(tokens: Sequence[Token]) -> list[str]:
    """Return the text to show for each token; joined, they are the tokens' text.

    A character whose bytes are spread over several tokens is shown at the first of them once all are there, and nothing
    at the others; bytes that form no character become U+FFFD, as in `decode`. Special tokens show nothing and separate
    nothing, again as in `decode`; but [MASK] separates, because the text that will stand there is not known.
    """
    texts = ["" if token.special or not token.whole else token.spelling.decode() for token in tokens]
    run: list[int] = []  # neighbours that are parts of characters
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
    """Fill in the texts of a run of tokens none of which is whole."""
    owners = [i for i in run for _ in tokens[i].spelling]  # of each byte
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


class Vocabulary(dict[int, Token]):
    """id -> Token of a tokenizer, looked up when first asked for."""

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
            spelling = _byte_level_spelling(name)
        else:
            spelling = decode(self.tokenizer, [token]).encode()
        self[token] = Token(spelling, self.roles.get(token))
        return self[token]


def _byte_level_spelling(name: str) -> bytes:
    """The bytes that a byte-level token stands for."""
    if all(character in BYTES for character in name):
        return bytes(BYTES[character] for character in name)
    return name.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable bytes of Latin-1 stand for themselves, the others for the characters from U+0100 on."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    own = {character: ord(character) for character in alphabet if ord(character) < 256}
    others = sorted(character for character in alphabet if ord(character) >= 256)
    return own | dict(zip(others, sorted(set(range(256)) - set(own.values())), strict=True))


BYTES = _byte_alphabet()
