"""A trace, or several one below the other, as an animation."""

import contextlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.animation import PillowWriter
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from scripts.engine.decoding.trace import Cell, Trace
from scripts.engine.decoding.trace_terminal import Fragment, lay_out, printable, shown, width_of

MAX_FRAMES = 120
SECONDS, HELD_SECONDS = 10, 2
COLUMNS = 76
DPI, FONT_SIZE = 100, 12
COLUMN, LINE = 0.6 * FONT_SIZE / 72, 1.75 * FONT_SIZE / 72  # inches; a column is as wide as the monospaced font's
MARGIN = 0.3  # inches
LATIN = "DejaVu Sans Mono"  # comes with matplotlib
# The first of them that is installed is used.
CJK = [
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "PingFang HK",
    "Hiragino Sans GB",
    "Heiti TC",
    "STHeiti",
    "Microsoft YaHei",
    "SimHei",
    "SimSun",
    "DengXian",
    "Arial Unicode MS",
    "Droid Sans Fallback",
    "Noto Serif CJK SC",
    "Noto Serif CJK JP",
]
PAPER, INK, SOFT, BLANK_COLOUR, EDIT = "#fbfaf7", "#23211d", "#6d685f", "#efece5", "#b3261e"
# From confidence 0 to 1, as on the page.
SHADES = LinearSegmentedColormap.from_list("confidence", ["#fcf0c8", "#cfeabb", "#8be0c6", "#6cbcf0"])(
    np.linspace(0, 1, 65)
)


def write_gif(path: Path, traces: Sequence[Trace]) -> None:
    """At most MAX_FRAMES frames, spread evenly; several traces go in step by forward passes. The last frame is held."""
    panels = [_Panel(trace) for trace in traces]
    moments = _moments(traces)
    size = (COLUMNS * COLUMN + 2 * MARGIN, sum(panel.height for panel in panels) + 2 * MARGIN)
    sheet, film = (Figure(figsize=size, dpi=DPI, facecolor=PAPER) for _ in range(2))
    # Only what changes is drawn anew, on the sheet; the film shows its pixels.
    canvas = FigureCanvasAgg(sheet)
    FigureCanvasAgg(film)
    fonts, top, drawings = _fonts("".join(panel.characters for panel in panels)), size[1] - MARGIN, []
    for panel in panels:
        drawings.append(_Drawing(sheet, panel, top, fonts))
        top -= panel.height
    rate = min(max(len(moments) / SECONDS, 3), 15)
    writer = PillowWriter(fps=rate)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # _fonts has said so
        canvas.draw()
        picture = film.figimage(np.asarray(canvas.buffer_rgba()))
        with writer.saving(film, str(path), DPI):
            for moment in [*moments, *[moments[-1]] * round(HELD_SECONDS * rate)]:
                for drawing, number in zip(drawings, moment, strict=True):
                    drawing.show(number, canvas.get_renderer())
                picture.set_data(np.asarray(canvas.buffer_rgba()))
                writer.grab_frame()


def _moments(traces: Sequence[Trace]) -> list[tuple[int, ...]]:
    """The step that each trace shows, frame by frame."""
    if len(traces) == 1:
        every = [(number,) for number in range(len(traces[0].steps) + 1)]
    else:
        passes = [[step.num_forward_passes for step in trace.steps] for trace in traces]
        last = max((trace.num_forward_passes for trace in traces), default=0)
        every = [tuple(int(np.searchsorted(p, now, side="right")) for p in passes) for now in range(last + 1)]
    return [every[i] for i in np.unique(np.linspace(0, len(every) - 1, MAX_FRAMES).round().astype(int))]


class _Panel:
    """A trace laid out once, so that nothing moves: what will be written has its place from the beginning."""

    def __init__(self, trace: Trace):
        self.trace, self.frames = trace, list(trace.frames())
        self.texts = [shown(trace.tokens, frame) for frame in self.frames]
        # An edit may have replaced a longer text, which needs its place, too.
        self.widest = [max(reversed(texts), key=_columns) for texts in zip(*self.texts, strict=True)]
        self.places = lay_out(self.widest, COLUMNS)
        lines = max((f.line for fragments in self.places for f in fragments), default=0) + 1
        words = " ".join(" \u2013 ".join(str(trace.info[n]) for n in ("title", "prompt") if trace.info.get(n)).split())
        self.heading = lay_out([printable(words)], COLUMNS)[0][0].text if words else ""
        self.height = (lines + 2.2 + bool(self.heading)) * LINE
        self.characters = self.heading + "".join(text for frame in self.texts for text in frame)

    def status(self, number: int) -> str:
        passes = self.trace.steps[number - 1].num_forward_passes if number else 0
        filled, steps = self.trace.num_written(self.frames[number]), len(self.trace.steps)
        rate = f"   {filled / passes:.2f} tokens per pass" if passes else ""
        return f"step {number}/{steps}   {passes} forward passes   {filled}/{sum(self.trace.open)} tokens{rate}"


