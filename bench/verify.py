"""Every small model under every kind of plan: what ``sheaf verify`` says, and how far gradients are off.

What a plan refuses before any worker starts is told with its reason. The workers of all plans of one size are started
once and take them in turn; each model's serial training, and its noise, is measured once for all plans.
"""

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from bench.foreign import FOREIGN
from sheaf import Plan, Task, launch
from sheaf.api.choice import cut
from sheaf.api.plan import check
from sheaf.cluster.machine import available_cores
from sheaf.errors import SheafError
from sheaf.graph import trace
from sheaf.parallel import refuse
from sheaf.parity.planned import Planned, observe_rank
from sheaf.parity.trial import Trial, undisturbed
from sheaf.task import Blueprint
from sheaf.zoo.tasks.small import SMALL

TASKS: dict[str, Callable[[], Task]] = {**SMALL, **FOREIGN}
PLANS = (
    "tp=2",
    "tp=3",
    "pp=2:gpipe",
    "pp=2",
    "pp=2:interleaved",
    "pp=2:zero-bubble",
    "pp=4",
    "dp=2,tp=2",
    "dp=2,pp=2",
    "tp=2,pp=2",
    "dp=2,tp=2,pp=2,zero=1",
    "dp=2,pp=2,zero=3",
)
PARTS = {
    "alexnet": "dp=2,classifier.*=tp",
    "vgg16": "dp=2,classifier.*=tp",
    "lstm_seq2seq": "dp=2,source_words=tp,target_words=tp,head=tp",
    "transformer_seq2seq": "dp=2,tokens=tp,head=tp",
}
SECONDS = 60.0  # that one plan of one model may take


@dataclass(frozen=True)
class Cell:
    """One model under one plan as it is run, with its stages written in; ``place`` is where observations go."""

    model: str
    text: str
    plan: str
    place: str

    @property
    def workers(self) -> int:
        """Of the plan."""
        return Plan.parse(self.plan).workers


def run(count: int = 2) -> list[dict[str, Any]]:
    """Every model under every plan for ``count`` steps: one result each."""
    with tempfile.TemporaryDirectory(prefix="sheaf_verify_") as directory, _processes() as pool:
        planned = list(pool.map(_planned, TASKS, [directory] * len(TASKS)))
        found = {(one["model"], one["plan"]): one for refused, _ in planned for one in refused}
        cells = sorted((cell for _, those in planned for cell in those), key=lambda cell: cell.workers)
        broken: dict[Cell, str] = {}
        for workers, those in groupby(cells, key=lambda cell: cell.workers):
            broken |= _watched(workers, list(those), count)
        run_by = [[cell for cell in cells if cell.model == name and cell not in broken] for name in TASKS]
        several = len(TASKS)
        for results in pool.map(_judged, TASKS, run_by, [count] * several, [directory] * several):
            found |= {(one["model"], one["plan"]): one for one in results}
    found |= {(cell.model, cell.text): _result(cell, "failed", reason=why) for cell, why in broken.items()}
    return [found[key] for key in sorted(found, key=lambda key: (list(TASKS).index(key[0]), _place(key[1])))]


def plans_of(model: str) -> tuple[str, ...]:
    """Those of every model, and the one by parts of those that have parts worth it."""
    return (*PLANS, *([PARTS[model]] if model in PARTS else []))


def _planned(model: str, directory: str) -> tuple[list[dict[str, Any]], list[Cell]]:
    """What is refused, and what can run with its stages written in."""
    task, refused, cells = TASKS[model](), list[dict[str, Any]](), list[Cell]()
    facts = trace(task, task.microbatch or task.batch)
    for number, text in enumerate(plans_of(model)):
        place = Path(directory) / model / f"plan_{number}"
        cell = Cell(model, text, text, str(place))
        try:
            with undisturbed():
                plan = cut(check(task, Plan.parse(text), facts, workers=Plan.parse(text).workers), facts)
                refuse(task, plan)
        except SheafError as error:
            refused.append(_result(cell, "refused", reason=str(error)))
        else:
            place.mkdir(parents=True)
            cells.append(Cell(model, text, str(plan), str(place)))
    return refused, cells


def _watched(workers: int, cells: list[Cell], steps: int) -> dict[Cell, str]:
    """Run the cells on as many workers, all in turn; what failed, and why. After a failure new workers go on."""
    broken: dict[Cell, str] = {}
    while cells:
        why = ""
        try:
            launch.run(_observe, workers, cells, steps, threads=1, timeout_s=SECONDS * len(cells))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a result
            why = f"{type(error).__name__}: {error}"
        done = [cell for cell in cells if (Path(cell.place) / "done").exists()]
        left = [cell for cell in cells if cell not in done]
        if left:
            broken[left[0]] = why
        cells = left[1:]
    return broken


def _observe(cells: list[Cell], steps: int) -> None:
    """Called on every worker."""
    for cell in cells:
        place = Path(cell.place)
        observe_rank(TASKS[cell.model](), Plan.parse(cell.plan), steps, place)
        if torch.distributed.get_rank() == 0:
            (place / "done").touch()


def _judged(model: str, cells: list[Cell], steps: int, directory: str) -> list[dict[str, Any]]:
    """The verdicts on one model's plans."""
    torch.set_num_threads(1)
    task = TASKS[model]()
    names = Blueprint(task).names
    aliases = frozenset(alias for others in names.values() for alias in others)
    results: list[dict[str, Any]] = []
    with undisturbed():
        device = torch.device("cpu")
        trial = Trial(task, steps, Path(directory) / model, microbatch=task.microbatch or task.batch, device=device)
        for cell in cells:
            planned = Planned(Path(cell.place), cell.workers, frozenset(names), aliases)
            verdict = trial.judged(cell.text, planned.read)
            results.append(
                _result(
                    cell,
                    verdict.verdict,
                    errors=verdict.step_errors,
                    noise=verdict.step_noise,
                    first_departure=verdict.first_departure,
                )
            )
    return results


def _result(cell: Cell, verdict: str, **more: Any) -> dict[str, Any]:
    return {"model": cell.model, "plan": cell.text, "run": cell.plan, "verdict": verdict, **more}


def _place(plan: str) -> int:
    return PLANS.index(plan) if plan in PLANS else len(PLANS)


def _processes() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(available_cores(), mp_context=multiprocessing.get_context("spawn"))
