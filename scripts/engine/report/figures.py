"""The figures of a report, and the pieces that they share with the figures of experiments."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from model.decoding.denoiser import SELF_SPECULATIVE
from scripts.engine.report.metrics import Metric
from scripts.engine.report.results import AR, KIND, Estimate, Point, Report, Row, is_bound, titles_of
from scripts.engine.statistics import NORMAL

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:gray")
MARKERS = "osD^v<>Ph"
STAR = {"marker": "*", "markersize": 13, "linestyle": "none"}  # autoregressive decoding among policies of diffusion


# -- shared pieces -----------------------------------------------------------------------------------------------------


def png(figure: Figure, dpi: int = 130) -> bytes:
    """The figure as a PNG without date and version: the same bytes every time."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def reach(estimates: Sequence[Estimate]) -> list[list[float]] | None:
    """Lengths of error bars below and above: of the intervals, or 95 % by the standard errors; None without any."""
    if all(estimate.low is estimate.error is None for estimate in estimates):
        return None
    below = [e.value - e.low if e.low is not None else NORMAL * (e.error or 0) for e in estimates]
    above = [e.high - e.value if e.high is not None else NORMAL * (e.error or 0) for e in estimates]
    return [[max(length, 0) for length in below], [max(length, 0) for length in above]]


def draw_points(axis: Axes, x: Sequence[float], estimates: Sequence[Estimate], **style: Any) -> None:
    """Values over x with vertical intervals, as a line if the style has one."""
    axis.errorbar(x, [estimate.value for estimate in estimates], yerr=reach(estimates), **style)


def draw_bars(axis: Axes, rows: Sequence[Sequence[Estimate]], labels: Sequence[str]) -> None:
    """Horizontal bars with intervals: one group of bars for each place, one colour for each label.

    rows[i]: the estimates of label i at all places.
    """
    width = 0.8 / len(labels)
    for number, (estimates, label) in enumerate(zip(rows, labels, strict=True)):
        shift = (number - (len(labels) - 1) / 2) * width
        axis.barh(
            [place + shift for place in range(len(estimates))],
            [estimate.value for estimate in estimates],
            height=width,
            xerr=reach(estimates),
            color=COLOURS[number % len(COLOURS)],
            error_kw={"elinewidth": 0.8, "capsize": 1.5},
            label=label,
        )


def cost_axis(axis: Axes, label: str) -> None:
    """A logarithmic x axis with ticks at 1, 2 and 5 times powers of ten."""
    axis.set(xscale="log", xlabel=label)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


# -- figures -----------------------------------------------------------------------------------------------------------


