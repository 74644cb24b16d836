"""``sheaf plan``: every plan worth pricing, ranked, with reasons."""

import math
import re
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sheaf.cli.answer import Answer, note
from sheaf.cli.options import file_argument, json_option, workers_option
from sheaf.cli.show import described
from sheaf.units import pretty_bytes, pretty_seconds

if TYPE_CHECKING:
    from sheaf.cluster import Cluster
    from sheaf.search import Ranking

_ROWS = 12  # a longer ranking is cut unless asked for
_REFUSALS = 8  # and so are reasons why plans were refused
_NUMBERS, _REASON = 30, 20  # columns that a plan's numbers take, and that what it loses on needs


@click.command(short_help="Rank the plans for a task, with reasons.")
@file_argument
@workers_option
@click.option("--cluster", "source", metavar="C.toml|NAME", help="Plan for this cluster instead of this machine.")
@click.option("--allow-relaxed", is_flag=True, help="Also propose plans that do not compute the serial answer.")
@click.option("--all", "everything", is_flag=True, help="Show every plan, and every reason for refusing one.")
@json_option
def plan(
    file: str, workers: int | None, source: str | None, allow_relaxed: bool, everything: bool, as_json: bool
) -> None:
    """Rank the plans for a task, with the step time and memory that each is expected to take, and why."""
    with Answer(as_json=as_json) as answer:
        from sheaf.api.measure import measure
        from sheaf.api.plan import plan as rank
        from sheaf.cli.files import load, own_source
        from sheaf.cluster import read

        task = load(file)
        note(f"the cluster: {source or 'this machine, measured'}")
        cluster = measure(workers) if source is None else read(source)
        ranking = rank(
            task,
            workers=workers,
            cluster=cluster,
            allow_relaxed=allow_relaxed,
            source=own_source(task, file),
            note=note,
        )
        answer.give(
            ranking.to_dict(), lambda console: show(ranking, cluster, console, rows=None if everything else _ROWS)
        )


def show(ranking: "Ranking", cluster: "Cluster | None", console: Console, *, rows: int | None = _ROWS) -> None:
    """Print the cluster, the table, the winner's reason, and the refused plans; at most ``rows`` plans."""
    if cluster is not None:
        console.print("\n".join(described(cluster)), markup=False, soft_wrap=True)
        console.print()
    if ranking.ranked:
        console.print(_table(ranking, rows, console.width))
        hidden = len(ranking.ranked) - rows if rows is not None else 0
        if hidden > 0:
            console.print(f"and {hidden} more; `sheaf plan --all` shows every one", style="dim")
        best = ranking.ranked[0]
        console.print(Text.assemble("\n", (str(best.plan), "bold green"), f" leads: {best.reason}"))
        _say_split(ranking, console)
        _say_cautions(ranking, rows, console)
    # The plans that would use most of what there is come first: those are the ones people ask about.
    refusals = sorted(ranking.refusals(), key=lambda refusal: -max(_workers(text) for text in refusal[2]))
    if refusals:
        console.print("\nrefused", style="bold")
    shown_refusals = refusals if rows is None else refusals[:_REFUSALS]
    for reason, remedy, plans in shown_refusals:
        shown = ", ".join(plans[:4]) + (f" and {len(plans) - 4} more" if len(plans) > 4 else "")
        grid = Table.grid(padding=(0, 1))
        grid.add_row(Text("-"), Text.assemble((shown, "bold"), f": {reason}", (f"; {remedy}" if remedy else "", "dim")))
        console.print(grid)
    if len(refusals) > len(shown_refusals):
        more = sum(len(plans) for _, _, plans in refusals[len(shown_refusals) :])
        console.print(f"and {more} more plans; `sheaf plan --all` shows why each", style="dim")


def _say_split(ranking: "Ranking", console: Console) -> None:
    """What the first plan that splits layers splits and gathers."""
    from sheaf.api.splits import told

    for entry in ranking.ranked:
        split = ranking.split(entry.plan)
        if split is not None:
            lines = told(split)
            console.print(Text.assemble("\n", (str(entry.plan), "bold"), f": {lines[0]}"))
            for line in lines[1:]:
                console.print(Text(f"  {line}"))
            return


def _say_cautions(ranking: "Ranking", rows: int | None, console: Console) -> None:
    """What is known of the relaxed plans that are shown."""
    found: dict[str, str] = {}
    for entry in ranking.ranked[:rows]:
        if entry.caution:
            found.setdefault(entry.caution, str(entry.plan))
    if found:
        console.print("\nrelaxed: these do not compute the serial answer", style="bold")
    for caution, plan_text in found.items():
        grid = Table.grid(padding=(0, 1))
        grid.add_row(Text("-"), Text.assemble((plan_text, "bold"), f": {caution}"))
        console.print(grid)


def _workers(text: str) -> int:
    """How many workers a plan's text asks for."""
    return math.prod(int(number) for number in re.findall(r"\b(?:dp|tp|pp|cp)=(\d+)", text))


def _table(ranking: "Ranking", rows: int | None, width: int) -> Table:
    """The plans as rows; beside long ones there is no room for what they lose on, which then stands below."""
    serial = next((entry.price.step_seconds for entry in ranking.ranked if entry.plan.serial), None)
    shown = ranking.ranked[:rows]
    below = max(len(str(entry.plan)) for entry in shown) > width - _NUMBERS - _REASON
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("plan", no_wrap=not below, overflow="fold")  # whole: it is what users copy
    for heading in ("step", "speed", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    if not below:
        table.add_column("loses on", min_width=_REASON)
    for place, entry in enumerate(shown):
        speed = "" if serial is None else f"{serial / entry.price.step_seconds:.2f}x"
        style = "bold green" if place == 0 else None
        reason = Text(f"\n  {entry.loses_on}" if below and entry.loses_on else "", "dim")
        numbers = (pretty_seconds(entry.price.step_seconds), speed, pretty_bytes(entry.price.peak_bytes))
        last = () if below else (entry.loses_on,)
        table.add_row(Text.assemble(str(entry.plan), reason), *numbers, *last, style=style)
    return table
