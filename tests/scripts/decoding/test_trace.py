"""A decoding recorded, written, read back and shown."""

import base64
import hashlib
import io
import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.cells import cell_len

from dataset.tokenizer import decode, encode, token_ids, train_characters
from model.decoding.autoregressive import SamplingConfig
from model.decoding.canvas import Canvas
from model.decoding.decode import decode as fill
from model.decoding.denoiser import DenoisingConfig
from scripts.engine.decoding import trace_gif
from scripts.engine.decoding.trace import Trace, Vocabulary
from scripts.engine.decoding.trace_files import check_trace_path, load_traces, write_trace
from scripts.engine.decoding.trace_gif import COLUMNS, MAX_FRAMES, lay_out, moments_of
from scripts.engine.decoding.trace_page import TEMPLATE, page, page_data
from scripts.engine.decoding.trace_terminal import LiveView
from tests.scripts.decoding.traces import MASK, one_by_one, recorded, written_as

EVIL = "</script ></script><img src=x onerror=alert(1)><!-- &lt; \u2028 -->"


tokens = st.integers(0, 379)
decodings = st.tuples(
    st.lists(tokens.filter(lambda i: i != MASK), min_size=1, max_size=6),
    st.lists(
        st.lists(st.tuples(st.integers(0, 7), tokens, st.floats(0, 1)), max_size=3, unique_by=lambda w: w[0]),
        max_size=9,
    ),
)


def stretches(ids):
    """Between masks."""
    return [list(group) for masked, group in itertools.groupby(ids, MASK.__eq__) if not masked]


# --- the record ---


@settings(max_examples=100, deadline=None)
@given(decodings)
def test_frames_rebuilt_from_what_was_written_equal_the_canvases_seen(tokenizer, made):
    """Rewriting, writing control tokens and masking again included."""
    trace, seen = recorded(tokenizer, made[0], [0] * 8, made[1])
    assert [[cell.id for cell in frame] for frame in trace.frames()] == seen
    assert trace.ids == seen[-1]


@settings(max_examples=100, deadline=None)
@given(decodings)
def test_the_text_of_every_frame_is_what_decode_says(tokenizer, made):
    trace, seen = recorded(tokenizer, made[0], [0] * 8, made[1])
    for frame, ids in zip(trace.frames(), seen, strict=True):
        text = "".join(cell.text for cell in frame)
        assert text == "".join(decode(tokenizer, part) for part in stretches(ids))
    assert trace.text == text


@settings(max_examples=100, deadline=None)
@given(decodings)
def test_what_is_embedded_in_the_page_gives_every_frame(tokenizer, made):
    trace, _ = recorded(tokenizer, made[0], [0] * 8, made[1])
    cells = json.loads(json.dumps(page_data(trace)))["cells"]
    for number, frame in enumerate(trace.frames()):
        shown = [[entry for entry in history if entry[0] <= number][-1] for history in cells]
        assert [entry[1:] for entry in shown] == [[c.text, c.id, c.confidence, c.written, c.before] for c in frame]


@settings(max_examples=50, deadline=None)
@given(decodings)
def test_a_saved_trace_reads_back_as_it_was(tokenizer, tmp_path_factory, made):
    path = tmp_path_factory.mktemp("trace") / "t.json"
    trace, _ = recorded(tokenizer, made[0], [0] * 8, made[1], {"prompt": "你好", "path": path, "top": (1, 2.5, None)})
    other = written_as(tokenizer, "a", "the river", backwards=True)
    write_trace(path, [trace, other])
    loaded, last = load_traces(path)
    assert loaded == trace and list(loaded.frames()) == list(trace.frames()) and loaded.edits == trace.edits
    assert loaded.info == {"prompt": "你好", "path": str(path), "top": [1, 2.5, None]}
    assert last == other and page([loaded, last]) == page([trace, other])


