"""All that the planner's benchmark measured, kept, so that its plans can be predicted again without measuring again.

`python -m bench.planner_kept [NAME ...]` does so for the tasks and networks that are named (all unless some are) and
says how far off predictions are, as they were kept and as they are now. Nothing is written: `python -m bench planner`
writes.
"""

import json
import statistics
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import report
from bench.planner_pair import allowed, cluster_file, judged, predicted, splits_from
from bench.planner_tasks import made
from sheaf.api.heard import Heard, question_from
from sheaf.cli.answer import console
from sheaf.cluster import read
from sheaf.graph import trace
from sheaf.plans import Plan

FOLDER = Path(__file__).parent / "measured" / "planner"
HEARD = "heard.jsonl"  # beside the clusters' files: a line for each task, network and number of workers

Results = Sequence[dict[str, Any]]


def keep(results: Results, folder: Path = FOLDER) -> None:
    """Take what was heard out of the results into ``folder``; what is there of other networks stays."""
    lines = [
        {"task": one["task"], "network": one["network"], **heard} for one in results for heard in one.pop("heard", ())
    ]
    again = {line["network"] for line in lines}
    folder.mkdir(parents=True, exist_ok=True)
    for line in lines:
        (folder / cluster_file(line["network"], line["workers"])).write_text(line.pop("cluster"), encoding="utf-8")
    lines = [line for line in _lines(folder) if line["network"] not in again] + lines
    (folder / HEARD).write_text("".join(f"{_compact(line)}\n" for line in lines), encoding="utf-8")


def predicted_again(results: Results, folder: Path = FOLDER, only: Collection[str] = ()) -> list[dict[str, Any]]:
    """The results of those tasks and networks of which all was kept, with what is predicted now."""
    found: list[dict[str, Any]] = []
    lines = _lines(folder)
    for one in results:
        if only and not ({one.get("task"), one["network"]} & set(only)):
            continue
        mine = [line for line in lines if (line["task"], line["network"]) == (one.get("task"), one["network"])]
        if "rows" in one and mine:
            prices = {text: price for line in mine for text, price in _prices(line, folder).items()}
            rows = [predicted(row, prices[row["plan"]]) for row in one["rows"] if row["plan"] in prices]
            found.append({**one, **judged(rows)})
    return found


def _prices(line: dict[str, Any], folder: Path) -> dict[str, Any]:
    task = made(line["task"])
    facts = trace(task, task.microbatch or task.batch)
    legal, splits, _ = allowed(task, facts, tuple(line["plans"]))
    cluster = read(folder / cluster_file(line["network"], line["workers"]))
    question = question_from(task, facts, cluster, Heard.from_dict(line), splits_from(splits))
    return {text: question.price(Plan.parse(text)) for text in legal}


def _lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / HEARD
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _compact(line: dict[str, Any]) -> str:
    return json.dumps(line, separators=(",", ":"))


def main(names: Sequence[str]) -> None:
    """Print errors and regrets, as they were kept and as they are now."""
    kept = report.read("planner")
    before = kept["results"] if kept else []
    table = Table(box=None)
    for heading in ("task", "network", "median error", "now", "first choice slower by", "now"):
        table.add_column(heading, justify="right")
    both = [(_kept(before, one), one) for one in predicted_again(before, only=names)]
    if not both:
        what = ", ".join(names) or "any task"
        sys.exit(f"nothing was kept of {what}: `python -m bench planner` keeps what it measures in {FOLDER}")
    for old, new in both:
        cells = (f"{one[what]:.1%}" for what in ("median_error", "regret") for one in (old, new))
        table.add_row(new["task"], new["network"], *cells)
    for network in dict.fromkeys(["", *(new["network"] for _, new in both)]):
        some = [pair for pair in both if network in ("", pair[1]["network"])]
        errors = [
            statistics.median(abs(row["error"]) for pair in some for row in pair[which]["rows"]) for which in (0, 1)
        ]
        regrets = [statistics.fmean(pair[which]["regret"] for pair in some) for which in (0, 1)]
        table.add_row("all", network, *(f"{value:.1%}" for value in (*errors, *regrets)))
    console().print(table)


def _kept(results: Results, one: dict[str, Any]) -> dict[str, Any]:
    return next(other for other in results if (other.get("task"), other["network"]) == (one["task"], one["network"]))


if __name__ == "__main__":
    main(sys.argv[1:])
