"""``sheaf plan``: every plan worth pricing, ranked, with reasons."""

import gc
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sheaf.cli.answer import Answer, leads, note
from sheaf.cli.options import file_argument, json_option, workers_option
from sheaf.cli.show import described
from sheaf.errors import RunError
from sheaf.units import pretty_bytes, pretty_seconds

if TYPE_CHECKING:
    from sheaf.api.trial import TimeToLoss
    from sheaf.cluster import Cluster
    from sheaf.search import Progress, Ranking
    from sheaf.task import Task

_ROWS = 12  # a longer ranking is cut unless asked for
_REFUSALS = 8  # and so are reasons why plans were refused
_PICTURES = (".png", ".svg", ".pdf")
_NUMBERS, _REASON = 30, 20  # columns that a plan's numbers take, and that what it loses on needs


@click.command(short_help="Rank the plans for a task, with reasons.")
@file_argument
@workers_option
@click.option("--cluster", "source", metavar="C.toml|NAME",
              help="Plan for this cluster instead of this machine; `sheaf known` lists those that ship.")  # fmt: skip
@click.option("--allow-relaxed", is_flag=True, help="Also propose plans that do not compute the serial answer.")
@click.option("--what-if", "changes", metavar="CHANGES",
              help="Rank again with other figures, such as inter_node=10Gbit,workers=64,memory=x2.")  # fmt: skip
@click.option("--chart", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.png",
              help="Draw step time and cost against workers and bandwidths, one line per strategy.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(min=0), metavar="N",
              help="End the search after so many seconds, with the best so far.")  # fmt: skip
@click.option("--target-samples", type=click.IntRange(min=1), metavar="N",
              help="What training is to see in all, for its cost (price_per_hour in the cluster file).")  # fmt: skip
@click.option("--target-tokens", type=click.IntRange(min=1), metavar="N", help="The same in tokens.")
@click.option("--trial", type=click.Path(path_type=Path, file_okay=False, exists=True), metavar="DIR",
              help="Also rank by time to a loss: what `sheaf train --compare` left; with --allow-relaxed.")  # fmt: skip
