"""``sheaf measure``: what this machine's workers and links can do."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from sheaf.cli.answer import Answer
from sheaf.cli.options import json_option, workers_option
from sheaf.cli.show import described
from sheaf.units import pretty_bytes, pretty_seconds

if TYPE_CHECKING:
    from sheaf.cluster import Cluster


@click.command(short_help="Measure this machine's workers and links.")
@workers_option
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write a cluster file.")
@click.option("--quick", is_flag=True, help="Fewer and smaller messages, in a third of the time.")
@click.option("--fresh", is_flag=True, help="Measure again, even what was measured before.")
@click.option(
    "--from-run", type=click.Path(path_type=Path, file_okay=False, exists=True), metavar="DIRECTORY",
    help="Put what was measured right by a run of this machine: what it took beside what was predicted.",
)  # fmt: skip
@json_option
def measure(
    workers: int | None, out: Path | None, quick: bool, fresh: bool, from_run: Path | None, as_json: bool
) -> None:
    """Measure this machine: matrix and memory rates of each worker, time of each collective between them.

    Started by torchrun, on one machine or several, it measures the workers that are there and the links between them.
    """
    with Answer(as_json=as_json) as answer:
        from sheaf import launch
        from sheaf.api.measure import measure as run
        from sheaf.api.measure import measure_here

        if from_run is not None:
            _put_right(answer, from_run, out)
            return
        world = launch.join()
        if world is None:
            cluster = run(workers, out=out, quick=quick, fresh=fresh)
        else:
            cluster = measure_here(out=out, quick=quick)
            if world.rank:
                return

        def show(console: Console) -> None:
            console.print("\n".join(described(cluster)), markup=False, soft_wrap=True)
            if cluster.intra.timings:
                console.print(_timings(cluster))
            if out is not None:
                console.print(f"written to {out}; plan for it with --cluster {out}", markup=False, soft_wrap=True)

        answer.give(asdict(cluster), show)


def _put_right(answer: Answer, directory: Path, out: Path | None) -> None:
    from sheaf.api.feedback import from_run

    cluster, changes = from_run(directory, out=out)

    def show(console: Console) -> None:
        console.print("\n".join(described(cluster)), markup=False, soft_wrap=True)
        table = Table(title=f"put right by {directory}", title_justify="left", box=None)
        for heading in ("figure", "before", "now"):
            table.add_column(heading, justify="left" if heading == "figure" else "right")
        for change in changes:
            table.add_row(change.figure, f"{change.before:.4g}", f"{change.after:.4g}")
        same = f"nothing changed: {directory} shows no other figures of links, overlap, host or speeds than these"
        console.print(table if changes else same, markup=False, soft_wrap=not changes)
        if out is not None:
            console.print(f"written to {out}; plan for it with --cluster {out}", markup=False, soft_wrap=True)

    answer.give({**asdict(cluster), "changes": [asdict(change) for change in changes]}, show)


def _timings(cluster: "Cluster") -> Table:
    """Seconds of each collective by size, for the largest number of workers that was measured."""
    workers = max(timing.workers for timing in cluster.intra.timings)
    chosen = [timing for timing in cluster.intra.timings if timing.workers == workers]
    operations = list(dict.fromkeys(timing.operation for timing in chosen))
    seconds = {(timing.operation, timing.size_bytes): timing.seconds for timing in chosen}
    table = Table(title=f"collectives of {workers} workers, as measured", title_justify="left", box=None)
    table.add_column("size", justify="right")
    for operation in operations:
        table.add_column(operation, justify="right")
    for size_bytes in sorted({timing.size_bytes for timing in chosen}):
        found = (seconds.get((operation, size_bytes)) for operation in operations)
        table.add_row(pretty_bytes(size_bytes), *("" if each is None else pretty_seconds(each) for each in found))
    return table