def draw_quality(report: Report, rows: Mapping[str, Sequence[Row]]) -> Figure | None:
    """Shares of right answers by group; a panel for each metric of each file. Groups by kind of question are too many
    for it: only the tables have them."""
    panels: dict[str, list[Row]] = {}
    for name, rows_of_file in rows.items():
        for row in rows_of_file:
            metric = row.metric
            if metric.share and not metric.cost and metric.name != "acc_norm" and not row.group.startswith(KIND):
                panels.setdefault(f"{name}: {metric.name}", []).append(row)
    if not panels:
        return None
    labels, columns = titles_of(report["models"]), min(2, len(panels))
    sizes = [len(shown) for shown in panels.values()]
    heights = [max(sizes[first : first + columns]) + 3 for first in range(0, len(sizes), columns)]
    figure = Figure(
        figsize=(6.5 * columns, 0.1 * (len(labels) + 1) * sum(heights) + 0.5),
        layout="constrained",
    )
    axes = figure.subplots(len(heights), columns, height_ratios=heights, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for place, (axis, (title, shown)) in enumerate(zip(axes.flat, panels.items(), strict=False)):
        draw_bars(axis, [[row.values[name] for row in shown] for name in labels], list(labels.values()))
        axis.set_yticks(range(len(shown)), [f"{row.group} ({row.count:,})" for row in shown], fontsize=7)
        bottom = heights[place // columns] - 3.4
        axis.set(xlim=(0, 1), xlabel="share of the rows, with 95 % intervals", ylim=(bottom, -0.6))
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3, axis="x")
    _legend(figure, axes[0, 0], "outside upper center", ncol=len(labels))
    return figure


def draw_likelihood(report: Report, rows: Mapping[str, Sequence[Row]]) -> Figure | None:
    """Nats per token and bits per byte of documents and replies, by language."""
    labels = titles_of(report["models"])
    labels |= {m["name"]: labels[m["name"]] + ", upper bound" for m in report["models"] if is_bound(m)}
    pairs = [(name, row) for name, rows_of_file in rows.items() for row in rows_of_file]
    panels = {
        metric: [(name, row) for name, row in pairs if row.metric.name == metric]
        for metric in ("nats per token", "bits per byte")
    }
    count = len(panels["nats per token"])
    if not count:
        return None
    figure = Figure(figsize=(11, 1.2 + 0.25 * (len(labels) + 1) * count), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, (metric, shown) in zip(axes, panels.items(), strict=True):
        draw_bars(axis, [[row.values[name] for _, row in shown] for name in labels], list(labels.values()))
        ticks = [f"{name}\n{row.group} ({row.count:,})" for name, row in shown] if axis is axes[0] else [""] * count
        axis.set_yticks(range(count), ticks, fontsize=8)
        axis.set(xlabel=f"{metric}, with 95 % intervals; less is better")
        axis.invert_yaxis()
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3, axis="x")
    _legend(figure, axes[0], "outside upper center", ncol=len(labels))
    return figure


def draw_frontier(report: Report, points: tuple[Metric, list[Point]] | None) -> Figure | None:
    """Quality against forward passes and against seconds per answer, one line for each policy of each model."""
    if points is None:
        return None
    metric, ways = points
    names = titles_of(report["models"])
    lines: dict[tuple[str, str], list[Point]] = {}
    for point in ways:
        lines.setdefault((point.model, point.policy), []).append(point)
    alone = len({model for model, policy in lines if policy != AR}) == 1  # one diffusion model
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for number, ((model, policy), line) in enumerate(lines.items()):
        style = {"color": COLOURS[number % len(COLOURS)], "label": way_of_writing(names[model], policy, alone)}
        style |= STAR if policy == AR else {"marker": MARKERS[number % len(MARKERS)], "markersize": 5, "linewidth": 1}
        quality = [point.quality for point in line]
        for axis, costs in zip(axes, ([p.passes for p in line], [p.seconds for p in line]), strict=True):
            draw_points(axis, [cost.value for cost in costs], quality, elinewidth=0.5, capsize=1.5, **style)
    for axis, label in zip(axes, ("forward passes per answer", "seconds per answer"), strict=True):
        cost_axis(axis, label)
        axis.grid(alpha=0.3, which="both")
    frontier = report["frontier"]
    models = f"{' and '.join(dict.fromkeys(names[point.model] for point in ways))}: " if alone else ""
    rows = f"{frontier['items']:,} rows of {frontier['source']}, {frontier['batch_size']} at a time"
    figure.suptitle(f"{models}{rows}", fontsize=10)
    axes[0].set_ylabel(f"{metric.name}, with 95 % intervals")
    _legend(figure, axes[0], "outside lower center", ncol=3, fontsize=8)
    return figure


def way_of_writing(title: str, policy: str, alone: bool = False) -> str:
    """What a line of the frontier is called; alone: no other diffusion model is in it."""
    if policy == AR:
        return f"{title}, key/value cache"
    if alone:
        return policy
    return f"joint: {policy}" if policy == SELF_SPECULATIVE else f"{title}: {policy}"


def _legend(figure: Figure, axis: Axes, place: str, **style: Any) -> None:
    """One legend outside all panels, of the labels of one of them."""
    figure.legend(*axis.get_legend_handles_labels(), loc=place, frameon=False, **style)
