"""One picture of a run, from what its directory holds: loss, throughput, predicted against measured step time."""

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sheaf.errors import RunError, SheafError
from sheaf.plans import Plan
from sheaf.plans.typical import typical
from sheaf.record import StepReport, read_record, step_reports
from sheaf.units import pretty_bytes, pretty_number, pretty_seconds

PICTURE = "picture.png"
_DPI = 130
_TITLE_WIDTH = 100  # characters that a line of the title has room for
_NOTHING_SECONDS = 1e-7  # what a clock cannot tell from nothing
MEASURED_TERMS = ("compute", "communicate", "wait", "optimizer", "host")
# The planner names each collective; a step measures them together, recomputation within computing, and what comes
# from a pipeline's other stages with the time it is waited for.
_MEASURED_AS = {
    "recompute": "compute",
    "dispatch": "compute",
    "tensor": "communicate",
    "transfer": "wait",
    "bubble": "wait",
    "all_reduce": "communicate",
    "reduce_scatter": "communicate",
    "all_gather": "communicate",
    "server": "communicate",
    "rows": "communicate",
    "all_to_all": "communicate",
    "offload": "optimizer",
}
_INK, _FAINT, _MEASURED, _PREDICTED = "#22303c", "#9aa7b1", "#1f77b4", "#f0a35e"
_SMOOTH_FROM = 100  # steps: fewer are shown as they are


@dataclass
class _Run:
    """What the directory tells: every step once, the steps since the latest start, and the plan's prediction."""

    name: str
    steps: list[StepReport]
    resumed_at: list[int]
    plan: str = ""
    predicted: dict[str, float] = field(default_factory=dict[str, float])
    predicted_sent_bytes: float = 0.0
    timed: list[StepReport] = field(default_factory=list[StepReport])


