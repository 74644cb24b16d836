"""`python -m bench [NAME ...]`: measures, prints tables, says which goals are met, and keeps the numbers.

Run it on a machine that does nothing else: contenders are interleaved, so that noise meets all of them, but a busy
machine still widens the quartiles. `make docs` puts the numbers that are kept into the README.
"""

import importlib
import json
import os
import platform
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table as Drawn

from bench import planner_kept, planner_report, report
from bench.planner import NETWORKS
from sheaf.cli import answer
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
@click.option(
    "--network", "networks", type=click.Choice(NETWORKS), multiple=True,
    help="Of planner: measure this again; what was kept of others stays.",
)  # fmt: skip
def main(names: tuple[str, ...], rounds: int | None, out: Path, networks: tuple[str, ...]) -> None:
    """Measure Sheaf beside its peers, and the planner beside the clock (all, unless some are named)."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that hosts are taken down again
    console = answer.console()
    if networks and names != ("planner",):
        raise click.UsageError("--network is an option of `python -m bench planner` alone")
    for name in names or report.NAMES:
        where = environment(name, rounds, networks)
        if where["load_average"][0] > QUIET:
            console.print(
                f"load average {where['load_average'][0]:.2f}: something else is running here", style="yellow"
            )
        console.print(f"measuring {name} ...")
        run = importlib.import_module(f"bench.{name}").run
        results = run(
            **({} if rounds is None else {ROUNDS[name]: rounds}), **({"networks": networks} if networks else {})
        )
        if name == "planner":
            planner_kept.keep(results, planner_kept.FOLDER if out == report.RESULTS else out / name)
        if any("skipped" in one for one in results):  # what was measured elsewhere stays
            show(name, results, console)
            continue
        if networks:
            results, where = beside_kept(results, where, report.read(name, out))
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{name}.json"
        path.write_text(json.dumps({"environment": where, "results": results}, indent=1) + "\n", encoding="utf-8")
        show(name, results, console)
        if name == "planner" and out == report.RESULTS and any("rows" in one for one in results):
            planner_report.draw(results)
        console.print(f"kept in {path}\n", soft_wrap=True)


def beside_kept(
    results: list[dict[str, Any]], where: dict[str, Any], kept: dict[str, Any] | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Results of some networks, with those that are kept of others; and where both were measured."""
    if kept is None:
        return results, where
    again = {one["network"] for one in results}
    whole = [*(one for one in kept["results"] if one["network"] not in again), *results]
    by = f"{kept['environment']['command']}` and {', '.join(sorted(again))} again by `{where['command']}"
    return sorted(whole, key=lambda one: NETWORKS.index(one["network"])), where | {"command": by}


def environment(name: str, rounds: int | None, networks: Sequence[str] = ()) -> dict[str, Any]:
    """What a reader must know to judge the numbers."""
    chosen = "".join(f" --network {network}" for network in networks)
    return {
        "command": f"python -m bench {name}" + (f" --rounds {rounds}" if rounds else "") + chosen,
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
