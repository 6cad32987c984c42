"""One figure per experiment, from its JSON alone; the same JSON gives the same bytes."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from scripts.engine.files import write_bytes

Record = dict[str, Any]
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")
NAMES = {"ar": "AR (exact)", "diffusion": "diffusion (upper bound)"}
BOUND = "held-out documents\n(nats per token, upper bound)"
OVER_SEEDS = "Dots: seeds. Bars: mean and 95 % t interval over the seeds."


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the figure of an experiment's result. ValueError: the result is of no experiment known here."""
    name = result.get("experiment")
    if name not in FIGURES:
        raise ValueError(f"{path.with_suffix('.json')} is not the result of one of {', '.join(FIGURES)}")
    drawn = io.BytesIO()
    with plt.rc_context({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}):
        figure = FIGURES[name](result)
        figure.savefig(drawn, format="png", dpi=150, metadata={"Software": None})
        plt.close(figure)
    write_bytes(path, drawn.getvalue())


def panels(rows: int, columns: int, size: tuple[float, float], title: str, caption: str) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    figure.suptitle(title, fontsize=12)
    figure.supxlabel(caption, fontsize=9)
    return figure, list(axes.flat)


def cell(result: dict[str, Any], value: str, minus: bool = False, **fields: Any) -> Record:
    """The one line of the summary with these fields."""
    wanted = {"value": value, **fields}
    rows = [row for row in result["summary"] if ("minus" in row) == minus and same(row, **wanted)]
    (row,) = rows
    return row


def bar(axes: Axes, x: float, row: Record, colour: str, seeds: Sequence[float], label: str | None = None) -> None:
    """Mean with interval, and the single runs on it."""
    spread = None if row["low"] is None else [[row["mean"] - row["low"]], [row["high"] - row["mean"]]]
    style = {"fmt": "_", "markersize": 14, "capsize": 5, "color": colour, "linewidth": 1.8, "label": label}
    axes.errorbar([x], [row["mean"]], yerr=spread, **style)
    axes.plot([x] * len(seeds), seeds, "o", color=colour, alpha=0.45, markersize=4)


def levels(result: dict[str, Any], name: str) -> list[Any]:
    return list(dict.fromkeys(run[name] for run in result["runs"]))


def values_of(result: dict[str, Any], value: str, **fields: Any) -> list[float]:
    return [run[value] for run in result["runs"] if same(run, **fields)]


def schedules(result: dict[str, Any]) -> Figure:
    ways = levels(result, "schedule")
    caption = (
        f"{OVER_SEEDS} All from one AR start per seed; differences seed by seed.\n"
        "Texts: drawn from a fully masked row, one token per step at a random place, temperature 1."
    )
    figure, axes = panels(2, 2, (9, 7.2), "Mask schedules in training", caption)
    shown = (
        ("nats_per_token", BOUND, None),
        ("nats_per_token", f"minus that of {ways[0]}\n(nats per token)", 0.0),
        ("judge_nats", "generated texts under an AR judge\n(nats per token)", result["real_text"]["judge_nats"]),
        ("distinct_2", "distinct-2 of generated texts\n(share of token pairs)", result["real_text"]["distinct_2"]),
    )
    for place, (ax, (value, label, line)) in enumerate(zip(axes, shown, strict=True)):
        for x, way in enumerate(ways):
            if place != 1:
                bar(ax, x, cell(result, value, schedule=way), COLOURS[x], values_of(result, value, schedule=way))
            elif x:
                pairs = zip(
                    values_of(result, value, schedule=way), values_of(result, value, schedule=ways[0]), strict=True
                )
                bar(ax, x, cell(result, value, True, schedule=way), COLOURS[x], [a - b for a, b in pairs])
        if line is not None:
            ax.axhline(line, color="black", linestyle="--", linewidth=1)
            if line:
                ax.annotate("held-out text", (0.02, line), xycoords=("axes fraction", "data"), va="bottom", fontsize=9)
        ax.set(xticks=range(len(ways)), xlim=(-0.6, len(ways) - 0.4), ylabel=label)
        ax.set_xticklabels(ways, fontsize=10)
    return figure


def initialisation(result: dict[str, Any]) -> Figure:
    caption = f"{OVER_SEEDS}\nEvery training has its own learning-rate schedule."
    figure, (ax,) = panels(1, 1, (7, 4.8), "AR-initialised and from-scratch diffusion at equal total tokens", caption)
    budgets = levels(result, "budget")
    for number, share in enumerate(levels(result, "ar_share")):
        aside = 1 + 0.012 * number  # bars beside each other
        seen = [aside * values_of(result, "tokens", ar_share=share, budget=budget)[0] for budget in budgets]
        rows = [cell(result, "nats_per_token", ar_share=share, budget=budget) for budget in budgets]
        label = f"{share:.0%} AR, then {1 - share:.0%} diffusion" if share else "diffusion from scratch"
        ax.plot(seen, [row["mean"] for row in rows], color=COLOURS[number], label=label, linewidth=1)
        for x, row, budget in zip(seen, rows, budgets, strict=True):
            runs = values_of(result, "nats_per_token", ar_share=share, budget=budget)
            bar(ax, x, row, COLOURS[number], runs)
    log_ticks(ax, [values_of(result, "tokens", budget=b)[0] / 1e6 for b in budgets], 1e6, "{:.3g}")
    ax.set(xlabel="total training tokens (millions)", ylabel=BOUND)
    ax.legend(frameon=False)
    return figure


