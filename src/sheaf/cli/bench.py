"""``sheaf bench``: how right Sheaf's predictions are."""

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sheaf.cli.answer import Answer, leads
from sheaf.cli.options import BAD_INPUT, json_option


@click.group(short_help="Score predictions against measured runs.")
def bench() -> None:
    """Score predictions against measured runs."""


@bench.command(short_help="Predict published runs, and score the prediction.")
@click.option(
    "--runs", required=True, type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.jsonl",
    help="Runs to predict, one JSON object a line.",
)  # fmt: skip
@click.option(
    "--fit", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.jsonl",
    help="Runs to take the constants from (default: those that ship).",
)  # fmt: skip
@json_option
@click.pass_context
def planner(context: click.Context, runs: Path, fit: Path | None, as_json: bool) -> None:
    """Predict each run of FILE.jsonl from its shape and its machine, and compare where it was measured.

    A run that cannot be predicted is refused with the reasons; the others go on. Exit code 2 where not one could be.
    """
    with Answer(as_json=as_json) as answer:
        from sheaf.api.published import predict_runs

        found = predict_runs(runs, fit=fit)
        answer.give(found, lambda console: _show(found["summary"], console))
    if not found["summary"]["predicted"]:
        if leads():
            click.echo(f"sheaf: {_none_predicted(runs, found['summary'])}", err=True)
        context.exit(BAD_INPUT)


def _none_predicted(runs: Path, summary: dict[str, Any]) -> str:
    """Why there is no prediction at all, and what is wanted."""
    if not summary["rows"]:
        return f"{runs} holds no runs; wanted one JSON object a line"
    most = next(iter(summary["reasons"]))
    return (
        f"not one of the {summary['rows']} runs of {runs} can be predicted, most often because {most}; wanted rows "
        "with model, batch, parallel and hardware, as in docs/planning.md"
    )


def _show(summary: dict[str, Any], console: Console) -> None:
    console.print(f"{summary['predicted']} of {summary['rows']} runs predicted, {summary['refused']} refused")
    for reason, count in summary["reasons"].items():
        console.print(f"  {count} x {reason}", markup=False, soft_wrap=True)
    table = Table(box=None, title="error of the step's time", title_justify="left")
    for heading in ("source", "runs", "mean", "median", "90th percentile", "bias"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    seconds = summary["seconds"]
    for source, found in [*seconds["sources"].items(), ("all", seconds["all"])]:
        if found["count"]:
            shares = (f"{found['mean']:.1%}", f"{found['median']:.1%}", f"{found['p90']:.1%}", f"{found['bias']:+.1%}")
            table.add_row(Text(source or "unnamed"), str(found["count"]), *shares)
    if table.rows:
        console.print(table)
    groups, memory = seconds["groups"], summary["memory"]
    if groups["count"]:
        console.print(
            f"{groups['count']} groups of plans: rank correlation {groups['rank_correlation'] or 0:.2f}, "
            f"the first choice is {groups['regret']:.1%} slower than the fastest"
        )
    if memory["count"]:
        console.print(f"{memory['count']} peaks of memory: median error {memory['median']:.1%}")
