"""What `bench/planner.py` found: a row for each task and network, goals, errors by term, and a picture."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import scatter
from bench.tables import Goal, Table
from sheaf.units import pretty_seconds

MOST_ERROR, MOST_REGRET = 0.08, 0.03
LEAST_TASKS, LEAST_PLANS, LEAST_NETWORKS = 8, 12, 3
HERE = "loopback"
PICTURE = Path(__file__).parent.parent / "docs" / "pictures" / "planner.png"
SECONDS_SHOWN = 3e-4  # of a step, below which a term is of no interest

Results = Sequence[dict[str, Any]]


def planner_table(results: Results) -> Table:
    """A row for each task and network."""
    rows = [
        (
            one["task"],
            one.get("network", HERE),
            f"`{one['first_choice']}`",
            f"`{one['fastest']}`",
            str(len(one["rows"])),
            f"{one['median_error']:.1%}",
            f"{one['regret']:.1%}",
        )
        for one in results
        if "rows" in one
    ]
    headings = ("task", "network", "first choice", "fastest", "plans", "median error", "first choice slower by")
    return Table(headings, rows, words=4)


def plan_table(result: dict[str, Any]) -> Table:
    """Every plan of one task on one network: predicted and measured step time, and each term of both in ms."""
    rows = [
        (
            f"`{row['plan']}`",
            pretty_seconds(row["predicted_seconds"]),
            pretty_seconds(row["measured_seconds"]),
            f"{row['error']:+.0%}",
            ", ".join(
                f"{term} {predicted * 1e3:.0f}:{measured * 1e3:.0f}"
                for term, (predicted, measured) in row["terms"].items()
                if predicted + measured > 2 * SECONDS_SHOWN
            ),
        )
        for row in sorted(result["rows"], key=lambda row: row["measured_seconds"])
    ]
    name = f"{result['task']}, {result.get('network', HERE)}"
    return Table((name, "predicted", "measured (median)", "error", "ms predicted:measured"), rows)


def term_table(results: Results) -> Table:
    """By the term that takes most of a step as it was measured: how far off the steps are, and the term itself."""
    steps: dict[str, list[float]] = defaultdict(list)
    terms: dict[str, list[float]] = defaultdict(list)
    for row in _rows(results):
        if not row.get("terms"):
            continue
        most = max(row["terms"], key=lambda term: row["terms"][term][1])
        predicted, measured = row["terms"][most]
        steps[most].append(row["error"])
        terms[most].append((predicted - measured) / row["measured_seconds"])
    rows = [
        (
            term,
            str(len(off)),
            f"{statistics.median(map(abs, off)):.1%}",
            f"{statistics.median(off):+.1%}",
            f"{statistics.median(terms[term]):+.1%}",
        )
        for term, off in sorted(steps.items(), key=lambda item: -len(item[1]))
    ]
    headings = (
        "term that takes most of the step",
        "steps",
        "median error of the step",
        "its bias",
        "of which by that term",
    )
    return Table(headings, rows)


def planner_goals(results: Results) -> list[Goal]:
    """The goals of the planner, over all tasks and on each network, and what was left out."""
    cells = [one for one in results if "rows" in one]
    if not cells:
        return []
    tasks = {one["task"] for one in cells}
    by_network: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in cells:
        by_network[one.get("network", HERE)].append(one)
    fewest = min(len(one["rows"]) for one in cells)
    counted = len(tasks) >= LEAST_TASKS and fewest >= LEAST_PLANS and len(by_network) >= LEAST_NETWORKS
    whole = counted and len(cells) == len(tasks) * len(by_network)
    goals = [
        Goal(
            f"{LEAST_TASKS} tasks, {LEAST_PLANS} plans of each on {LEAST_NETWORKS} networks",
            f"{len(tasks)} tasks, at least {fewest} plans of each, {len(by_network)} networks, {_left_out(results)}",
            whole,
        ),
        *_judged(cells, "all networks" if len(by_network) > 1 else "this network"),
    ]
    if len(by_network) > 1:
        goals += [goal for network, some in by_network.items() for goal in _judged(some, network)]
    return goals


def _judged(cells: Results, where: str) -> list[Goal]:
    errors = [abs(row["error"]) for row in _rows(cells)]
    low, median, high = statistics.quantiles(errors, n=4) if len(errors) > 1 else errors * 3
    regrets = [one["regret"] for one in cells]
    near = sum(regret <= MOST_REGRET for regret in regrets)
    worst = max(cells, key=lambda one: one["median_error"])
    of_all = f"quartiles {low:.1%} to {high:.1%}, {len(errors)} steps"
    return [
        Goal(
            f"{where}: median error of predicted step times at most {MOST_ERROR:.0%}",
            f"{median:.1%} ({of_all}; at worst {worst['median_error']:.1%}, of {worst['task']})",
            median <= MOST_ERROR,
        ),
        Goal(
            f"{where}: the planner's first exact plan at most {MOST_REGRET:.0%} slower than the fastest, on average",
            f"{statistics.fmean(regrets):.1%}; within {MOST_REGRET:.0%} in {near} of {len(regrets)} cases, "
            f"{max(regrets):.1%} at worst",
            statistics.fmean(regrets) <= MOST_REGRET,
        ),
    ]


def _left_out(results: Results) -> str:
    told = [
        f"{' on '.join(part for part in (one.get('task'), one.get('network')) if part)} left out "
        f"({one['left_out'].splitlines()[-1]})"
        for one in results
        if "left_out" in one
    ]
    return "; ".join(told) or "nothing left out"


def draw(results: Results, path: Path = PICTURE) -> None:
    """Predicted against measured step times, and their errors by the term that takes most of the step."""
    by_term: dict[str, list[float]] = defaultdict(list)
    groups: list[scatter.Group] = []
    for number, network in enumerate(dict.fromkeys(one.get("network", HERE) for one in results if "rows" in one)):
        rows = list(_rows(one for one in results if one.get("network", HERE) == network))
        measured, predicted = ([row[f"{which}_seconds"] for row in rows] for which in ("measured", "predicted"))
        groups.append(scatter.Group(network, measured, predicted, color=f"C{number}", marker="os^Dv"[number % 5]))
        for row in rows:
            by_term[max(row["terms"], key=lambda term: row["terms"][term][1])].append(row["error"])
    scatter.draw(groups, by_term, path, predicted="predicted, seconds per step", size=14, legend={}, within=MOST_ERROR)


def _rows(results: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    return (row for one in results if "rows" in one for row in one["rows"])