def _columns(text: str) -> int:
    return sum(map(width_of, text.replace("\n", "")))


class _Drawing:
    """A panel in a figure, its upper edge `top` inches above the figure's lower one."""

    def __init__(self, figure: Figure, panel: _Panel, top: float, fonts: list[str]):
        self.panel = panel
        width, height = figure.get_size_inches()
        self.axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
        self.axes.set_axis_off()
        self.style = {"fontsize": FONT_SIZE, "fontfamily": fonts, "va": "center_baseline", "parse_math": False}
        if panel.heading:
            self._text(MARGIN, top - LINE / 2, panel.heading, color=INK)
            top -= LINE
        self.status = self._text(MARGIN, top - LINE / 2, "", color=SOFT)
        self.line = self._box(0, top, width, LINE)
        top -= 1.4 * LINE
        # What lies under a cell, the cell, its text; and the state they were last drawn in.
        self.cells = [(i, place, *self._cell(place, top)) for i, places in enumerate(panel.places) for place in places]
        self.drawn: dict[int, tuple] = {}
        self.animated = [self.status, self.line, *(artist for cell in self.cells for artist in cell[2:])]
        for artist in self.animated:
            artist.set_animated(True)  # canvas.draw() leaves them out

    def _text(self, x: float, y: float, text: str, **more: Any) -> Text:
        return self.axes.text(x, y, text, **self.style, **more)

    def _box(self, left: float, top: float, width: float, height: float, **style: Any) -> Rectangle:
        return self.axes.add_patch(Rectangle((left, top - height), width, height, **({"color": PAPER} | style)))

    def _cell(self, place: Fragment, top: float) -> tuple[Rectangle, Rectangle, Text]:
        left, width, top = MARGIN + place.column * COLUMN, _columns(place.text) * COLUMN, top - place.line * LINE
        inset = 0.01
        return (
            self._box(left, top, width, LINE),
            self._box(left + inset, top - 0.08 * LINE, width - 2 * inset, 0.84 * LINE, color=None, linewidth=0.8),
            self._text(left + width / 2, top - 0.5 * LINE, "", ha="center"),
        )

    def show(self, number: int, renderer: RendererAgg) -> None:
        """The state after step `number`, drawn over the one before."""
        panel, frame, texts = self.panel, self.panel.frames[number], self.panel.texts[number]
        self.status.set_text(panel.status(number))
        self.line.draw(renderer)
        self.status.draw(renderer)
        for n, (i, place, under, box, artist) in enumerate(self.cells):
            cell, special = frame[i], panel.trace.tokens[frame[i].id].special
            first = place is panel.places[i][0]
            text = place.text if texts[i] == panel.widest[i] else texts[i].replace("\n", "") if first else ""
            state = (
                "" if special == "mask" else text,
                SOFT if special else INK if cell.before is None else EDIT,
                _colour(cell, special == "mask"),
                INK if number and cell.written == number else "none",
            )
            if self.drawn.get(n) == state:
                continue
            self.drawn[n] = state
            artist.set(text=state[0], color=state[1])
            box.set(facecolor=state[2], edgecolor=state[3])
            for part in (under, box, artist):
                part.draw(renderer)


def _colour(cell: Cell, masked: bool) -> tuple[float, ...] | str:
    if masked:
        return BLANK_COLOUR
    return tuple(SHADES[round(cell.confidence * (len(SHADES) - 1))]) if cell.written else PAPER


def _fonts(characters: str) -> list[str]:
    """Families to draw `characters` with. Says which of them no installed font has."""
    installed = _installed()
    if not installed.keys() & set(CJK):
        # matplotlib remembers which fonts there were when it was first used.
        for path in set(font_manager.findSystemFonts()) - {font.fname for font in font_manager.fontManager.ttflist}:
            with contextlib.suppress(OSError, RuntimeError):  # no font that it can read
                font_manager.fontManager.addfont(path)
        installed = _installed()
    families = [LATIN, *[name for name in CJK if name in installed][:1]]
    known = set().union(*(font_manager.get_font(installed[name]).get_charmap() for name in families))
    missing = sorted({c for c in characters if c != "\n" and ord(c) not in known})
    if missing:
        print(
            f"{len(missing)} {'characters have' if len(missing) > 1 else 'character has'} no glyph in the fonts that "
            f"are installed here and will be drawn as boxes: {''.join(missing[:20])}"
            f"{' ...' if len(missing) > 20 else ''} (for Chinese, install Noto Sans CJK)",
            file=sys.stderr,
        )
    return families


def _installed() -> dict[str, str]:
    """family -> file"""
    return {font.name: font.fname for font in font_manager.fontManager.ttflist}