@click.option("--target-loss", type=float, metavar="X", help="That loss (default: the trial's exact run's last).")
@click.option("--all", "everything", is_flag=True, help="Show every plan, and every reason for refusing one.")
@click.option("--fresh", is_flag=True, help="Measure this machine and the model again, even what was measured before.")
@json_option
def plan(
    file: str,
    workers: int | None,
    source: str | None,
    allow_relaxed: bool,
    changes: str | None,
    chart: Path | None,
    seconds: float | None,
    target_samples: int | None,
    target_tokens: int | None,
    trial: Path | None,
    target_loss: float | None,
    everything: bool,
    fresh: bool,
    as_json: bool,
) -> None:
    """Rank the plans for a task, with the step time and memory that each is expected to take, and why."""
    with Answer(as_json=as_json) as answer:
        _check_options(trial, target_loss, chart, seconds, allow_relaxed=allow_relaxed)
        from sheaf.api.measure import measure
        from sheaf.api.plan import plan as rank
        from sheaf.api.verdicts import sweeps, tokens_per_sample, what_if
        from sheaf.cli.files import load, own_source
        from sheaf.cluster import read
        from sheaf.search.change import parse

        task = load(file)
        gc.freeze()  # torch stays: looking for garbage in it takes a fifth of a long search
        to_loss = None if trial is None else _timed_by(trial, task, target_loss)
        note(f"the cluster: {source or 'this machine, measured'}")
        cluster = measure(workers, fresh=fresh) if source is None else read(source)
        if changes is not None:
            parse(changes, cluster)  # what is wrong with it is told before anything else is done
        target = target_samples or (-(-target_tokens // tokens_per_sample(task)) if target_tokens else 0)
        with _progress() as heard:
            ranking = rank(
                task,
                workers=workers,
                cluster=cluster,
                allow_relaxed=allow_relaxed,
                source=own_source(task, file),
                note=note,
                heard=heard,
                seconds=seconds,
                target_samples=target,
                fresh=fresh,
            )
        other = what_if(ranking, changes) if changes is not None else None
        drawn = None
        if chart is not None and ranking.ranked:
            from sheaf.watch.chart import draw_chart

            note("drawing: a search for every point")
            drawn = sweeps(ranking)
            draw_chart(drawn, chart, f"{Path(file.partition(':')[0]).stem} on {cluster.name}, batch {ranking.batch}")
        values = ranking.to_dict()
        learnt = None if to_loss is None else to_loss(ranking)
        if learnt is not None:
            values["to_loss"] = learnt.to_dict()
        if other is not None:
            values["what_if"] = {"changes": changes, **other.to_dict()}
        if drawn is not None:
            values["chart"] = {"file": str(chart), "sweeps": drawn}

        def shown(console: Console) -> None:
            rows = None if everything else _ROWS
            show(ranking, cluster, console, rows=rows)
            if other is not None:
                _say_what_if(ranking, other, changes or "", console, rows)
            if learnt is not None:
                _say_to_loss(learnt, console, rows)
            if drawn is not None:
                swept = ", ".join(one["figure"].removesuffix(", GB/s") for one in drawn)
                console.print(f"\nstrategies by {swept}: {chart}", markup=False, soft_wrap=True)

        answer.give(values, shown)


def _timed_by(trial: Path, task: "Task", target_loss: float | None) -> "Callable[[Ranking], TimeToLoss]":
    """What says of a ranking how long its plans take until the loss, by what a trial's runs have learnt."""
    from sheaf.api.trial import goal_of, read_trial, time_to_loss  # which draws: matplotlib takes long to import

    tried = read_trial(task, trial)
    goal = goal_of(tried, target_loss)
    return lambda ranking: time_to_loss(ranking, tried, goal)


@contextmanager
def _progress() -> "Iterator[Callable[[Progress], None] | None]":
    """Shows the best plan so far on a terminal's standard error while the block runs."""
    console = Console(stderr=True, highlight=False, quiet=not leads())
    if not console.is_terminal:
        yield None
        return
    with console.status("looking for plans") as status:

        def heard(progress: "Progress") -> None:
            if progress.best is not None:
                step = pretty_seconds(progress.best.step_seconds)
                status.update(f"best so far: {progress.best.plan}, {step}; {progress.priced} plans looked at")

        yield heard


def _say_what_if(before: "Ranking", after: "Ranking", changes: str, console: Console, rows: int | None) -> None:
    """The ranking with other figures, and where each plan was before."""
    console.print(Text.assemble("\n", (f"if {changes}", "bold")))
    if not after.ranked:
        console.print(_none_fits(after))
        return
    places = {str(entry.plan): (place, entry) for place, entry in enumerate(before.ranked, start=1)}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("plan", overflow="fold")
    for heading in ("step", "before", "place before"):
        table.add_column(heading, justify="right", no_wrap=True)
    for place, entry in enumerate(after.ranked[:rows]):
        was = places.get(str(entry.plan))
        table.add_row(
            Text(str(entry.plan)),
            pretty_seconds(entry.price.step_seconds),
            pretty_seconds(was[1].price.step_seconds) if was else "",
            str(was[0]) if was else "not there",
            style="bold green" if place == 0 else None,
        )
    console.print(table)
    old = before.ranked[0] if before.ranked else None
    new = after.ranked[0]
    if old is None or str(old.plan) != str(new.plan):
        than = f" in place of {old.plan}" if old is not None else ""
        console.print(f"{new.plan} leads{than}: {new.reason}", markup=False, soft_wrap=True)
    else:
        times = new.price.step_seconds / old.price.step_seconds
        console.print(f"{new.plan} leads as before, and takes {times:.2f} times as long", markup=False, soft_wrap=True)


def _check_options(
    trial: Path | None, target_loss: float | None, chart: Path | None, seconds: float | None, *, allow_relaxed: bool
) -> None:
    """Raise RunError with everything that is wrong with the options, before anything is read or measured."""
    broken = ["--target-loss needs --trial: how many steps a loss takes is seen in one"] * (
        trial is None and target_loss is not None
    )
    if trial is not None and not allow_relaxed:
        broken.append("--trial tells relaxed plans apart, and none is looked at: add --allow-relaxed")
    if seconds is not None and math.isnan(seconds):
        broken.append("--seconds nan is no number: give how long the search may take, such as 10")
    if chart is not None and chart.suffix.lower() not in _PICTURES:
        broken.append(f"--chart {chart}: a picture's name ends in {', '.join(_PICTURES)}")
    elif chart is not None and (why := _unwritable(chart)):
        broken.append(f"--chart {chart} cannot be written: {why}; choose another place")
    if broken:
        raise RunError("; ".join(broken))


def _unwritable(file: Path) -> str:
    """Why a file cannot be written there; empty where it can. Its folder is made, and a file that is there stays."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=file.parent):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _say_to_loss(learnt: "TimeToLoss", console: Console, rows: int | None) -> None:
    """Plans by time to a loss, and how many the trial says nothing of."""
    console.print(Text.assemble("\n", (f"to a loss of {learnt.loss:.4g}, by the steps of the trial", "bold")))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("plan", overflow="fold")
    for heading in ("to the loss", "steps"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("as in the trial", overflow="fold")
    for place, one in enumerate(learnt.plans[:rows]):
        reached = ("not reached", "") if one.seconds is None else (pretty_seconds(one.seconds), str(one.steps))
        table.add_row(Text(one.plan), *reached, Text(one.tried), style="bold green" if place == 0 else None)
    console.print(table)
    if learnt.untried:
        some = ", ".join(learnt.untried[:3]) + (" ..." if len(learnt.untried) > 3 else "")
        console.print(f"nothing is known of {len(learnt.untried)} relaxed plans that the trial has no like of: {some}",
                      style="dim", markup=False, soft_wrap=True)  # fmt: skip


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
        console.print(f"looked at {ranking.looked_at} plans in {pretty_seconds(ranking.seconds)}", style="dim")
        _say_busy(ranking, console)
        best = ranking.ranked[0]
        console.print(Text.assemble("\n", (str(best.plan), "bold green"), f" leads: {best.reason}"))
        if best.price.begins:
            console.print(f"its stages begin with {', '.join(best.price.begins)}", markup=False, soft_wrap=True)
        _say_why(ranking, console)
        _say_split(ranking, console)
        _say_cautions(ranking, rows, console)
    else:
        console.print(_none_fits(ranking), style="bold", soft_wrap=True)
    # The plans that would use most of what there is come first: those are the ones people ask about.
    refusals = sorted(ranking.refusals(), key=lambda refusal: -max(_workers(text) for text in refusal[2]))
    if refusals:
        console.print("\nrefused", style="bold")
    shown_refusals = refusals if rows is None else refusals[:_REFUSALS]
    for reason, remedy, plans in shown_refusals:
        shown = ", ".join(plans[:4]) + (f" and {len(plans) - 4} more" if len(plans) > 4 else "")
        _item(console, shown, f": {reason}", f"; {remedy}" if remedy else "")
    if len(refusals) > len(shown_refusals):
        more = sum(len(plans) for _, _, plans in refusals[len(shown_refusals) :])
        console.print(f"and {more} more plans; `sheaf plan --all` shows why each", style="dim")


def _item(console: Console, plan_text: str, words: str, remedy: str = "") -> None:
    """One of a list, plans whole in as many lines as they take: they are what users copy."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column()
    grid.add_column(overflow="fold")
    grid.add_row(Text("-"), Text.assemble((plan_text, "bold"), words, (remedy, "dim")))
    console.print(grid)


def _none_fits(ranking: "Ranking") -> str:
    if ranking.workers_needed:
        return f"no plan fits: {ranking.workers_needed} workers of this kind would do"
    return "no plan fits" + (", nor would one with a million workers of this kind" if ranking.starved else "")


def _say_busy(ranking: "Ranking", console: Console) -> None:
    """That other programs ran while times were measured, where they did, and what else shows it."""
    from sheaf.api.profiles import busy_words

    busy = busy_words(ranking.cores_taken)
    if not busy:
        return
    serial = _serial_seconds(ranking)
    if serial is not None and any(serial / one.price.step_seconds > one.plan.workers for one in ranking.ranked):
        busy += "; speeds above the number of workers come of that too, as one worker's threads wait for each other"
    console.print(busy, style="yellow", soft_wrap=True)


def _serial_seconds(ranking: "Ranking") -> float | None:
    """What a step takes one worker, of which ``speed`` is a multiple; None where that is not ranked."""
    alone = (one for one in ranking.ranked if one.plan.serial and one.plan.offload == "none")
    return next((entry.price.step_seconds for entry in alone), None)


def _say_why(ranking: "Ranking", console: Console) -> None:
    """What the best plan's time is made of, what would make others win, and what it costs."""
    found, money = ranking.explanation, ranking.costs
    if ranking.least_seconds is not None:
        least = pretty_seconds(ranking.least_seconds)
        console.print(f"the search was ended: no plan that was left out takes less than {least}", soft_wrap=True)
    for line in found.lines if found is not None else ():
        console.print(line, markup=False, soft_wrap=True)
    if found is not None and found.needed:
        console.print("\nwhat it would take for others to win", style="bold")
        for one in found.needed:
            _item(console, one.plan, f": {one.words}")
    if money is not None:
        text = str(ranking.ranked[0].plan)
        said = f"{money.per_hour[text]:.2f} {money.currency} per hour, {money.per_step[text]:.3g} per step"
        if money.to_target is not None:
            said += f", {money.to_target[text]:.4g} for {money.target} samples in {money.steps} steps"
        console.print(f"\n{text} costs {said}", markup=False, soft_wrap=True)


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
        _item(console, plan_text, f": {caution}")


def _workers(text: str) -> int:
    """How many workers a plan's text asks for."""
    return math.prod(int(number) for number in re.findall(r"\b(?:dp|tp|pp|cp)=(\d+)", text))


def _table(ranking: "Ranking", rows: int | None, width: int) -> Table:
    """The plans as rows; beside long ones there is no room for what they lose on, which then stands below."""
    serial = _serial_seconds(ranking)
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
        last = () if below else (Text(entry.loses_on),)
        table.add_row(Text.assemble(str(entry.plan), reason), *numbers, *last, style=style)
    return table
