"""Train a task under a plan: in this process, on workers of this machine, or among those that torchrun started."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sheaf import launch, training
from sheaf.api.choice import AUTO, checked, choose, foretold
from sheaf.api.feedback import figures, measured_for
from sheaf.api.run import Run
from sheaf.api.saying import say, say_nothing
from sheaf.checkpoint import from_first, latest
from sheaf.cost.price import Price
from sheaf.errors import RunError, SheafError, TaskError, WorkerFailed
from sheaf.launch import FromFile, World
from sheaf.plans import Plan
from sheaf.plans.server import APART, outlives
from sheaf.record import Record, StepReport, read_record, step_reports
from sheaf.task import Task
from sheaf.task.blueprint import Blueprint
from sheaf.training.checks import memory_bytes
from sheaf.training.directory import RECORD
from sheaf.training.pipeline import PICTURE


def train(
    task: Task,
    plan: Plan | Price | str | None = None,
    *,
    steps: int,
    workers: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    save_every: int | None = None,
    quiet: bool = False,
    allow_relaxed: bool = False,
    threads: int | None = None,
    source: FromFile | None = None,
    predict: bool = True,
) -> Run:
    """Train until ``steps`` steps are done in all, and return what came of it.

    ``plan``     a Plan, its text (``dp=2,zero=1``), a Price (its prediction is kept), or None or "auto": the best one
    ``workers``  how many there may be; under torchrun as many as it started
    ``out``      the run's directory; ``runs/<name>-<number>`` when left out
    ``resume``   continue what ``out`` holds (its plan too, when none is given); starts where it holds nothing
    ``save_every``  steps between checkpoints; 0: only at the end; None: as often as costs little
    ``threads``  per worker; the cores shared out when left out
    ``source``   where each worker finds the task by itself, for a task that cannot be sent to it
    ``predict``  say what the planner expects a step to take, and balance stages that the plan does not name by measured
                 times; the first time that measures for some seconds

    SIGINT and SIGTERM end it after the step under way, with a checkpoint.

    Raises before any worker starts: PlanError (a plan that breaks rules, needs more workers than there are, or does
    not fit into memory), TaskError, DataError, RunError (a directory in use). Raises while running: NonFiniteLoss,
    DataError, and WorkerFailed for a worker that raised anything else, or died.
    """
    if steps < 1:
        raise RunError(f"steps={steps}: at least one step is needed")
    if resume and out is None:
        raise RunError("resume needs the directory of the run to continue: give --out")
    world = launch.join()
    note = say_nothing if quiet else say
    training.first_sample(task)
    if world is None and out is not None and not resume:
        training.check(Path(out), {}, resume=False)
    blueprint, there_is = Blueprint(task), memory_bytes() * (1 if world is None else world.hosts)
    if plan in (None, AUTO):  # what one copy needs, every plan needs
        training.affordable(blueprint, Plan(), there_is)
    resumed = Path(out) if resume and out is not None else None
    chosen, price = choose(
        task,
        plan,
        world=world,
        workers=workers,
        resumed=resumed,
        allow_relaxed=allow_relaxed,
        source=source,
        note=note,
    )
    training.affordable(blueprint, chosen, there_is)
    found = None
    if price is None:
        found = checked(task, chosen)
        chosen = found.plan
    values = training.describe(task, chosen)
    directory = Path(from_first(lambda: str(run_directory(task, out))))
    if world is None:
        training.check(directory, values, resume=resume)
    events: dict[str, dict[str, Any]] = {}
    if predict:
        price, reason = foretold(task, found, price, world=world, source=source, note=note)
        chosen = chosen if price is None else price.plan
        if reason:
            events["warning"] = {"message": reason}
    elsewhere = world is not None or isinstance(plan, Price)
    measured = 0 if elsewhere else measured_for(chosen, auto=found is None, workers=workers)
    events["plan"] = {"plan": str(chosen), **_foretold(price, measured)}
    arguments: dict[str, Any] = {
        "resume": resume,
        "save_every": save_every,
        "values": values,
        "events": events,
        "observers": () if quiet else (functools.partial(_progress, steps, str(chosen)),),
    }
    try:
        outcome = _carry_out(task, chosen, steps, directory, world, threads, source, arguments)
    except SheafError as error:
        refused = isinstance(error, RunError)  # such as to resume under another plan: doing so again is no remedy
        if not quiet and not refused and (kept := latest(directory).path) is not None:
            print(f"{kept} is kept; --resume goes on from there", file=sys.stderr, flush=True)
        raise
    picture = None
    if world is None or world.rank == 0:
        _compare(directory)
        _draw(directory)
        picture = _draw_pipeline(directory, chosen, price)
    reports = [report for report in step_reports(directory / RECORD) if report.step < outcome.steps]
    return Run(
        directory=directory,
        plan=chosen,
        reports=tuple(reports),
        stopped=outcome.stopped,
        added=outcome.steps - outcome.first,
        pipeline=picture,
        predicted_seconds_per_step=None if price is None else price.step_seconds,
        task=task,
    )


def _carry_out(
    task: Task,
    plan: Plan,
    steps: int,
    directory: Path,
    world: World | None,
    threads: int | None,
    source: FromFile | None,
    arguments: dict[str, Any],
) -> training.Outcome:
    if world is not None:
        with launch.peers(world.rank):
            return training.train_rank(task, plan, steps, directory, device=world.device, **arguments)
    try:
        if plan.serial:
            return training.train_rank(task, plan, steps, directory, device=World.alone().device, **arguments)
        given = task if source is None else source
        survive = outlives(plan.serves, stolen=plan.stolen, local=bool(plan.local))
        found = launch.run(
            *(_train_worker, plan.workers, given, plan, steps, directory, arguments),
            threads=threads,
            on_lost=functools.partial(_tell_lost, plan) if survive else None,
        )
        there = [outcome for outcome in found[: plan.computing] if outcome is not None]
        return max(there, key=lambda outcome: outcome.steps)  # one that only served in the end has done fewer
    except SheafError as error:
        _note_failure(directory, error)
        raise


def _train_worker(
    given: Task | FromFile, plan: Plan, steps: int, directory: Path, arguments: dict[str, Any]
) -> training.Outcome:
    world = launch.join()
    assert world is not None
    task = given if isinstance(given, Task) else _loaded(given)
    return training.train_rank(task, plan, steps, directory, device=world.device, lost=launch.lost, **arguments)


def _tell_lost(plan: Plan, rank: int, why: str) -> None:
    if rank >= plan.computing == plan.workers - 1:
        raise WorkerFailed(
            f"worker {rank}, the only one that served, {why}. Start again from the last checkpoint; with "
            f"server=2:{APART} or more each shard has a backup"
        )
    print(f"sheaf: worker {rank} {why}; {training.goes_on(plan, rank)}", file=sys.stderr, flush=True)


def _loaded(source: FromFile) -> Task:
    found = source.load()
    task = found() if callable(found) and not isinstance(found, Task) else found
    if not isinstance(task, Task):
        raise TaskError(
            f"{source.name} in {source.file} gave a {type(task).__name__}; it must be or return a sheaf.Task"
        )
    return task


def folder_name(text: str) -> str:
    """The text as part of a path."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in text)


