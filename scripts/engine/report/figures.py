"""The pictures of a report, as PNG bytes that hold no date and no version."""

import io
from typing import Any

from scripts.engine.report.results import AR, KIND, Estimate, Metric, Point, Row, is_bound

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:gray")
MARKERS = "osD^v<>Ph"
Z = 1.96


def draw_quality(report: dict[str, Any], rows: dict[str, list[Row]]) -> bytes | None:
    """Bars of the shares of right answers, with intervals, by group; a panel for each metric of each file. Kinds of
    question are too many for it, and stand in the tables alone."""
    panels = [
        (f"{name}: {metric}", [row for row in some if row.metric.name == metric and not row.group.startswith(KIND)])
        for name, some in rows.items()
        for metric in dict.fromkeys(row.metric.name for row in some if row.metric.share and not row.metric.cost)
        if metric != "acc_norm"
    ]
    if not panels:
        return None
    names, short, plt = [model["name"] for model in report["models"]], _short(report), _pyplot()
    columns = min(2, len(panels))
    heights = [max(len(some) for _, some in panels[i : i + 2]) + 3 for i in range(0, len(panels), columns)]
    figure, axes = plt.subplots(
        len(heights),
        columns,
        figsize=(6.5 * columns, 0.1 * (len(names) + 1) * sum(heights) + 0.5),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for place, (axis, (title, some)) in enumerate(zip(axes.flat, panels, strict=False)):
        for number, name in enumerate(names):
            _bars(axis, number, len(names), [row.values[name] for row in some], short[name])
        axis.set_yticks(range(len(some)), [f"{row.group} ({row.count:,})" for row in some], fontsize=7)
        axis.set(
            xlim=(0, 1), xlabel="share of the rows, with 95 % intervals", ylim=(heights[place // columns] - 3.4, -0.6)
        )
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3, axis="x")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncol=len(names), frameon=False)
    return _png(figure)


def draw_likelihood(report: dict[str, Any], rows: dict[str, list[Row]]) -> bytes | None:
    """Nats per token and bits per byte of documents and replies, by language."""
    chosen = {
        metric: [(name, row) for name, some in rows.items() for row in some if row.metric.name == metric]
        for metric in ("nats per token", "bits per byte")
    }
    if not chosen["nats per token"]:
        return None
    plt, models, short = _pyplot(), report["models"], _short(report)
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 1.2 + 0.25 * (len(models) + 1) * len(chosen["nats per token"])), layout="constrained"
    )
    for axis, (metric, some) in zip(axes, chosen.items(), strict=True):
        for number, model in enumerate(models):
            bound = ", upper bound" if is_bound(model) else ""
            values = [row.values[model["name"]] for _, row in some]
            _bars(axis, number, len(models), values, short[model["name"]] + bound)
        labels = [f"{name}\n{row.group} ({row.count:,})" for name, row in some] if axis is axes[0] else [""] * len(some)
        axis.set_yticks(range(len(some)), labels, fontsize=8)
        axis.set(xlabel=f"{metric}, with 95 % intervals; less is better")
        axis.invert_yaxis()
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3, axis="x")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncol=len(models), frameon=False)
    return _png(figure)


def draw_frontier(report: dict[str, Any], found: tuple[Metric, list[Point]] | None) -> bytes | None:
    """Quality against forward passes and against seconds per answer, one line for each policy of each model."""
    if found is None:
        return None
    metric, points = found
    plt, short = _pyplot(), _short(report)
    from matplotlib import ticker

    figure, axes = plt.subplots(1, 2, figsize=(12, 5.5), sharey=True, layout="constrained")
    lines = dict.fromkeys((point.model, point.policy) for point in points)
    alone = len({model for model, policy in lines if policy != AR}) == 1
    colours = iter(COLOURS[1:] * 9)
    for number, (model, policy) in enumerate(lines):
        some = [point for point in points if (point.model, point.policy) == (model, policy)]
        style = (
            {"color": COLOURS[0], "marker": "*", "markersize": 13, "linestyle": "none"}
            if policy == AR
            else {"color": next(colours), "marker": MARKERS[number % len(MARKERS)], "markersize": 5, "linewidth": 1}
        )
        label = f"{short[model]}, key/value cache" if policy == AR else policy if alone else f"{short[model]}, {policy}"
        for axis, cost in zip(axes, ("passes", "seconds"), strict=True):
            costs = [getattr(point, cost).value for point in some]
            quality = [point.quality for point in some]
            reach = _reach(quality)
            axis.errorbar(
                costs, [q.value for q in quality], yerr=reach, elinewidth=0.5, capsize=1.5, label=label, **style
            )
    for axis, label in zip(axes, ("forward passes per answer", "seconds per answer"), strict=True):
        axis.set(xscale="log", xlabel=label)
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.grid(alpha=0.3, which="both")
    frontier = report["frontier"]
    models = " and ".join(dict.fromkeys(short[point.model] for point in points))
    figure.suptitle(
        f"{models}: {frontier['items']:,} rows of {frontier['source']}, {frontier['batch_size']} at a time",
        fontsize=10,
    )
    axes[0].set_ylabel(f"{metric.name}, with 95 % intervals")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=3, fontsize=8, frameon=False)
    return _png(figure)


def _short(report: dict[str, Any]) -> dict[str, str]:
    """What a model is called in a picture: its kind, where it is the only one of it."""
    kinds = [model["kind"] for model in report["models"]]
    return {m["name"]: m["kind"] if kinds.count(m["kind"]) == 1 else m["name"] for m in report["models"]}


def _bars(axis: Any, number: int, of: int, values: list[Estimate], label: str) -> None:
    """The bars of model `number` out of `of`, one in each row of the axis, with their intervals."""
    width = 0.8 / of
    axis.barh(
        [row + (number - (of - 1) / 2) * width for row in range(len(values))],
        [value.value for value in values],
        height=width,
        xerr=_reach(values),
        color=COLOURS[number % len(COLOURS)],
        error_kw={"elinewidth": 0.8, "capsize": 1.5},
        label=label,
    )


def _reach(values: list[Estimate]) -> list[list[float]]:
    """Lengths of the error bars below and above."""
    low = [v.value - v.low if v.low is not None else Z * (v.error or 0) for v in values]
    high = [v.high - v.value if v.high is not None else Z * (v.error or 0) for v in values]
    return [[max(length, 0) for length in low], [max(length, 0) for length in high]]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _png(figure: Any) -> bytes:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()
