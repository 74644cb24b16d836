"""The same task under several ways for gradients to meet, one run after another: loss by steps and by seconds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np

from sheaf import launch
from sheaf.api.choice import Checked, balanced, checked
from sheaf.api.run import Run
from sheaf.api.saying import say, say_nothing
from sheaf.api.train import folder_name, train
from sheaf.checkpoint import from_first
from sheaf.errors import PlanError, RunError, SheafError
from sheaf.launch import FromFile
from sheaf.plans import Plan
from sheaf.record import step_reports
from sheaf.task import Task
from sheaf.training.directory import RECORD
from sheaf.watch import draw_comparison
from sheaf.watch.comparison import Curve
from sheaf.watch.picture import trailing_mean

ALL_REDUCE = "all-reduce"  # what a plan means that says nothing else
PICTURE = "comparison.png"


@dataclass(frozen=True)
class Comparison:
    """The runs by mode, in order, and the picture of them.

    ``failed`` says what ended a run before its last step; of such a mode ``runs`` has the steps that it did, if any.
    """

    runs: dict[str, Run]
    picture: Path
    failed: dict[str, SheafError] = field(default_factory=dict)

    @property
    def rows(self) -> list[dict[str, object]]:
        """By mode: its plan, the loss at the end, seconds per step, and seconds until the first mode's last loss.

        Losses are means of a tenth of the steps. The last is None where that loss was not reached. The first mode is
        that of those which came to their end; ``failed`` is why a mode did not.
        """
        first = next(run for mode, run in self.runs.items() if mode not in self.failed)
        steps = len(first.losses)
        goal = smooth(first.losses, steps)[-1]
        return [
            {
                "mode": mode,
                "plan": str(run.plan),
                "exact": run.plan.exact,
                "loss": smooth(run.losses, steps)[-1],
                "seconds_per_step": run.seconds_per_step,
                "seconds_to_loss": _reached(run, goal, steps),
                "failed": str(self.failed[mode]) if mode in self.failed else None,
            }
            for mode, run in self.runs.items()
        ]


def modes(text: str, base: Plan) -> dict[str, Plan]:
    """The plans that ``"all-reduce; server=2:async; local=16:diloco"`` names on top of a plan.

    Raises PlanError listing everything wrong with any of them.
    """
    found: dict[str, Plan] = {}
    broken: list[str] = []
    for part in text.split(";"):
        name = part.strip()
        if not name:
            continue
        try:
            plan = _all_reduce(base) if name == ALL_REDUCE else base.with_text(name)
        except PlanError as error:
            broken += [f"{name}: {rule}" for rule in error.broken]
            continue
        if name in found or plan in found.values():
            broken.append(f"{name} is there twice; keep one")
        found[name] = plan
    if len(found) < 2 and not broken:
        broken.append(f"{text!r} names {len(found)} ways: give two or more, parted by semicolons, such as "
                      f"'{ALL_REDUCE}; local=16:diloco'")  # fmt: skip
    if broken:
        raise PlanError(broken)
    return found


def _all_reduce(base: Plan) -> Plan:
    """The plan itself, whose gradients must meet so."""
    if base.server or base.meets_locally.every or base.compression.kind != "none":
        raise PlanError(
            f"this is the plan itself, and gradients of {base} meet otherwise: give a plan without server, local and "
            "compress, or name that way in its place"
        )
    return base


def compare(
    task: Task,
    ways: str,
    plan: Plan | str,
    *,
    steps: int,
    out: str | Path,
    quiet: bool = False,
    threads: int | None = None,
    source: FromFile | None = None,
    predict: bool = True,
) -> Comparison:
    """Train the task under each of several ways for gradients to meet, from the same weights on the same samples.

    ``ways`` names them, parted by semicolons, as keys that are put on top of ``plan``; ``all-reduce`` is the plan
    itself. Each run has a directory under ``out``, and ``out`` the picture: loss by steps beside loss by seconds.
    Stages that the plan does not name are balanced by measured times; without ``predict`` operations are counted.
    A run that an error ends, such as a loss that is no number, ends for itself: the others go on. Under torchrun, whose
    workers may be gone then, it ends all.

    Raises PlanError, TaskError and RunError for any of them before the first one starts, and the error of the first
    where none comes to its end.
    """
    base = Plan.parse(plan) if isinstance(plan, str) else plan
    named = modes(ways, base)
    world, note = launch.join(), say_nothing if quiet else say
    place = Path(from_first(lambda: _unused(Path(out))))
    broken: list[str] = []
    found: dict[str, Checked] = {}
    for name, one in named.items():
        try:
            found[name] = checked(task, one)
        except PlanError as error:
            broken += [f"{name}: {rule}" for rule in error.broken]
    if broken:
        raise PlanError(broken)
    runs: dict[str, Run] = {}
    failed: dict[str, SheafError] = {}
    for number, (name, one) in enumerate(found.items(), start=1):
        note(f"{name}, {number} of {len(found)} ways")
        chosen = balanced(task, one, world=world, source=source, note=note) if predict else one.plan
        directory = place / folder_name(name)
        try:
            runs[name] = train(
                task,
                chosen,
                steps=steps,
                out=directory,
                quiet=quiet,
                threads=threads,
                source=source,
                predict=False,
            )
        except SheafError as error:
            if world is not None:
                raise
            note(f"{name}: {error}")
            failed[name] = error
            reports = step_reports(directory / RECORD) if (directory / RECORD).is_file() else []
            if reports:
                runs[name] = Run(directory=directory, plan=chosen, reports=tuple(reports), task=task)
            continue
        if runs[name].stopped:
            break
    if not set(runs) - set(failed):
        raise next(iter(failed.values()))
    curves = [
        Curve(
            *(name, run.losses, list(accumulate(report.seconds for report in run.reports))),
            exact=run.plan.exact,
            broken=name in failed,
        )
        for name, run in runs.items()
    ]
    picture = place / PICTURE
    try:
        if world is None or world.rank == 0:
            draw_comparison(picture, curves, title=f"{task.name}  ·  {base}")
    except Exception as error:
        raise SheafError(f"the runs are in {place}, but their picture could not be drawn: {error}") from error
    return Comparison(runs, picture, failed)


def _unused(place: Path) -> str:
    """The directory; raises RunError when it holds something."""
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise RunError(f"{place} holds something already: give a new directory, or remove it")
    return str(place)


def smooth(losses: Sequence[float], steps: int) -> list[float]:
    """The mean of each loss and those before it, over a tenth of so many steps."""
    return trailing_mean(np.array(losses, dtype=float), max(1, steps // 10)).tolist()


def _reached(run: Run, goal: float, steps: int) -> float | None:
    spent = accumulate(report.seconds for report in run.reports)
    return next((seconds for seconds, loss in zip(spent, smooth(run.losses, steps), strict=True) if loss <= goal), None)