def test_both_decoders_are_recorded_as_they_went(tokenizer, tiny_model):
    shape = {**token_ids(tokenizer), "vocab_size": len(tokenizer)}
    prompts = [[1, *encode(tokenizer, "the cat")], [1]]
    for attention, config in (("causal", SamplingConfig()), ("full", DenoisingConfig(gen_steps=5))):
        model = tiny_model(**shape, attention=attention)
        canvas = Canvas.continuing(prompts, 12, model.config)
        traces = [
            Trace(Vocabulary(tokenizer), canvas.ids[row, :length], canvas.open[row, :length])
            for row, length in enumerate(canvas.lengths.tolist())
        ]
        steps = []

        def watch(step, traces=traces, steps=steps):
            steps.append(step)
            for row, trace in enumerate(traces):
                trace.add(step, row)

        decoded = fill(model, canvas, config, [0, 1], watch)
        for row, trace in enumerate(traces):
            seen = [canvas.ids[row].tolist(), *(step.ids[row].tolist() for step in steps)]
            assert [[c.id for c in frame] for frame in trace.frames()] == [ids[: len(trace.ids)] for ids in seen]
            new = [i for i, is_open in zip(trace.ids, trace.open, strict=True) if is_open]
            assert new[: len(decoded.new[row])] == decoded.new[row]
            assert trace.num_forward_passes == decoded.num_forward_passes and not trace.edits


def test_a_draft_that_was_rejected_is_told_and_shown_as_replaced(tokenizer, tiny_model, tmp_path):
    """If another token was written in its place at once; what was drafted after it is told alone."""
    model = tiny_model(**{**token_ids(tokenizer), "vocab_size": len(tokenizer)}, attention="joint", block_size=4)
    canvas = Canvas.continuing([[1, *encode(tokenizer, "the cat")]], 20, model.config)
    trace, config = Trace(Vocabulary(tokenizer), *canvas.text(0)), DenoisingConfig(gen_remasking="self_speculative")
    steps = []
    decoded = fill(model, canvas, config, [0], lambda step: steps.append(step) or trace.add(step))
    rejected = [dict(step.rejected) for step in trace.steps]
    assert sum(map(len, rejected)) == decoded.row_drafted[0] - decoded.row_accepted[0] > 0
    for step, cells, drafts in zip(trace.steps, list(trace.frames())[1:], rejected, strict=True):
        for position, _, _ in step.writes:
            assert cells[position].before == drafts.get(position)
    write_trace(tmp_path / "t.json", [trace])
    assert load_traces(tmp_path / "t.json") == [trace] and not trace.edits
    assert f"{decoded.row_accepted[0]} of {decoded.row_drafted[0]} drafts kept" in live_lines(trace, steps)


@pytest.mark.parametrize("edit", ["overwrite", "remask"])
def test_edits_are_marked_with_what_stood_there_before(edit, tokenizer, tiny_model, tmp_path):
    model = tiny_model(**{**token_ids(tokenizer), "vocab_size": len(tokenizer)}, attention="full")
    canvas = Canvas.continuing([[1, *encode(tokenizer, "the cat")]], 12, model.config)
    eager = DenoisingConfig(gen_remasking="threshold", gen_confidence_threshold=0.01, gen_temp=1.0)
    trace, steps = Trace(Vocabulary(tokenizer), *canvas.text(0)), []
    config = replace(eager, gen_edit_threshold=0.0, gen_edit=edit)
    decoded = fill(model, canvas, config, [0], lambda step: steps.append(step) or trace.add(step))
    assert len(trace.edits) == decoded.row_edits[0] == steps[-1].num_edits > 3
    told = [
        (i, place, before)
        for i, step in enumerate(trace.to_json()["steps"])
        for place, before in step.get("edited", [])
    ]
    changed = [
        (i, place, int(ids[place]))
        for i, (ids, step) in enumerate(zip([canvas.ids[0], *(s.ids[0] for s in steps)], steps, strict=False))
        for place in range(len(ids))
        if ids[place] not in (MASK, step.ids[0, place])
    ]
    assert told == changed
    frames = list(trace.frames())
    for i, place, before in told:
        assert frames[i + 1][place].before == before
    write_trace(tmp_path / "t.json", [trace])
    assert load_traces(tmp_path / "t.json") == [trace]
    assert f", {len(trace.edits)} edits" in live_lines(trace, steps)


def live_lines(trace, steps):
    stream = io.StringIO()
    live = LiveView(Trace(trace._vocabulary, trace.initial, trace.open), stream=stream)
    for step in steps:
        live(step)
    return stream.getvalue()