def draw(run_directory: str | Path) -> Path:
    """Draw ``picture.png`` into a run's directory and return its path.

    Reads ``record.jsonl`` (steps, and the latest ``plan`` event with its predicted seconds by term) and ``plan.toml``.
    Measured times are medians (where only some steps meet or wait: means) over the steps taken since the latest start,
    without the first, which warms up. Raises RunError when there is no record.
    """
    directory = Path(run_directory)
    run = _read(directory)
    figure = Figure(figsize=(12, 6.4), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplot_mosaic(
        [["loss", "terms"], ["throughput", "terms"]], width_ratios=[1.15, 1], height_ratios=[1.5, 1]
    )
    panels["throughput"].sharex(panels["loss"])
    _loss(panels["loss"], run)
    _throughput(panels["throughput"], run)
    _terms(panels["terms"], run)
    figure.suptitle(_title(run), x=0.01, ha="left", fontsize=13, fontweight="bold", color=_INK)
    path, unfinished = directory / PICTURE, directory / f".{PICTURE}"
    figure.savefig(unfinished, format="png")
    unfinished.replace(path)
    return path


def compared(run_directory: str | Path) -> dict[str, dict[str, float]]:
    """Seconds ``predicted`` and ``measured`` of the ``step`` and of each of its terms; empty where either is not known.

    Measured are medians over the steps that the picture counts; means where only some steps meet or wait, since a
    prediction shares that out among them. Raises RunError when there is no record.
    """
    run = _read(Path(run_directory))
    if not run.predicted or not run.timed:
        return {}
    middle = typical(Plan.parse(run.plan))
    predicted = as_measured(run.predicted)
    measured = {term: middle(seconds) for term, seconds in measured_terms(run.timed).items()}
    terms = {
        term: {"predicted": predicted.get(term, 0.0), "measured": measured.get(term, 0.0)}
        for term in dict.fromkeys([*measured, *predicted])
    }
    whole = {"predicted": sum(predicted.values()), "measured": middle([report.seconds for report in run.timed])}
    return {"step": whole, **terms}


def sent_bytes(run_directory: str | Path) -> dict[str, float]:
    """What worker 0 sent in a step, ``measured`` as a mean over the steps that the picture counts, and ``predicted``.

    Predicted is what the worker that sends most does; where some are late for meetings, the mean over the workers, of
    which worker 0 may send more (docs/relaxed.md). Empty where either is not known. Raises RunError when there is no
    record.
    """
    run = _read(Path(run_directory))
    measured = _sent_bytes(run)
    known = bool(measured and run.predicted_sent_bytes)
    return {"predicted": run.predicted_sent_bytes, "measured": measured} if known else {}


def _sent_bytes(run: _Run) -> float:
    return fmean(report.sent_bytes for report in run.timed) if run.timed else 0.0


def measured_terms(steps: Sequence[StepReport]) -> dict[str, list[float]]:
    """Seconds of each measured term at each step; ``host`` also holds what the other terms leave of the step."""
    series: dict[str, list[float]] = {term: [] for term in MEASURED_TERMS}
    for report in steps:
        rest = max(0.0, report.seconds - sum(report.terms.values()))
        for term in MEASURED_TERMS:
            series[term].append(report.terms.get(term, 0.0) + (rest if term == "host" else 0.0))
    return series


def as_measured(predicted: dict[str, float]) -> dict[str, float]:
    """Predicted seconds added up into the terms a step measures; a term of another name keeps it.

    >>> as_measured({"compute": 2.0, "recompute": 1.0, "all_gather": 0.5, "bubble": 0.25, "transfer": 0.25})
    {'compute': 3.0, 'communicate': 0.5, 'wait': 0.5}
    """
    sums: dict[str, float] = {}
    for term, seconds in predicted.items():
        name = _MEASURED_AS.get(term, term)
        sums[name] = sums.get(name, 0.0) + seconds
    return sums


def _read(directory: Path) -> _Run:
    record = directory / "record.jsonl"
    if not record.is_file():
        raise RunError(f"{directory} holds no record.jsonl: give the directory of a run")
    run = _Run(directory.resolve().name, step_reports(record), [])
    run.plan = _plan_text(directory / "plan.toml")
    since: set[int] = set()
    furthest = -1
    for line in read_record(record):
        kind = line.get("kind")
        if kind in ("start", "plan"):
            since.clear()
            if str(line.get("plan", run.plan)) != run.plan:
                run.plan, run.predicted, run.predicted_sent_bytes = str(line["plan"]), {}, 0.0
        if kind == "plan":
            predicted = line.get("predicted") or {}
            run.predicted = {str(term): float(seconds) for term, seconds in predicted.items() if seconds is not None}
            run.predicted_sent_bytes = float(line.get("predicted_sent_bytes") or 0.0)
        elif kind == "resume":
            run.resumed_at.append(int(line.get("step", furthest + 1)))
        elif kind == "step":
            furthest = int(line["step"])
            since.add(furthest)
    timed = [report for report in run.steps if report.step in since]
    run.timed = timed[1:] if len(timed) > 1 else timed
    return run


def _plan_text(path: Path) -> str:
    try:
        return str(Plan.from_toml(path.read_text(encoding="utf-8")))
    except (OSError, SheafError, json.JSONDecodeError):
        return ""


def _title(run: _Run) -> str:
    parts = [run.name, f"plan {run.plan}" if run.plan else "", f"{len(run.steps)} step{'s' * (len(run.steps) != 1)}"]
    if run.steps and (memory := max(report.memory_bytes for report in run.steps)):
        parts.append(f"{pretty_bytes(memory)} at most per worker")
    if (sent := _sent_bytes(run)) and len(run.plan) < 60:
        promised = f" ({pretty_bytes(run.predicted_sent_bytes)} predicted)" if run.predicted_sent_bytes else ""
        parts.append(f"sends {pretty_bytes(sent)} a step{promised}")
    lines = [""]
    for part in (line for one in parts if one for line in textwrap.wrap(one, _TITLE_WIDTH)):
        joined = f"{lines[-1]}  ·  {part}" if lines[-1] else part
        lines = [*lines[:-1], joined] if len(joined) <= _TITLE_WIDTH else [*lines, part]
    return "\n".join(lines)


def _loss(axes: Axes, run: _Run) -> None:
    steps = np.array([report.step + 1 for report in run.steps])
    losses = np.array([report.loss for report in run.steps], dtype=float)
    dress(axes, "Loss", "loss (mean over the batch)")
    axes.tick_params(labelbottom=False)
    if not len(steps):
        _say(axes, "no step was recorded")
        return
    finite = losses[np.isfinite(losses)]
    smooth = len(steps) >= _SMOOTH_FROM
    width, alpha = (0.8, 0.45) if smooth else (1.6, 1.0)
    axes.plot(steps, losses, color=_MEASURED, marker=_dot(steps), lw=width, alpha=alpha)
    if smooth:
        span = len(steps) // 20
        axes.plot(steps, trailing_mean(losses, span), color=_MEASURED, lw=2, label=f"mean of {span} steps")
        axes.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="upper right")
    if len(finite) and finite.min() > 0 and finite.max() / finite.min() > 50:
        axes.set_yscale("log")
    if math.isfinite(losses[-1]):
        axes.annotate(
            f"{losses[-1]:.4g}", (steps[-1], losses[-1]), xytext=(6, 0), textcoords="offset points", va="center",
            fontsize=9, color=_INK, annotation_clip=False,
        )  # fmt: skip
    axes.set_xlim(steps[0] - 0.5, steps[-1] + 0.5 + 0.06 * len(steps))
    _mark_resumes(axes, run, label=True)


