"""A decoding on a terminal, and what of a text is shown there."""

import io
import re
import sys
import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from dataset.tokenizer import encode
from model.decoding.canvas import DecodingStep
from scripts.engine.decoding.trace import Trace, Vocabulary
from scripts.engine.decoding.trace_terminal import LiveView, on_screen, printable, side_by_side
from tests.scripts.decoding.traces import EOS, recorded, written_as
from tests.scripts.models import Terminal


def replayed(tokenizer, trace, stream, **more):
    """Show a decoding once more, live."""
    live = LiveView(Trace(Vocabulary(tokenizer), trace.initial, trace.open, trace.info), stream=stream, **more)
    for frame, step in zip(list(trace.frames())[1:], trace.steps, strict=True):
        canvas = torch.tensor([[cell.id for cell in frame]])
        written, confidence = torch.zeros_like(canvas, dtype=torch.bool), torch.zeros(canvas.shape)
        for position, _, probability in step.writes:
            written[0, position], confidence[0, position] = True, probability
        live(DecodingStep(canvas, written, confidence, step.num_forward_passes))
    assert live.trace == trace


def test_without_a_terminal_every_kth_step_and_the_last_is_a_plain_line(tokenizer):
    stream, trace = io.StringIO(), written_as(tokenizer, "ab", "龘\nx")
    replayed(tokenizer, trace, stream, every=2)
    lines = stream.getvalue().splitlines()
    assert [re.match(r"\[step (\d+), (\d+) forward passes, (\d+) of 5", line).groups() for line in lines] == [
        ("2", "4", "2"),
        ("4", "8", "4"),
        ("5", "10", "5"),
    ]
    assert [line.rpartition("]  ")[2] for line in lines] == ["▸ab◌···", "▸ab龘↵·", "▸ab龘↵x"]


def test_an_end_that_leaves_blanks_behind_it_is_the_last_line(tokenizer):
    a = encode(tokenizer, "a")[0]
    trace, _ = recorded(tokenizer, [1], [0] * 4, [[(1, EOS, 0.5)], [(0, a, 0.5)]])
    stream = io.StringIO()
    replayed(tokenizer, trace, stream, every=100)
    assert stream.getvalue().rpartition("]  ")[2] == "▸a■··\n"


def test_a_live_view_may_leave_out_the_prompt(tokenizer):
    stream = io.StringIO()
    replayed(tokenizer, written_as(tokenizer, "the cat", "ab"), stream, start=len(encode(tokenizer, "the cat")) + 1)
    assert [line.rpartition("]  ")[2] for line in stream.getvalue().splitlines()] == ["a·", "ab"]


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (12, 6), (3, 2)])
def test_a_terminal_is_redrawn_in_place_and_left_as_it_was(tokenizer, monkeypatch, columns, lines):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", str(lines))
    stream = Terminal()
    replayed(tokenizer, written_as(tokenizer, "老朋友", "看见了一只小猫\n\x1b[2J\x9b2J\u202e龘 the river"), stream)
    plain = re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue())
    first, *others = re.split(r"\x1b\[(\d+)F\x1b\[0J", plain)
    drawings, ups = [first, *others[1::2]], [int(up) for up in others[::2]]
    assert ups == [drawing.count("\n") for drawing in drawings[:-1]] and max(ups) <= max(lines - 1, 2)
    assert not re.search(r"\x1b\[[\d;]*[1-9][\d;]*m[^\x1b]*\n", stream.getvalue())  # no colour lasts beyond its line
    for drawing in drawings:
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", drawing)
        assert max(map(cell_len, drawing.split("\n"))) <= max(columns - 1, 4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("ab \n好，", max_size=40), min_size=1, max_size=3), st.integers(20, 60))
def test_texts_side_by_side_keep_to_their_columns(texts, columns):
    lines = side_by_side(["t"] * len(texts), texts, columns)
    assert max(map(cell_len, lines)) <= columns
    shown = "".join(lines[2:])  # below the titles and their rule
    for character in set("ab好，"):
        assert shown.count(character) == "".join(texts).count(character)


# --- characters ---

FAMILY, PERSIAN, HINDI = (
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    "\u0915\u094d\u200d\u0937",
)
HEART = "\u2764\ufe0f\u200d\U0001f525"


@pytest.mark.parametrize("text", [FAMILY, PERSIAN, HINDI, HEART, "\u0627\u06dd\u0661"])
def test_joined_emoji_and_letters_are_shown_as_they_are(text):
    assert printable(text) == on_screen(text) == text


def test_every_other_format_character_is_a_sign():
    """Bidi controls, which reorder a line, tags and zero-width spaces, which hide text, and what Unicode adds."""
    joiners_and_marks = {0x200C, 0x200D, *range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD}
    shown = {
        c for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)) == "Cf" and printable(chr(c)) == chr(c)
    }
    assert shown == joiners_and_marks
    bidi = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    assert printable(bidi) == "\u00a4" * len(bidi)


@pytest.mark.parametrize("columns", [12, 30])
def test_joined_characters_fit_a_terminal_that_does_not_join_them(columns, tokenizer, monkeypatch):
    """A joiner takes no column, and what it joins as many as alone; no line is longer, so none is broken twice."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", "24")
    stream, text = Terminal(), FAMILY + PERSIAN + HINDI * 5 + HEART
    replayed(tokenizer, written_as(tokenizer, "a", text), stream)
    last = re.sub(r"\x1b\[[\d;]*m", "", re.split(r"\x1b\[\d+F\x1b\[0J", stream.getvalue())[-1])
    lines = last.splitlines()
    assert all(sum(map(cell_len, line.replace("\u200d", ""))) <= columns - 1 for line in lines)
    assert text in "".join(lines)
