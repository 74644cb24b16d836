"""A chart of strategies: step time and cost as figures of a cluster change, with the points where another one leads."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sheaf.units import pretty_number, pretty_seconds

_STRATEGIES = 7  # lines: the others are never near the best
_FEW_TICKS = 8.0  # times from the lowest to the highest: below, an axis marked 1, 2, 5 may have one mark only
_IN_WHOLE = 100.0  # GB/s: from here three digits are whole, and may be written with an exponent

Line = Sequence[float | None]


def crossings(x: Sequence[float], lines: Mapping[str, Line]) -> list[tuple[float, float, str, str]]:
    """Where another line becomes the lowest: (x, y, the one before, the one after), straight in logarithms.

    >>> crossings([1.0, 4.0], {"a": [1.0, 4.0], "b": [2.0, 2.0]})
    [(2.0, 2.0, 'a', 'b')]
    """
    found: list[tuple[float, float, str, str]] = []
    for place in range(len(x) - 1):
        here, there = _lowest(lines, place), _lowest(lines, place + 1)
        if not here or not there or here == there:
            continue
        low, high = lines[here], lines[there]
        ends = (low[place], low[place + 1], high[place], high[place + 1])
        if any(one is None for one in ends):
            continue
        first, last, other_first, other_last = (math.log(one) for one in ends if one is not None)
        gap, closing = other_first - first, (other_first - first) - (other_last - last)
        share = gap / closing if closing else 0.0
        where = math.exp(math.log(x[place]) + share * math.log(x[place + 1] / x[place]))
        found.append((round(where, 9), round(math.exp(first + share * (last - first)), 9), here, there))
    return found


def draw_chart(sweeps: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw sweeps as PNG: a column for each, step seconds above and, where the devices have a price, cost below.

    A sweep holds ``figure``, ``at``, ``x``, ``currency`` and ``lines`` (by strategy, ``seconds`` and ``cost`` per step,
    None where nothing fits). Dots mark where another strategy becomes the best.
    """
    priced = any(cost for sweep in sweeps for line in sweep["lines"].values() for cost in line["cost"] if cost)
    rows = [("seconds", "seconds per step"), *([("cost", f"{sweeps[0]['currency']} per step")] if priced else [])]
    figure = Figure(figsize=(6.2 * len(sweeps), 4.4 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(sweeps), squeeze=False)
    kept = _kept(sweeps)
    for row, (key, label) in enumerate(rows):
        for column, sweep in enumerate(sweeps):
            _draw(axes[row][column], sweep, key, kept)
            axes[row][column].set_ylabel(label if column == 0 else "")
    handles, labels = axes[0][0].get_legend_handles_labels()
    known = dict(zip(labels, handles, strict=True))
    for ax in axes.flat:
        known |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw(ax: Axes, sweep: Mapping[str, Any], key: str, kept: Sequence[str]) -> None:
    x = [value / 1e9 if "GB/s" in sweep["figure"] else value for value in sweep["x"]]
    at = sweep["at"] / 1e9 if "GB/s" in sweep["figure"] else sweep["at"]
    lines = {name: line[key] for name, line in sweep["lines"].items()}
    for number, name in enumerate(kept):
        if name in lines:
            values = [math.nan if value is None else value for value in lines[name]]
            ax.plot(x, values, marker=".", color=f"C{number}", label=name)
    if len(x) > 1:
        for where, height, _, after in crossings(x, lines):
            color = f"C{kept.index(after)}" if after in kept else "black"
            ax.plot([where], [height], marker="o", markersize=9, markerfacecolor="none", color=color)
            named = pretty_number(where) if where >= _IN_WHOLE else f"{where:.3g}"
            named = named if "GB/s" in sweep["figure"] else f"{math.ceil(where)}"
            ax.annotate(named, (where, height), textcoords="offset points", xytext=(6, 6), fontsize=8)
    ax.axvline(at, color="0.8", zorder=0)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if "GB/s" not in sweep["figure"]:
        ax.set_xticks(x)
        ax.xaxis.set_minor_formatter(NullFormatter())
    if key == "seconds":
        low, high = ax.get_ylim()
        subs = (1, 2, 5) if high > _FEW_TICKS * low else (1, 1.5, 2, 3, 4, 5, 6, 8)
        ax.yaxis.set_major_locator(LogLocator(subs=subs))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: pretty_seconds(value)))
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(sweep["figure"])
    ax.grid(visible=True, alpha=0.2)


def _kept(sweeps: Sequence[Mapping[str, Any]]) -> list[str]:
    """The strategies that come nearest to the best anywhere."""
    near: dict[str, float] = {}
    for sweep in sweeps:
        for place in range(len(sweep["x"])):
            seconds = {name: line["seconds"][place] for name, line in sweep["lines"].items()}
            there = {name: value for name, value in seconds.items() if value is not None}
            for name, value in there.items():
                near[name] = min(near.get(name, math.inf), value / min(there.values()))
    return sorted(near, key=lambda name: (near[name], name))[:_STRATEGIES]


def _lowest(lines: Mapping[str, Line], place: int) -> str:
    there = {name: value for name, line in lines.items() if (value := line[place]) is not None}
    return min(there, key=lambda name: there[name], default="")