def _throughput(axes: Axes, run: _Run) -> None:
    kept = [report for report in run.steps if report.seconds > 0]
    dress(axes, "Throughput", "samples/s")
    axes.set_xlabel("step", color=_INK, fontsize=9.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    if not kept:
        return
    steps = np.array([report.step + 1 for report in kept])
    rates = np.array([report.samples / report.seconds for report in kept])
    axes.plot(steps, rates, color=_MEASURED, lw=1, alpha=0.8, marker=_dot(steps))
    middle = float(np.median(rates))
    axes.axhline(middle, color=_INK, lw=0.8, ls=(0, (4, 3)))
    axes.set_ylim(0, float(rates.max()) * 1.25)
    axes.annotate(
        f"median {pretty_number(middle)} samples/s", (1, 1), xycoords="axes fraction", xytext=(-4, -4),
        textcoords="offset points", ha="right", va="top", fontsize=9, color=_INK,
    )  # fmt: skip
    _mark_resumes(axes, run, label=False)


def _terms(axes: Axes, run: _Run) -> None:
    dress(axes, "Time per step", "")
    if not run.timed:
        _say(axes, "no step was timed")
        axes.set_yticks([])
        return
    series = measured_terms(run.timed)
    predicted = as_measured(run.predicted)
    names = [*MEASURED_TERMS, *(name for name in predicted if name not in MEASURED_TERMS)]
    names = [name for name in names if any(series.get(name, [])) or predicted.get(name)]
    series["whole step"] = [report.seconds for report in run.timed]
    if predicted:
        predicted["whole step"] = sum(predicted.values())
    names.insert(0, "whole step")
    height = 0.36 if predicted else 0.6
    places = np.arange(len(names), dtype=float)
    middle = typical(Plan.parse(run.plan)) if run.plan else median
    bars = [(name, middle(series.get(name) or [0.0]), place) for name, place in zip(names, places, strict=True)]
    farthest = max([seconds for _, seconds, _ in bars] + [predicted.get(name, 0.0) for name in names])
    unit, scale = ("s", 1.0) if farthest >= 1 else ("ms", 1e3)
    shift = height / 2 + 0.015 if predicted else 0.0
    if predicted:
        values = [predicted.get(name, 0.0) for name in names]
        axes.barh(places - shift, [v * scale for v in values], height, color=_PREDICTED, label="predicted")
        for place, value in zip(places, values, strict=True):
            _label(axes, value, value * scale, place - shift)
    several = len(run.timed) > 2
    word = "median" if middle is median else "mean"
    measured = f"measured ({word} of {len(run.timed)} steps, line: 10 to 90 %)" if several else "measured"
    axes.barh(places + shift, [value * scale for _, value, _ in bars], height, color=_MEASURED, label=measured)
    for name, value, place in bars:
        low, high = np.quantile(series.get(name) or [0.0], [0.1, 0.9])
        if several and high > low:
            axes.plot([low * scale, high * scale], [place + shift] * 2, color=_INK, lw=1.1, solid_capstyle="butt")
        _label(axes, value, max(value, high if several else value) * scale, place + shift)
    axes.set_yticks(places, names)
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.invert_yaxis()
    spread = max(float(np.quantile(values or [0.0], 0.9)) for values in series.values())
    axes.set_xlim(0, max(farthest, spread) * scale * 1.22 or 1)
    axes.set_xlabel(f"{unit} per step", color=_INK, fontsize=9.5)
    axes.grid(axis="y", visible=False)
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="lower right")
    axes.set_title(_comparison(bars[0][1], predicted.get("whole step")), loc="right", fontsize=9.5, color=_INK)


def _comparison(measured_seconds: float, predicted_seconds: float | None) -> str:
    if not predicted_seconds or measured_seconds <= 0:
        return "no prediction was recorded"
    off = predicted_seconds / measured_seconds - 1
    return f"predicted {pretty_seconds(predicted_seconds)}: {abs(off):.0%} {'above' if off >= 0 else 'below'} measured"


def _label(axes: Axes, seconds: float, place_x: float, place_y: float) -> None:
    axes.annotate(
        pretty_seconds(seconds) if seconds >= _NOTHING_SECONDS else "0", (place_x, place_y), xytext=(4, 0),
        textcoords="offset points", va="center", fontsize=8.5, color=_INK,
    )  # fmt: skip


def _mark_resumes(axes: Axes, run: _Run, *, label: bool) -> None:
    for number, step in enumerate(run.resumed_at):
        axes.axvline(step + 0.5, color=_FAINT, lw=1, ls=":")
        if label and number == 0:
            axes.annotate(
                "resumed", (step + 0.5, 0.02), xycoords=("data", "axes fraction"), xytext=(3, 0),
                textcoords="offset points", fontsize=8.5, color=_FAINT,
            )  # fmt: skip


def trailing_mean(values: np.ndarray, span: int) -> np.ndarray:
    """The mean of each value and up to ``span - 1`` before it, of the finite ones."""
    windows = (values[max(0, end - span) : end] for end in range(1, len(values) + 1))
    finite = (window[np.isfinite(window)] for window in windows)
    return np.array([window.mean() if len(window) else np.nan for window in finite])


def _dot(steps: np.ndarray) -> str:
    return "o" if len(steps) == 1 else ""


def _say(axes: Axes, text: str) -> None:
    axes.annotate(text, (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", color=_FAINT)


def dress(axes: Axes, title: str, unit: str) -> None:
    """Title, unit and frame of a panel, alike in all pictures."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK)
    axes.set_ylabel(unit, color=_INK, fontsize=9.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.grid(color="#e6eaed", lw=0.8)
    axes.set_axisbelow(True)
