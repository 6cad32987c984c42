"""One figure per experiment, from its JSON alone; the same JSON gives the same bytes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from scripts.engine.files import write_bytes
from scripts.engine.report.figures import STAR, cost_axis, draw_points, png
from scripts.engine.report.results import AR, Estimate

Result = dict[str, Any]  # the JSON of an experiment
Record = dict[str, Any]  # one of its runs, or a line of its summary

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")
NAMES = {"ar": "AR (exact)", "diffusion": "diffusion (upper bound)"}
BOUND = "held-out documents\n(nats per token, upper bound)"
OVER_SEEDS = "Dots: seeds. Bars: mean and 95 % t interval over the seeds."


def draw(result: Result, path: Path) -> None:
    """Write the figure of an experiment's result. Raise ValueError if the experiment is unknown."""
    name = result.get("experiment")
    if name not in FIGURES:
        raise ValueError(f"{path.with_suffix('.json')} is not the result of one of {', '.join(FIGURES)}")
    with rc_context({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}):
        write_bytes(path, png(FIGURES[name](result), dpi=150))


# -- what a figure shows -----------------------------------------------------------------------------------------------


def matches(record: Record, fields: Record) -> bool:
    return all(record[name] == value for name, value in fields.items())


def levels(result: Result, name: str) -> list[Any]:
    """The values of a field of the runs, in order."""
    return list(dict.fromkeys(run[name] for run in result["runs"]))


def single_runs(result: Result, value: str, **fields: Any) -> list[float]:
    return [run[value] for run in result["runs"] if matches(run, fields)]


def mean_of(result: Result, value: str, minus: bool = False, **fields: Any) -> Estimate:
    """The mean over the seeds in the one cell with these fields; minus: of the difference from the first level."""
    cell = {"value": value, **fields}
    (row,) = (row for row in result["summary"] if ("minus" in row) == minus and matches(row, cell))
    return estimate_of(row)


def cell_of(result: Result, value: str, **fields: Any) -> tuple[Estimate, list[float]]:
    return mean_of(result, value, **fields), single_runs(result, value, **fields)


def estimate_of(row: Record) -> Estimate:
    return Estimate(row["mean"], None, row["low"], row["high"])


# -- pieces ------------------------------------------------------------------------------------------------------------


def panels(rows: int, columns: int, size: tuple[float, float], title: str, caption: str) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.suptitle(title, fontsize=12)
    figure.supxlabel(caption, fontsize=9)
    return figure, list(axes.flat)


def draw_mean(axis: Axes, x: float, mean: Estimate, runs: Sequence[float], **style: Any) -> None:
    """A mean with its interval, and the single runs on it."""
    draw_points(axis, [x], [mean], fmt="_", markersize=14, capsize=5, linewidth=1.8, **style)
    axis.plot([x] * len(runs), runs, "o", color=style["color"], alpha=0.45, markersize=4)


def draw_curve(
    axis: Axes, places: Sequence[float], cells: Sequence[tuple[Estimate, list[float]]], **style: Any
) -> None:
    """A line through means over x; cells: each mean and its single runs."""
    axis.plot(places, [mean.value for mean, _ in cells], **style)
    for x, (mean, runs) in zip(places, cells, strict=True):
        draw_mean(axis, x, mean, runs, color=style["color"])


def log_ticks(axis: Axes, ticks: Sequence[float], labels: Sequence[str]) -> None:
    """A logarithmic x axis with these ticks alone."""
    axis.set_xscale("log")
    axis.set_xticks(ticks, labels)
    axis.set_xticks([], minor=True)


def name_categories(axis: Axes, names: Sequence[str], **style: Any) -> None:
    axis.set(xticks=range(len(names)), xlim=(-0.6, len(names) - 0.4))
    axis.set_xticklabels(names, **style)


def trainings(result: Result) -> str:
    count = len(result["reports"])
    return f"{count} training{'s' if count > 1 else ''}"


# -- figures -----------------------------------------------------------------------------------------------------------


def schedules(result: Result) -> Figure:
    ways = levels(result, "schedule")
    caption = (
        f"{OVER_SEEDS} All from one AR start per seed; differences seed by seed.\n"
        "Texts: drawn from a fully masked row, one token per step at a random place, temperature 1."
    )
    figure, axes = panels(2, 2, (9, 7.2), "Mask schedules in training", caption)
    bound, gap, judged, distinct = axes
    for axis, value, label in (
        (bound, "nats_per_token", BOUND),
        (judged, "judge_nats", "generated texts under an AR judge\n(nats per token)"),
        (distinct, "distinct_2", "distinct-2 of generated texts\n(share of token pairs)"),
    ):
        for x, way in enumerate(ways):
            draw_mean(axis, x, *cell_of(result, value, schedule=way), color=COLOURS[x])
        axis.set_ylabel(label)
    first, *others = (single_runs(result, "nats_per_token", schedule=way) for way in ways)
    for x, runs in enumerate(others, start=1):
        mean = mean_of(result, "nats_per_token", minus=True, schedule=ways[x])
        differences = [run - base for run, base in zip(runs, first, strict=True)]
        draw_mean(gap, x, mean, differences, color=COLOURS[x])
    gap.set_ylabel(f"minus that of {ways[0]}\n(nats per token)")
    gap.axhline(0.0, color="black", linestyle="--", linewidth=1)
    for axis, value in ((judged, "judge_nats"), (distinct, "distinct_2")):
        line = result["real_text"][value]
        axis.axhline(line, color="black", linestyle="--", linewidth=1)
        axis.annotate("held-out text", (0.02, line), xycoords=("axes fraction", "data"), va="bottom", fontsize=9)
    for axis in axes:
        name_categories(axis, ways, fontsize=10)
    return figure