def test_another_token_in_the_place_of_one_is_an_edit(tokenizer):
    a, b = encode(tokenizer, "a")[0], encode(tokenizer, "b")[0]
    again = [[(0, a, 0.5)], [(0, a, 0.9)], [(1, a, 0.5)], [(0, b, 0.7)], [(1, MASK, 0.1)], [(1, b, 0.2), (0, b, 0.1)]]
    trace, _ = recorded(tokenizer, [1], [0, 0], again)
    assert trace.edits == [(4, 1, a, b), (5, 2, a, MASK)]
    frames = list(trace.frames())
    assert [trace.num_written(frame) for frame in frames] == [0, 1, 1, 2, 2, 1, 2]
    assert [frame[1].before for frame in frames] == [None, None, None, None, a, a, a]
    assert [frame[1].confidence for frame in frames[1:5]] == [0.5, 0.9, 0.9, 0.7]
    assert [entry[5] for entry in page_data(trace)["cells"][1]] == [None, None, None, a, a]


# --- characters in parts ---


@pytest.mark.parametrize("backwards", [False, True])
def test_a_character_of_several_tokens_appears_when_it_is_complete(tokenizer, backwards):
    parts = encode(tokenizer, "龘")
    assert len(parts) == 3
    trace = written_as(tokenizer, "a", "龘x", backwards=backwards)
    *_, last = trace.frames()
    assert [cell.text for cell in last[2:]] == ["龘", "", "", "x"]
    complete = ["龘" in "".join(cell.text for cell in frame) for frame in trace.frames()]
    assert complete == sorted(complete) and complete.index(True) == (4 if backwards else 3)
    assert trace.text == "a龘x"


def test_a_tokenizer_of_characters_is_shown_as_well():
    tokenizer = train_characters(["die Größe 好\n"])
    trace = written_as(tokenizer, "die", " Größe 好\n")
    assert trace.text == "die Größe 好\n"
    assert [cell.text for cell in list(trace.frames())[-1]] == ["", *"die Größe 好\n"]


# --- files ---


def unusable(change):
    def write(path, tokenizer):
        write_trace(path, [written_as(tokenizer, "a", "b")])
        value = json.loads(path.read_text(encoding="utf-8"))
        change(value)
        path.write_text(json.dumps(value), encoding="utf-8")

    return write


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda path, _: None, "there is no trace"),
        (lambda path, _: path.write_bytes(b"\xff\xfe\x00"), "not JSON"),
        (lambda path, _: path.write_text("[1"), "not JSON"),
        (lambda path, _: path.write_text("[1]"), "does not say that its format"),
        (unusable(lambda v: v.update(version=2)), "version 2; this code reads version 1"),
        (unusable(lambda v: v.pop("traces")), "damaged"),
        (unusable(lambda v: v["traces"][0]["steps"][0]["writes"][0].__setitem__(0, 99)), "damaged.* position 99"),
        (unusable(lambda v: v["traces"][0]["steps"][0]["writes"][0].__setitem__(1, 99)), "damaged.*99"),
        (unusable(lambda v: v["traces"][0]["steps"][0]["writes"][0].__setitem__(2, 7)), "damaged.*confidence 7"),
        (unusable(lambda v: v["traces"][0]["open"].pop()), "damaged.*3 ids, but open has 2"),
        (unusable(lambda v: v["traces"][0]["steps"][0].update(forward_passes=1e999)), "damaged.*infinity"),
        (lambda path, tokenizer: path.write_text("[" * 100_000), "not JSON"),
        (unusable(lambda v: v["traces"][0]["tokens"]["1"].update(special="king")), "damaged.*king"),
    ],
)
def test_an_unusable_file_is_refused(tokenizer, tmp_path, make, complaint):
    make(tmp_path / "t.json", tokenizer)
    with pytest.raises(ValueError, match=complaint):
        load_traces(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("t.mp4", r"\.html, \.gif, \.json or shown on the `terminal`, not as .*t\.mp4"),
        ("html", "not as"),
        ("missing/t.html", "there is no folder .*missing"),
        ("folder.gif", "is a folder"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_beforehand(tokenizer, tmp_path, name, complaint):
    (tmp_path / "folder.gif").mkdir()
    with pytest.raises(ValueError, match=complaint):
        check_trace_path(tmp_path / name)
    with pytest.raises(ValueError, match=complaint):
        write_trace(tmp_path / name, [written_as(tokenizer, "a", "b")])
    for good in (tmp_path / "t.html", str(tmp_path / "t.gif"), tmp_path / "t.json", "terminal"):
        check_trace_path(good)


# --- the page ---


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.scripts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name) for name, _ in attributes]

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script":
            self.scripts.append(data)


