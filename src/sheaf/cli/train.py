"""``sheaf train``: train a task under a plan over several workers."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sheaf.cli.answer import Answer, leads
from sheaf.cli.options import AUTO, FAILED, INTERRUPTED, file_argument, json_option, read_plan, workers_option
from sheaf.errors import RunError
from sheaf.plans import Plan
from sheaf.units import pretty_seconds

if TYPE_CHECKING:
    from sheaf.api.compare import Comparison
    from sheaf.api.train import Run
    from sheaf.launch import FromFile
    from sheaf.task import Task


@click.command(short_help="Train a task under a plan.")
@file_argument
@click.option("--plan", "plan_text", default=AUTO, show_default=True, metavar="auto|TEXT|P.toml",
              help="The plan; auto takes the one that `sheaf plan` puts first.")  # fmt: skip
@workers_option
@click.option("--steps", type=click.IntRange(min=1), default=100, show_default=True, metavar="N", help="Steps in all.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where the run goes (default: runs/NAME-N; NAME is the task's, or else the file's).",
)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --out.")
@click.option(
    "--save-every", type=click.IntRange(min=0), metavar="N", help="Steps between checkpoints (0: at the end)."
)
@click.option("--no-predict", is_flag=True, help="Do not measure what a step of a given plan should take, nor "
              "balance its stages by that.")  # fmt: skip
@click.option("--compare", "ways", metavar="WAYS",
              help="Train once for each of several ways for gradients to meet, such as 'all-reduce; server=2:async; "
                   "local=16:diloco', and draw their losses by steps and by seconds.")  # fmt: skip
@json_option
@click.pass_context
def train(
    context: click.Context,
    file: str,
    plan_text: str,
    workers: int | None,
    steps: int,
    out: Path | None,
    resume: bool,
    save_every: int | None,
    no_predict: bool,
    ways: str | None,
    as_json: bool,
) -> None:
    """Train a task; the run's directory keeps the plan, the record, checkpoints and a picture.

    Ctrl-C saves a checkpoint and ends; the same command with --resume goes on as if nothing had happened.
    """
    with Answer(as_json=as_json) as answer:
        from sheaf.api.train import train as run
        from sheaf.cli.files import load, own_source

        plan = AUTO if plan_text == AUTO else read_plan(plan_text)
        task = load(file)
        if ways is not None:
            _refuse_with_compare(resume=resume, save_every=save_every)
            given = (answer, task, ways, plan, steps, out, workers, own_source(task, file))
            code = _compare(*given, predict=not no_predict)
        else:
            done = run(
                task,
                plan,
                workers=workers,
                steps=steps,
                out=out,
                resume=resume,
                save_every=save_every,
                quiet=not leads(),
                source=own_source(task, file),
                predict=not no_predict,
            )
            answer.give(_values(done), lambda console: _show(done, console))
            code = INTERRUPTED if done.stopped else 0
    context.exit(code)


def _values(run: "Run") -> dict[str, object]:
    return {
        "losses": run.losses,
        "plan": str(run.plan),
        "seconds_per_step": run.seconds_per_step,
        "predicted_seconds_per_step": run.predicted_seconds_per_step,
        "directory": str(run.directory),
        "pipeline": None if run.pipeline is None else str(run.pipeline),
        "stopped": run.stopped,
        "stragglers": {str(worker): times for worker, times in run.stragglers.items()},
    }


def _show(run: "Run", console: Console) -> None:
    if run.losses:
        said = f"loss {run.losses[0]:.5g} → {run.losses[-1]:.5g} in {len(run.losses)} steps under {run.plan}"
        console.print(said, markup=False)
    if run.seconds_per_step:
        said = run.predicted_seconds_per_step
        predicted = f", predicted {pretty_seconds(said)}" if said else ""
        console.print(f"{pretty_seconds(run.seconds_per_step)} per step{predicted}")
    for worker, times in run.stragglers.items() if run.plan.dp > 1 and run.plan.pp == 1 else ():
        remedy = (
            "" if run.plan.stolen or run.plan.balanced else ": shares=balanced, or stolen, would give it less to do"
        )
        console.print(f"worker {worker} took {times:.1f} times as long for a microbatch as the others{remedy}")
    console.print(f"the run is in {run.directory}", markup=False, soft_wrap=True)
    if run.pipeline is not None:
        console.print(f"a step of its pipeline is drawn in {run.pipeline}", markup=False, soft_wrap=True)
    if not run.added and not run.stopped:
        done = len(run.losses)
        console.print(f"nothing was left to do: {done} steps are done, and --steps counts all of them; give more")
    if run.stopped:
        console.print(f"it was stopped; the same command with --out {run.directory} --resume goes on", markup=False)


def _refuse_with_compare(*, resume: bool, save_every: int | None) -> None:
    given = [name for name, there in (("--resume", resume), ("--save-every", save_every is not None)) if there]
    if given:
        raise RunError(f"{' and '.join(given)}: with --compare several runs start anew; drop one or the other")


def _compare(
    answer: Answer,
    task: "Task",
    ways: str,
    plan: Plan | str,
    steps: int,
    out: Path | None,
    workers: int | None,
    source: "FromFile | None",
    *,
    predict: bool,
) -> int:
    from sheaf.api.compare import compare
    from sheaf.api.measure import default_workers
    from sheaf.api.train import run_directory

    if not isinstance(plan, Plan):
        plan = Plan(dp=workers or default_workers())
    place = out or run_directory(task, None)
    done = compare(task, ways, plan, steps=steps, out=place, quiet=not leads(), source=source, predict=predict)
    failed = {mode: str(error) for mode, error in done.failed.items()}
    values = {"rows": done.rows, "failed": failed, "picture": str(done.picture)}
    answer.give(values, lambda console: _show_rows(done, console))
    if any(run.stopped for run in done.runs.values()):
        return INTERRUPTED
    return FAILED if done.failed else 0


def _show_rows(done: "Comparison", console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("way")
    for heading in ("last loss", "per step", "to the first's last loss"):
        table.add_column(heading, justify="right")
    for row in done.rows:
        reached = row["seconds_to_loss"]
        table.add_row(
            Text(f"{row['mode']}{'' if row['exact'] else ' (relaxed)'}"),
            f"{row['loss']:.5g}",
            pretty_seconds(float(str(row["seconds_per_step"]))),
            "not reached" if reached is None else pretty_seconds(float(str(reached))),
        )
    console.print(table)
    for mode, error in done.failed.items():
        console.print(f"{mode} did not come to its end: {error}", markup=False, soft_wrap=True)
    console.print(f"losses by steps and by seconds: {done.picture}", markup=False, soft_wrap=True)
