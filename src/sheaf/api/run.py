"""What a finished run gives back: its losses, its reports, its directory, its model."""

import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from sheaf.errors import RunError
from sheaf.plans import Plan
from sheaf.plans.typical import typical
from sheaf.record import StepReport
from sheaf.task import Task
from sheaf.task.blueprint import Blueprint
from sheaf.training.directory import MODEL

STRAGGLING = 1.25  # times the median worker's pace


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run and what it left in its directory; of a resumed one all steps from the first.

    ``stopped`` when it was asked to end before its last step; ``added`` is how many of its steps were done this time,
    none where a resumed run had as many already; ``predicted_seconds_per_step`` is what the planner promised, None when
    nobody asked it; ``pipeline`` is the picture of a pipeline's step, where there is one.
    """

    directory: Path
    plan: Plan
    reports: tuple[StepReport, ...]
    stopped: bool = False
    added: int = 0
    pipeline: Path | None = None
    predicted_seconds_per_step: float | None = None
    task: Task = field(repr=False)

    @property
    def losses(self) -> list[float]:
        """The loss of every step."""
        return [report.loss for report in self.reports]

    @property
    def seconds_per_step(self) -> float:
        """The median over all steps but the first, which warms up; the mean where only some steps meet or wait."""
        seconds = [report.seconds for report in self.reports]
        return typical(self.plan)(seconds[1:] or seconds) if seconds else 0.0

    @property
    def stragglers(self) -> dict[int, float]:
        """By worker, how many times as long it took for a microbatch as the median one, where that is a quarter more.

        Medians over all steps but the first. Of replicas made of several workers, all are looked at.
        """
        paces: dict[int, list[float]] = {}
        for report in self.reports[1:]:
            for worker, (count, seconds) in enumerate(zip(report.microbatches, report.computed, strict=False)):
                if count and seconds:
                    paces.setdefault(worker, []).append(seconds / count)
        typical = {worker: statistics.median(found) for worker, found in paces.items()}
        middle = statistics.median_low(typical.values()) if typical else 0.0
        return {worker: pace / middle for worker, pace in sorted(typical.items()) if pace > STRAGGLING * middle}

    def model(self) -> nn.Module:
        """The trained model on the CPU, under its original parameter names.

        Raises RunError when the directory no longer holds its weights.
        """
        path = self.directory / MODEL
        if not path.is_file():
            raise RunError(f"{path} is missing: the run was removed, or ended before it wrote its weights")
        return Blueprint(replace(self.task, weights=path)).fill(torch.device("cpu"))