def test_nothing_that_a_model_or_a_prompt_says_becomes_part_of_the_page(tokenizer, tmp_path):
    harmless = written_as(tokenizer, "a", "b", info={"prompt": "a", "x": "b"})
    evil = written_as(tokenizer, EVIL, EVIL, info={"prompt": EVIL, "title": EVIL, EVIL: EVIL, "x": {EVIL: [EVIL]}})
    write_trace(tmp_path / "t.html", [evil])
    quiet, loud = Elements(page([harmless])), Elements((tmp_path / "t.html").read_text(encoding="utf-8"))
    assert (loud.tags, loud.attributes) == (quiet.tags, quiet.attributes)
    (data,) = (text for text in loud.scripts if text.startswith("["))
    embedded = json.loads(data)
    assert not set("<>&") & set(data) and data.isascii()
    assert embedded == json.loads(json.dumps([page_data(evil)]))
    assert "".join(history[-1][1] for history in embedded[0]["cells"]) == EVIL + EVIL


def test_the_page_needs_nothing_else_and_runs_only_its_own_script(tokenizer):
    made = page([written_as(tokenizer, "a", "b")])
    assert not re.search(r"https?:|//\w|\bsrc=|url\(|@import|innerHTML", TEMPLATE.read_text(encoding="utf-8"))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', made)[1]
    for element in ("style", "script"):
        content = re.search(rf"<{element}>(.*?)</{element}>", made, re.DOTALL)[1].encode()
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


# --- the animation ---


def frames_of(path):
    with Image.open(path) as image:
        durations = []
        for number in range(image.n_frames):
            image.seek(number)
            durations.append(image.info["duration"])
    return durations


def test_the_animation_has_a_frame_per_step_and_holds_the_last(tokenizer, tmp_path):
    trace = written_as(tokenizer, "the cat", " sees $x^2$\n\x1b[2J", info={"prompt": r"the $\cat$"})
    write_trace(tmp_path / "t.gif", [trace])
    durations = frames_of(tmp_path / "t.gif")
    assert len(durations) == len(trace.steps) + 1
    assert len(set(durations[:-1])) == 1 and durations[-1] > 2000
    assert [path.name for path in tmp_path.iterdir()] == ["t.gif"]


def test_a_long_animation_is_thinned_out(tokenizer):
    long = one_by_one(tokenizer, [1], encode(tokenizer, "a") * (2 * MAX_FRAMES))
    moments = moments_of([long])
    assert len(moments) == MAX_FRAMES and (moments[0], moments[-1]) == ((0,), (2 * MAX_FRAMES,))


def test_two_traces_move_by_forward_passes(tokenizer):
    slow, fast = written_as(tokenizer, "a", "aa"), written_as(tokenizer, "a", "a")  # two passes per step
    assert moments_of([slow, fast]) == [(0, 0), (0, 0), (1, 1), (1, 1), (2, 1)]


def test_missing_glyphs_are_told_in_one_line(tokenizer, tmp_path, monkeypatch, capsys, recwarn):
    monkeypatch.setattr(trace_gif, "CJK", ())
    monkeypatch.setattr(trace_gif.font_manager, "findSystemFonts", lambda: [])
    write_trace(tmp_path / "t.gif", [written_as(tokenizer, "a", "好")])
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 character " in line and "好" in line and "install Noto Sans CJK" in line
    assert len(frames_of(tmp_path / "t.gif")) > 1
    assert not [w for w in recwarn if "Glyph" in str(w.message)]
    write_trace(tmp_path / "t.gif", [written_as(tokenizer, "a", "b")])
    assert capsys.readouterr().err == ""


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("ab \n好e\u0301，", max_size=30), max_size=20))
def test_a_layout_keeps_the_order_and_the_width(texts):
    layout = lay_out(texts)
    assert ["".join(place.text for place in places) for places in layout] == [t.replace("\n", "") for t in texts]
    ends = {}
    for place in itertools.chain(*layout):
        assert place.line >= max(ends, default=0) and place.column == ends.get(place.line, 0)
        ends[place.line] = place.column + cell_len(place.text)
    assert max(ends.values(), default=0) <= COLUMNS