def run_directory(task: Task, out: str | Path | None) -> Path:
    """Where a run goes: ``out``, or the first ``runs/NAME-N`` that is not there yet."""
    if out is not None:
        return Path(out)
    name = folder_name(task.name)
    number = 1
    while (path := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return path


def _progress(steps: int, title: str, first_step: int) -> Callable[[StepReport], object]:
    from sheaf.watch import Progress

    return Progress(steps, title=title, first_step=first_step)


def _foretold(price: Price | None, measured: int) -> dict[str, Any]:
    """What the record keeps of a prediction, and from which figures of this machine it was made.

    ``measured`` counts the workers with which the machine was measured; 0: elsewhere, or not now.
    """
    if price is None:
        return {}
    on = {"on": figures(measured)} if measured else {}
    sent = {"predicted_sent_bytes": price.traffic_bytes}
    return {"predicted": price.seconds, "hidden_seconds": price.hidden_seconds, **sent, **on}


def _compare(directory: Path) -> None:
    """Write into the record what was predicted beside what was measured, term by term."""
    try:
        from sheaf.watch import compared, sent_bytes

        terms, sent = compared(directory), sent_bytes(directory)
    except Exception:  # noqa: BLE001  watching never stops a run
        return
    if terms:
        record = Record(directory / RECORD)
        record.event("compared", terms=terms, sent_bytes=sent)
        record.close()


def _draw(directory: Path) -> None:
    """Leave the run's picture; a run without one is still a run."""
    try:
        from sheaf.watch import draw

        draw(directory)
    except Exception:  # noqa: BLE001  watching never stops a run
        return


def _draw_pipeline(directory: Path, plan: Plan, price: Price | None) -> Path | None:
    """The picture of a pipeline's step, predicted above measured; None where there is none."""
    if plan.pp == 1:
        return None
    try:
        from sheaf.watch import draw_pipeline

        return draw_pipeline(
            directory / PICTURE,
            predicted=price.timeline if price is not None and price.timeline else None,
            measured=training.measured_rows(directory, plan),
            title=f"{directory.resolve().name}  ·  plan {plan}",
        )
    except Exception:  # noqa: BLE001  watching never stops a run
        return None


def _note_failure(directory: Path, error: SheafError) -> None:
    """Write into the record what worker 0 could not, because it was killed or another worker raised."""
    path = directory / RECORD
    if not path.exists() or any(line.get("kind") == "failed" for line in list(read_record(path))[-1:]):
        return
    record = Record(path)
    record.event("failed", error=type(error).__name__, message=str(error))
    record.close()