def initialisation(result: Result) -> Figure:
    caption = f"{OVER_SEEDS}\nEvery training has its own learning-rate schedule."
    figure, (axis,) = panels(1, 1, (7, 4.8), "AR-initialised and from-scratch diffusion at equal total tokens", caption)
    budgets = levels(result, "budget")
    for number, share in enumerate(levels(result, "ar_share")):
        cells = [{"ar_share": share, "budget": budget} for budget in budgets]
        aside = 1 + 0.012 * number  # so that error bars stand beside each other
        draw_curve(
            axis,
            [aside * single_runs(result, "tokens", **cell)[0] for cell in cells],
            [cell_of(result, "nats_per_token", **cell) for cell in cells],
            color=COLOURS[number],
            label=f"{share:.0%} AR, then {1 - share:.0%} diffusion" if share else "diffusion from scratch",
            linewidth=1,
        )
    ticks = [single_runs(result, "tokens", budget=budget)[0] for budget in budgets]
    log_ticks(axis, ticks, [f"{tick / 1e6:.3g}" for tick in ticks])
    axis.set(xlabel="total training tokens (millions)", ylabel=BOUND)
    axis.legend(frameon=False)
    return figure


def repetition(result: Result) -> Figure:
    tokens = min(run["tokens"] for run in result["runs"]) / min(levels(result, "repetitions"))
    caption = (
        f"{OVER_SEEDS}\nThe corpus has {tokens:,.0f} tokens; every run has its own learning-rate schedule. "
        "Best: at the least loss\non other held-out documents."
    )
    figure, (axis,) = panels(1, 1, (7, 5), "A small corpus, seen again and again", caption)
    counts = levels(result, "repetitions")
    for number, kind in enumerate(levels(result, "kind")):
        for weights, linestyle, aside in (("final", "-", 1.0), ("best", "--", 1.05)):
            cells = [{"kind": kind, "weights": weights, "repetitions": count} for count in counts]
            draw_curve(
                axis,
                [aside * count for count in counts],
                [cell_of(result, "nats_per_token", **cell) for cell in cells],
                color=COLOURS[number],
                label=f"{NAMES[kind]}, {weights} weights",
                linestyle=linestyle,
                linewidth=1.2,
            )
    log_ticks(axis, counts, [f"{count}" for count in counts])
    axis.set(xlabel="times the corpus is seen", ylabel="held-out documents\n(nats per token)")
    axis.legend(frameon=False, fontsize=10)
    return figure


def reversal(result: Result) -> Figure:
    caption = (
        f"Of {trainings(result)} of each kind. Bars: 95 % interval over facts "
        "(bootstrap; all answers of all trainings on a fact together).\n"
        "Seen: the country's capital was told. Reversed: only the country of that city was."
    )
    figure, axes = panels(1, 2, (9, 4.6), "Capital of a country, told in that direction or in the other", caption)
    splits, kinds = levels(result, "split"), levels(result, "kind")
    for axis, value in zip(axes, dict.fromkeys(row["value"] for row in result["summary"]), strict=True):
        for x, split in enumerate(splits):
            for number, kind in enumerate(kinds):
                cell = {"value": value, "split": split, "kind": kind}
                runs = [run["right"] / run["asked"] for run in result["runs"] if matches(run, cell)]
                style = {"color": COLOURS[number], "label": kind if x == 0 else None}
                draw_mean(axis, x + 0.3 * number - 0.15, mean_of(result, **cell), runs, **style)
        if value == "multiple choice":
            axis.axhline(0.25, color="black", linestyle="--", linewidth=1, label="chance")
        axis.set(ylim=(-0.03, 1.03), ylabel=f"{value}\n(share of right answers)")
        name_categories(axis, splits)
        axis.legend(frameon=False, fontsize=10)
    return figure


def frontier(result: Result) -> Figure:
    caption = (
        f"Means of {trainings(result)}. Bars: 95 % interval over questions (bootstrap). AR decodes with a KV cache; "
        "a line's points are one policy's settings."
    )
    figure, axes = panels(1, 2, (10, 5.4), "Quality against the cost of decoding", caption)
    policies = list(dict.fromkeys((row["kind"], row["policy"]) for row in result["summary"]))
    costs = {"passes": "forward passes per answer", "seconds": "seconds per answer"}
    for axis, (cost, label) in zip(axes, costs.items(), strict=True):
        for number, (kind, policy) in enumerate(policies):
            rows = [row for row in result["summary"] if matches(row, {"kind": kind, "policy": policy})]
            rows.sort(key=lambda row: row[cost])
            style = STAR if kind == AR else {"marker": "o", "linestyle": "-", "markersize": 5}
            style = {**style, "color": COLOURS[number % len(COLOURS)], "label": policy, "linewidth": 1.2}
            quality = [estimate_of(row) for row in rows]
            draw_points(axis, [row[cost] for row in rows], quality, capsize=2, elinewidth=0.7, **style)
        cost_axis(axis, label)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_ylabel("share of right answers")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return figure


FIGURES: dict[str, Callable[[Result], Figure]] = {
    "schedules": schedules,
    "initialisation": initialisation,
    "repetition": repetition,
    "reversal": reversal,
    "frontier": frontier,
}
