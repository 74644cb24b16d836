"""``sheaf train``: train a task under a plan over several workers."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from sheaf.cli.answer import Answer, leads
from sheaf.cli.options import AUTO, INTERRUPTED, file_argument, json_option, read_plan, workers_option
from sheaf.units import pretty_seconds

if TYPE_CHECKING:
    from sheaf.api.train import Run


@click.command(short_help="Train a task under a plan.")
@file_argument
@click.option("--plan", "plan_text", default=AUTO, show_default=True, metavar="auto|TEXT|P.toml",
              help="The plan; auto takes the one that `sheaf plan` puts first.")  # fmt: skip
@workers_option
@click.option("--steps", type=click.IntRange(min=1), default=100, show_default=True, help="Steps in all.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Where the run goes (default: runs/NAME).")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --out.")
@click.option(
    "--save-every", type=click.IntRange(min=0), metavar="N", help="Steps between checkpoints (0: at the end)."
)
@click.option("--no-predict", is_flag=True, help="Do not measure what a step of a given plan should take.")
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
    context.exit(INTERRUPTED if done.stopped else 0)


def _values(run: "Run") -> dict[str, object]:
    return {
        "losses": run.losses,
        "plan": str(run.plan),
        "seconds_per_step": run.seconds_per_step,
        "predicted_seconds_per_step": run.predicted_seconds_per_step,
        "directory": str(run.directory),
        "pipeline": None if run.pipeline is None else str(run.pipeline),
        "stopped": run.stopped,
    }


def _show(run: "Run", console: Console) -> None:
    if run.losses:
        console.print(f"loss {run.losses[0]:.4f} → {run.losses[-1]:.4f} in {len(run.losses)} steps under {run.plan}")
    if run.seconds_per_step:
        said = run.predicted_seconds_per_step
        predicted = f", predicted {pretty_seconds(said)}" if said else ""
        console.print(f"{pretty_seconds(run.seconds_per_step)} per step{predicted}")
    console.print(f"the run is in {run.directory}", markup=False, soft_wrap=True)
    if run.pipeline is not None:
        console.print(f"a step of its pipeline is drawn in {run.pipeline}", markup=False, soft_wrap=True)
    if run.stopped:
        console.print(f"it was stopped; the same command with --out {run.directory} --resume goes on", markup=False)
