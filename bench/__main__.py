"""`python -m bench [NAME ...]`: measures, prints tables, says which goals are met, and keeps the numbers.

Run it on a machine that does nothing else: contenders are interleaved, so that noise meets all of them, but a busy
machine still widens the quartiles. `make docs` puts the numbers that are kept into the README.
"""

import importlib
import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table as Drawn

from bench import planner_report, report
from sheaf.cluster.machine import available_cores, processor_name

QUIET = 0.5  # load average at the start above which a warning is given
ROUNDS = dict.fromkeys(report.NAMES, "count") | {"planner": "rounds"}  # what each calls them


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, type=click.Choice(report.NAMES))
@click.option("--rounds", type=click.IntRange(min=2), help="Rounds (default: each benchmark's own).")
@click.option(
    "--out", type=click.Path(path_type=Path), default=report.RESULTS, show_default="bench/results",
    help="Where the numbers are kept.",
)  # fmt: skip
def main(names: tuple[str, ...], rounds: int | None, out: Path) -> None:
    """Measure Sheaf beside its peers, and the planner beside the clock (all, unless some are named)."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 120
    for name in names or report.NAMES:
        where = environment(name, rounds)
        if where["load_average"][0] > QUIET:
            console.print(
                f"load average {where['load_average'][0]:.2f}: something else is running here", style="yellow"
            )
        console.print(f"measuring {name} ...")
        run = importlib.import_module(f"bench.{name}").run
        results = run(**({} if rounds is None else {ROUNDS[name]: rounds}))
        if any("skipped" in one for one in results):  # what was measured elsewhere stays
            show(name, results, console)
            continue
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{name}.json"
        path.write_text(json.dumps({"environment": where, "results": results}, indent=1) + "\n", encoding="utf-8")
        show(name, results, console)
        if name == "planner" and out == report.RESULTS and any("rows" in one for one in results):
            planner_report.draw(results)
        console.print(f"kept in {path}\n", soft_wrap=True)


def environment(name: str, rounds: int | None) -> dict[str, Any]:
    """What a reader must know to judge the numbers."""
    return {
        "command": f"python -m bench {name}" + (f" --rounds {rounds}" if rounds else ""),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": processor_name(),
        "cores": available_cores(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def show(name: str, results: list[dict[str, Any]], console: Console) -> None:
    """Tables, then goals."""
    if name == "planner":
        for result in (one for one in results if "rows" in one):
            console.print(drawn(planner_report.plan_table(result)))
    table, goals = report.SHOWN[name]
    console.print(drawn(table(results)))
    for goal in goals(results):
        console.print(str(goal).replace("`", ""), style="green" if goal.met else "bold red", markup=False)


def drawn(table: report.Table) -> Drawn:
    """A table for the terminal."""
    made = Drawn(box=None, pad_edge=False, header_style="bold")
    for column, heading in enumerate(table.headings):
        made.add_column(heading, justify="left" if column < table.words else "right", no_wrap=True)
    for row in table.rows:
        made.add_row(*(cell.strip("`") for cell in row))
    return made


if __name__ == "__main__":
    sys.exit(main())
