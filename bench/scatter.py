"""The picture of a prediction: predicted beside measured step times, and errors by the term that takes most."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Group:
    """Steps that are drawn alike; seconds."""

    label: str
    measured: Sequence[float]
    predicted: Sequence[float]
    color: str
    marker: str


def draw(
    groups: Sequence[Group],
    errors: Mapping[str, Sequence[float]],
    path: Path,
    *,
    predicted: str,
    size: int,
    legend: Mapping[str, Any],
    within: float | None = None,
) -> None:
    """Write the picture. ``errors`` are of steps, by term; ``predicted`` names that axis; ``within`` shades a goal."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5), constrained_layout=True)
    for one in groups:
        left.scatter(
            one.measured, one.predicted,
            s=size, alpha=0.6, color=one.color, marker=one.marker, label=one.label, linewidths=0,
        )  # fmt: skip
    every = [seconds for one in groups for seconds in one.measured]
    ends = [min(every), max(every)]
    left.plot(ends, ends, color="black", linewidth=0.8)
    if within is not None:
        left.fill_between(
            ends, [(1 - within) * end for end in ends], [(1 + within) * end for end in ends],
            color="black", alpha=0.1, linewidth=0, label=f"within {within:.0%}",
        )  # fmt: skip
    left.set(xscale="log", yscale="log", xlabel="measured, seconds per step", ylabel=predicted)
    left.legend(frameon=False, **legend)
    terms = sorted(errors, key=lambda term: -len(errors[term]))
    right.boxplot([errors[term] for term in terms], orientation="horizontal", showfliers=False, whis=(10, 90))
    right.set_yticks(range(1, len(terms) + 1), [f"{term} ({len(errors[term])})" for term in terms])
    right.axvline(0, color="black", linewidth=0.8)
    right.xaxis.set_major_formatter(lambda value, _: f"{value:+.0%}")
    right.set(xlabel="error of the step (10th to 90th percentile)", title="by the term that takes most of the step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
