"""One picture of several runs of one task: loss by steps, and loss by seconds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sheaf.watch.picture import dress, trailing_mean

_DPI = 130
_INK = "#22303c"


@dataclass(frozen=True)
class Curve:
    """One run: a loss for each step, and the seconds since its start at which the step was done.

    ``broken``: an error ended it early; its losses may be of any size.
    """

    name: str
    losses: Sequence[float]
    seconds: Sequence[float]
    exact: bool
    broken: bool = False


def draw_comparison(path: Path, curves: Sequence[Curve], *, title: str) -> Path:
    """Draw the curves into a PNG and return its path. Exact plans have solid lines, relaxed ones dashed.

    The scale is that of the runs that came to their end.
    """
    figure = Figure(figsize=(12, 5.2), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    by_steps, by_seconds = figure.subplots(1, 2, sharey=True)
    dress(by_steps, "Loss by steps", "loss (mean over the batch)")
    dress(by_seconds, "Loss by seconds", "")
    by_steps.set_xlabel("step", color=_INK, fontsize=9.5)
    by_seconds.set_xlabel("seconds of training", color=_INK, fontsize=9.5)
    colours = colormaps["tab10"].colors  # pyright: ignore[reportAttributeAccessIssue]
    limits = by_steps.get_ylim()
    for place, curve in sorted(enumerate(curves), key=lambda one: one[1].broken):
        colour = colours[place % len(colours)]
        _line(by_steps, np.arange(1, len(curve.losses) + 1), curve, colour)
        _line(by_seconds, np.array(curve.seconds), curve, colour)
        limits = limits if curve.broken else by_steps.get_ylim()
    by_steps.set_ylim(limits)
    by_steps.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_steps.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="upper right")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=_INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, format="png")
    unfinished.replace(path)
    return path


def _line(axes: Axes, places: np.ndarray, curve: Curve, colour: tuple[float, float, float]) -> None:
    losses = np.array(curve.losses, dtype=float)
    span = max(1, len(losses) // 20)
    if span > 1:
        axes.plot(places, losses, color=colour, lw=0.7, alpha=0.25)
    style = "-" if curve.exact else (0, (5, 1.5))
    label = curve.name if curve.exact else f"{curve.name} (relaxed)"
    label += f", broke off after {len(losses)} steps" if curve.broken else ""
    axes.plot(places, trailing_mean(losses, span), color=colour, lw=1.8, ls=style, label=label)
