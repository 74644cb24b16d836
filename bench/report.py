"""What the measurements say: rows for tables, goals met or not, and markdown for the README."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sheaf.units import pretty_seconds

RESULTS = Path(__file__).parent / "results"
NAMES = ("executors", "planner")

# (Sheaf's plan, its peer): the least ratio of throughputs that is wanted
GOALS = {("serial", "hand-written loop"): 0.99, ("dp=2", "DDP"): 0.98, ("dp=2,zero=3", "fully_shard"): 0.98}
AIM = {("dp=2,zero=3", "fully_shard"): 1.2}  # on gloo
MOST_ERROR, MOST_REGRET = 0.15, 0.05


@dataclass(frozen=True)
class Goal:
    """One goal, what was found, and whether that is enough."""

    text: str
    found: str
    met: bool

    def __str__(self) -> str:
        return f"{'met' if self.met else 'NOT met'}: {self.text}; found {self.found}"


@dataclass(frozen=True)
class Table:
    """Headings and rows of text; the first ``words`` columns are words, the others numbers."""

    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    words: int = 1

    def markdown(self) -> str:
        """The table as GitHub shows it."""
        rule = ["---" if column < self.words else "---:" for column in range(len(self.headings))]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (self.headings, rule, *self.rows))


def executor_table(results: Sequence[dict[str, Any]]) -> Table:
    """Each plan beside its peer: the ratio of throughputs, round by round, and both step times."""
    rows = [
        (
            f"`{one['sheaf']}`",
            one["peer"],
            f"{one['median']:.3f}",
            f"{one['low']:.3f} to {one['high']:.3f}",
            pretty_seconds(one["sheaf_seconds"]),
            pretty_seconds(one["peer_seconds"]),
        )
        for one in results
    ]
    headings = ("Sheaf", "beside", "throughput ratio", "quartiles", "Sheaf, per step", "peer, per step")
    return Table(headings, rows, words=2)


def executor_goals(results: Sequence[dict[str, Any]]) -> list[Goal]:
    """The goals of throughput, judged by the median over rounds."""
    found = {(one["sheaf"], one["peer"]): one["median"] for one in results}
    goals: list[Goal] = []
    for pair, least in GOALS.items():
        if pair in found:
            plan, peer = pair
            text = f"`{plan}` at least {least:g} times the throughput of {peer}"
            goals.append(Goal(text, f"{found[pair]:.3f}", found[pair] >= least))
    for pair, least in AIM.items():
        if pair in found:
            text = f"`{pair[0]}` aims at {least:g} times {pair[1]} on gloo"
            goals.append(Goal(text, f"{found[pair]:.3f}", found[pair] >= least))
    return goals


def planner_table(results: Sequence[dict[str, Any]]) -> Table:
    """For each task: how far predictions were off, and what the planner's first choice costs."""
    rows = [
        (
            one["task"],
            f"`{one['first_choice']}`",
            f"`{one['fastest']}`",
            f"{one['regret']:.1%}",
            f"{one['median_error']:.1%}",
            str(len(one["rows"])),
        )
        for one in results
    ]
    headings = ("task", "planner's first", "fastest measured", "first is slower by", "median error", "plans measured")
    return Table(headings, rows, words=3)


def plan_table(result: dict[str, Any]) -> Table:
    """Every plan of one task: predicted and measured step time."""
    rows = [
        (
            f"`{row['plan']}`",
            pretty_seconds(row["predicted_seconds"]),
            pretty_seconds(row["measured_seconds"]),
            f"{row['error']:+.0%}",
        )
        for row in sorted(result["rows"], key=lambda row: row["measured_seconds"])
    ]
    return Table((result["task"], "predicted", "measured (median)", "error"), rows)


def planner_goals(results: Sequence[dict[str, Any]]) -> list[Goal]:
    """The goals of the planner: the median error over all plans of all tasks, and the first choice of every task."""
    errors = [abs(row["error"]) for one in results for row in one["rows"]]
    if not errors:
        return []
    low, median, high = statistics.quantiles(errors, n=4) if len(errors) > 1 else errors * 3
    near = [one["task"] for one in results if one["regret"] <= MOST_REGRET]
    return [
        Goal(
            f"median error of predicted step times at most {MOST_ERROR:.0%}",
            f"{median:.1%} (quartiles {low:.1%} to {high:.1%}, {len(errors)} plans)",
            median <= MOST_ERROR,
        ),
        Goal(
            f"the planner's first plan within {MOST_REGRET:.0%} of the fastest measured",
            f"for {len(near)} of {len(results)} tasks",
            len(near) == len(results),
        ),
    ]


def measured_on(environment: dict[str, Any]) -> str:
    """Where, when and how, in a sentence."""
    load = ", ".join(f"{value:.2f}" for value in environment["load_average"])
    return (
        f"Measured on {environment['date']} by `{environment['command']}`: {environment['cores']} cores of "
        f"{environment['processor']}, torch {environment['torch']}, Python {environment['python']}; "
        f"load average at the start {load}."
    )


def read(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """The results of one benchmark, or None where it has not been run."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def section(name: str, folder: Path = RESULTS) -> str:
    """One benchmark as markdown: its table, its goals, and where it was measured; or how to measure it."""
    found = read(name, folder)
    if found is None:
        return (
            f"Not measured yet: `python -m bench {name}` writes `bench/results/{name}.json`, `make docs` this section."
        )
    table, goals = (
        (executor_table, executor_goals) if name == "executors" else (planner_table, planner_goals)
    )  # fmt: skip
    lines = [f"- {goal}." for goal in goals(found["results"])]
    return "\n\n".join([table(found["results"]).markdown(), "\n".join(lines), measured_on(found["environment"])])
