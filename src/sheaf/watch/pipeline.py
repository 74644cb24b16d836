"""One picture of a pipeline's step: what was predicted above what was measured, a lane per worker, bubbles as gaps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from sheaf.errors import RunError
from sheaf.units import pretty_seconds

Row = tuple[int, str, int, int, float, float]  # worker, kind, microbatch, stage, start and stop seconds

_DPI = 130
_WIDTH_INCHES, _LANE_INCHES, _TALLEST_INCHES = 12.0, 0.4, 14.0
_INK, _FAINT, _BUBBLE, _EDGE = "#22303c", "#9aa7b1", "#e3e8ec", "#ffffff"
# Of Okabe and Ito's colours, which colour-blind readers tell apart; these also differ in grey.
_COLOURS = {"F": "#56b4e9", "B": "#e69f00", "W": "#009e73"}
_OTHER = "#cc79a7"
_LANE_FULL = 0.8  # of a lane's height; the rest parts it from the next
_NUMBER_POINTS = 8.0


class _Panel(NamedTuple):
    """One timeline, begun at 0 seconds."""

    name: str
    rows: list[Row]
    seconds: float
    bubble: float  # share of the workers' time in which they were idle


def draw_pipeline(
    path: str | Path, *, predicted: Sequence[Row] | None, measured: Sequence[Row] | None, title: str
) -> Path:
    """Draw one step's actions, as ``.svg`` or ``.png`` by the path's suffix, and return the path.

    A row is (worker, kind, microbatch, stage, start_seconds, stop_seconds), kind ``F`` (forward), ``B`` (backward) or
    ``W`` (backward of weights); each timeline is taken to begin when its first action starts. A timeline that is None
    is left out, both share one scale of time. Where a worker has several stages, the later are paler.
    Raises RunError for another suffix, or when both are None.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".png"):
        raise RunError(f"{path.name} is no picture that can be drawn here: name it .svg or .png")
    given = [(name, rows) for name, rows in (("Predicted", predicted), ("Measured", measured)) if rows is not None]
    if not given:
        raise RunError("nothing was predicted and nothing was measured, so there is nothing to draw")
    workers = 1 + max((row[0] for _, rows in given for row in rows), default=-1)
    panels = [_panel(name, rows, workers) for name, rows in given]
    lanes_inches = min(_LANE_INCHES * max(workers, 2), _TALLEST_INCHES / len(panels))
    figure = Figure(figsize=(_WIDTH_INCHES, 1.1 + len(panels) * (lanes_inches + 0.6)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    seconds = max(panel.seconds for panel in panels)
    every = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    turns = _turns([row for panel in panels for row in panel.rows])
    for axes, panel in zip(every, panels, strict=True):
        _dress(axes, panel, workers)
        axes.set_title(_told(panel, panels[-1]), loc="right", fontsize=9.5, color=_INK)
        axes.set_xlim(0, seconds * 1.005 or 1)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=_INK)
    _explain(figure, {row[1] for panel in panels for row in panel.rows}, turns)
    figure.get_layout_engine().execute(figure)  # pyright: ignore[reportOptionalMemberAccess]
    for axes, panel in zip(every, panels, strict=True):
        _boxes(axes, panel, workers, turns)
    unfinished = path.with_name(f".{path.name}")
    with mpl.rc_context({"svg.hashsalt": "sheaf"}):  # the same rows give the same file
        figure.savefig(unfinished, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None)
    unfinished.replace(path)
    return path


def _panel(name: str, rows: Sequence[Row], workers: int) -> _Panel:
    begin = min((row[4] for row in rows), default=0.0)
    moved = [(*row[:4], row[4] - begin, row[5] - begin) for row in rows]
    seconds = max((row[5] for row in moved), default=0.0)
    busy = sum(row[5] - row[4] for row in moved)
    return _Panel(name, moved, seconds, max(0.0, 1 - busy / (workers * seconds)) if seconds > 0 else 0.0)


def _turns(rows: Sequence[Row]) -> dict[int, int]:
    """Stage -> which of its worker's stages it is, counted from 0."""
    stages: dict[int, set[int]] = {}
    for row in rows:
        stages.setdefault(row[0], set()).add(row[3])
    return {stage: turn for own in stages.values() for turn, stage in enumerate(sorted(own))}


def _colour(kind: str, turn: int, turns: int) -> tuple[float, float, float]:
    red, green, blue = to_rgb(_COLOURS.get(kind, _OTHER))
    pale = 0.6 * turn / max(1, turns - 1)
    return red + (1 - red) * pale, green + (1 - green) * pale, blue + (1 - blue) * pale


def _boxes(axes: Axes, panel: _Panel, workers: int, turns: dict[int, int]) -> None:
    """The lanes, a box per action, and the number of its microbatch where there is room."""
    if not panel.rows or panel.seconds <= 0:
        axes.annotate(
            "no action was timed", (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", color=_FAINT
        )
        return
    frame, half = axes.get_window_extent(), _LANE_FULL / 2
    points = 72 / axes.figure.dpi
    wide = frame.width * points / (axes.get_xlim()[1] - axes.get_xlim()[0])  # of a second
    high = frame.height * points / workers * _LANE_FULL
    for worker in range(workers):
        lane = axes.barh(worker, panel.seconds, _LANE_FULL, color=_BUBBLE, zorder=1)[0]
        lane.set_gid(f"{panel.name.lower()}-lane-{worker}")
    alike: dict[tuple[str, int], list[Row]] = {}
    for row in panel.rows:
        alike.setdefault((row[1], turns[row[3]]), []).append(row)
    most = 1 + max(turns.values())
    narrowest = min(row[5] - row[4] for row in panel.rows) * wide
    for (kind, turn), rows in alike.items():
        corners = [
            [(start, worker - half), (stop, worker - half), (stop, worker + half), (start, worker + half)]
            for worker, _, _, _, start, stop in rows
        ]
        edge = min(0.8, narrowest / 6)
        axes.add_collection(
            PolyCollection(corners, facecolors=[_colour(kind, turn, most)], edgecolors=_EDGE, linewidths=edge, zorder=2)
        )
    for worker, _, microbatch, _, start, stop in panel.rows:
        if high >= _NUMBER_POINTS + 1 and (stop - start) * wide >= 0.66 * _NUMBER_POINTS * len(str(microbatch)) + 2:
            axes.text(
                (start + stop) / 2, worker, str(microbatch), ha="center", va="center_baseline", color=_INK,
                fontsize=_NUMBER_POINTS, zorder=3,
            )  # fmt: skip


def _told(panel: _Panel, other: _Panel) -> str:
    """How long a timeline took, against the other's where that is another, and the share of its bubbles."""
    if panel.seconds <= 0:
        return ""
    told = pretty_seconds(panel.seconds)
    if panel is not other and other.seconds > 0:
        off = panel.seconds / other.seconds - 1
        told += f" ({abs(off):.0%} {'above' if off >= 0 else 'below'} {other.name.lower()})"
    return f"{told}, bubbles {panel.bubble:.1%} of the workers' time"


def _dress(axes: Axes, panel: _Panel, workers: int) -> None:
    axes.set_title(panel.name, loc="left", fontsize=11, fontweight="bold", color=_INK)
    every = max(1, -(-workers // 32))
    axes.set_yticks(range(0, workers, every), [f"worker {worker}" for worker in range(0, workers, every)])
    axes.set_ylim(max(workers, 1) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(lambda seconds, _: pretty_seconds(seconds) if seconds > 0 else "0")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.tick_params(axis="y", length=0)


def _explain(figure: Figure, kinds: set[str], turns: dict[int, int]) -> None:
    names = {"F": "forward", "B": "backward of inputs" if "W" in kinds else "backward", "W": "backward of weights"}
    most = 1 + max(turns.values(), default=0)
    handles = [
        (tuple(Patch(color=_colour(kind, turn, most)) for turn in range(most)), names.get(kind, kind))
        for kind in sorted(kinds, key=lambda kind: ("FBW".find(kind) % 4, kind))
    ]
    handles.append(((Patch(color=_BUBBLE),), "bubble"))
    swatches: list[Any] = [patches for patches, _ in handles]  # tuples, which the handler below takes
    legend = figure.legend(
        swatches, [name for _, name in handles], loc="outside upper right", ncols=len(handles),
        frameon=False, fontsize=9, labelcolor=_INK, handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
    )  # fmt: skip
    if most > 1:
        legend.set_title("paler: a worker's later stages", prop=FontProperties(size=8.5))
        legend.get_title().set_color(_INK)