def log_ticks(ax: Axes, values: Sequence[float], unit: float, form: str) -> None:
    """A logarithmic x axis with ticks at these values, in units, alone."""
    ax.set_xscale("log")
    ax.set_xticks([value * unit for value in values], [form.format(value) for value in values])
    ax.set_xticks([], minor=True)


def repetition(result: dict[str, Any]) -> Figure:
    tokens = min(run["tokens"] for run in result["runs"]) / min(levels(result, "repetitions"))
    caption = (
        f"{OVER_SEEDS}\nThe corpus has {tokens:,.0f} tokens; every run has its own learning-rate schedule. "
        "Best: at the least loss\non other held-out documents."
    )
    figure, (ax,) = panels(1, 1, (7, 5), "A small corpus, seen again and again", caption)
    counts = levels(result, "repetitions")
    for number, kind in enumerate(levels(result, "kind")):
        for weights, style, aside in (("final", "-", 1.0), ("best", "--", 1.05)):
            rows = [cell(result, "nats_per_token", kind=kind, weights=weights, repetitions=c) for c in counts]
            label = f"{NAMES[kind]}, {weights} weights"
            places = [aside * count for count in counts]
            ax.plot(places, [row["mean"] for row in rows], style, color=COLOURS[number], label=label, linewidth=1.2)
            for x, count, row in zip(places, counts, rows, strict=True):
                runs = values_of(result, "nats_per_token", kind=kind, weights=weights, repetitions=count)
                bar(ax, x, row, COLOURS[number], runs)
    log_ticks(ax, counts, 1, "{}")
    ax.set(xlabel="times the corpus is seen", ylabel="held-out documents\n(nats per token)")
    ax.legend(frameon=False, fontsize=10)
    return figure


def reversal(result: dict[str, Any]) -> Figure:
    reports = len(result["reports"])
    caption = (
        f"Of {reports} training{'s' if reports > 1 else ''} of each kind. Bars: 95 % interval over facts "
        "(bootstrap; all answers of all trainings on a fact together).\n"
        "Seen: the country's capital was told. Reversed: only the country of that city was."
    )
    figure, axes = panels(1, 2, (9, 4.6), "Capital of a country, told in that direction or in the other", caption)
    values = list(dict.fromkeys(row["value"] for row in result["summary"]))
    for ax, value in zip(axes, values, strict=True):
        splits, kinds = levels(result, "split"), levels(result, "kind")
        for x, split in enumerate(splits):
            for number, kind in enumerate(kinds):
                row = cell(result, value, split=split, kind=kind)
                runs = [r["right"] / r["asked"] for r in result["runs"] if same(r, value=value, split=split, kind=kind)]
                bar(ax, x + 0.3 * number - 0.15, row, COLOURS[number], runs, kind if x == 0 else None)
        if value == "multiple choice":
            ax.axhline(0.25, color="black", linestyle="--", linewidth=1, label="chance")
        ax.set(xticks=range(len(splits)), xlim=(-0.6, len(splits) - 0.4), ylim=(-0.03, 1.03))
        ax.set(ylabel=f"{value}\n(share of right answers)")
        ax.set_xticklabels(splits)
        ax.legend(frameon=False, fontsize=10)
    return figure


def frontier(result: dict[str, Any]) -> Figure:
    reports = len(result["reports"])
    caption = (
        f"Means of {reports} training{'s' if reports > 1 else ''}. Bars: 95 % interval over questions (bootstrap). "
        "AR decodes with a KV cache; "
        "a line's points are one policy's settings."
    )
    figure, axes = panels(1, 2, (10, 5.4), "Quality against the cost of decoding", caption)
    policies = list(dict.fromkeys((row["kind"], row["policy"]) for row in result["summary"]))
    costs = {"passes": "forward passes per answer", "seconds": "seconds per answer"}
    for ax, (cost, label) in zip(axes, costs.items(), strict=True):
        for number, (kind, policy) in enumerate(policies):
            rows = sorted((r for r in result["summary"] if same(r, kind=kind, policy=policy)), key=lambda r: r[cost])
            spread = [[r["mean"] - r["low"] for r in rows], [r["high"] - r["mean"] for r in rows]]
            style = {"color": COLOURS[number % len(COLOURS)], "marker": "*" if kind == "AR" else "o"}
            style |= {"linestyle": "none" if kind == "AR" else "-", "markersize": 13 if kind == "AR" else 5}
            place = [r[cost] for r in rows], [r["mean"] for r in rows]
            ax.errorbar(*place, yerr=spread, capsize=2, linewidth=1.2, elinewidth=0.7, label=policy, **style)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set(xlabel=label, ylabel="share of right answers")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return figure


def same(row: Record, **fields: Any) -> bool:
    return all(row[name] == value for name, value in fields.items())


FIGURES: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "schedules": schedules,
    "initialisation": initialisation,
    "repetition": repetition,
    "reversal": reversal,
    "frontier": frontier,
}
