"""One task on one network: workers measure themselves, run every plan in turn, and predict it from what they measured.

What disturbs one plan disturbs all. Blocks are measured before the runs and after them, as the machine is not always as
fast; no prediction sees how long a plan took. The workers are there already: of the loopback, or of hosts.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.company import Company
from bench.planner_tasks import ALONE, CASES, EQUAL, FOURS, PAIRS, UNEQUAL, made
from sheaf import Plan, Task
from sheaf.api.here import measured_again, question_here
from sheaf.api.measure import measure_here
from sheaf.api.splits import rehearsed
from sheaf.checkpoint import from_first
from sheaf.cluster import Cluster, available_cores, read, write
from sheaf.cost.price import Price
from sheaf.errors import SheafError
from sheaf.graph import ModelFacts, trace
from sheaf.parallel import build, refuse  # sheaf.build joins the workers that the environment names
from sheaf.plans.split import SplitFacts
from sheaf.record import StepReport
from sheaf.watch.picture import as_measured

LOOPBACK = "loopback"
STEPS = 4  # at most in a round: weights that meet every fourth step meet once
WARM_UP = 2
MEASURING_SECONDS = 1.5  # before the runs, and after them
ROUND_SECONDS = 0.25  # of one plan, as far as whole steps allow

Spent = dict[str, float]


def compare(name: str, network: str, rounds: int, folder: Path) -> dict[str, Any]:
    """What one task's plans were predicted to take on the workers that are here, and what they took (collective).

    ``folder`` holds the clusters that were measured with earlier tasks, and those that are measured now.
    """
    company, task = Company(), made(name)
    pairs = PAIRS + CASES[name].own + (EQUAL if network == LOOPBACK else UNEQUAL)
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    spent: Spent = {}
    for workers, plans in ((1, ALONE), (2, pairs), (4, FOURS)):
        if workers > company.workers:
            continue
        with company.of(workers) as mine:
            if mine:
                torch.set_num_threads(max(1, available_cores() // workers) if network == LOOPBACK else 1)
                file = folder / f"{network}-{workers}.toml"
                rows += together(task, plans, rounds, file, left_out, spent)
    return {"task": name, "network": network, **judged(rows), "plans_left_out": left_out, "spent_seconds": spent}


def together(
    task: Task, plans: tuple[str, ...], rounds: int, file: Path, left_out: dict[str, str], spent: Spent
) -> list[dict[str, Any]]:
    """A row for each plan of as many workers as are here (collective)."""
    with counted(spent, "tracing"):
        facts = trace(task, task.microbatch or task.batch)
        legal, splits, refused = from_first(lambda: list(allowed(task, facts, plans)))
        left_out |= refused
    with counted(spent, "measuring workers"):
        cluster = known(file)
    with counted(spent, "measuring blocks and executors"):
        question = question_here(
            task,
            facts,
            cluster=cluster,
            splits={tuple(key): SplitFacts.from_dict(values) for key, values in splits},
            plans=[Plan.parse(text) for text in legal],
            budget_seconds=MEASURING_SECONDS,
        )
    with counted(spent, "running"):
        reports = run_in_turn(task, legal, rounds)
    with counted(spent, "measuring blocks again"):
        question = measured_again(question, task, budget_seconds=MEASURING_SECONDS)
    prices = {text: question.price(Plan.parse(text)) for text in legal}
    return [row(text, prices[text], reports[text]) for text in legal]


def run_in_turn(task: Task, plans: Sequence[str], rounds: int) -> dict[str, list[list[StepReport]]]:
    """Reports of each plan's steps, by round (collective).

    A round of a plan has as many steps as fit into ``ROUND_SECONDS``, from one to ``STEPS``; of weights that meet now
    and then as many as from one meeting to the next.
    """
    steps = {text: build(task, Plan.parse(text)) for text in plans}
    reports: dict[str, list[list[StepReport]]] = {text: [] for text in plans}
    counts: dict[str, int] = {}
    for text, step in steps.items():
        every = Plan.parse(text).meets_locally.every
        seconds = [step().seconds for _ in range(every or WARM_UP)]
        counts[text] = every or max(1, min(STEPS, int(ROUND_SECONDS / largest(min(seconds)))))
    names = list(steps)
    for turn in range(rounds):
        for text in names[turn % len(names) :] + names[: turn % len(names)]:
            if dist.is_initialized():
                dist.barrier()
            reports[text].append([steps[text]() for _ in range(counts[text])])
    for step in steps.values():
        step.close()
    return reports


def largest(seconds: float) -> float:
    """The most that any worker found (collective)."""
    found = torch.tensor(seconds, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def known(file: Path) -> Cluster:
    """The workers that are here as a cluster: measured with an earlier task, or now."""
    if from_first(file.exists):
        return read(file)
    found = measure_here()
    from_first(lambda: write(found, file))
    return read(file)


def allowed(task: Task, facts: ModelFacts, plans: tuple[str, ...]) -> tuple[list[str], list[Any], dict[str, str]]:
    """The plans that can run the task, how they split its layers, and why the others cannot.

    Replicas alone always can.
    """
    legal: list[str] = []
    splits: dict[tuple[int, int], Any] = {}
    refused: dict[str, str] = {}
    for text in plans:
        plan = Plan.parse(text)
        if plan.tp * plan.cp * plan.pp > 1 or plan.by_parts:
            try:
                split = rehearsed(task, facts, *plan.split_kind) if plan.cp > 1 else refuse(task, plan)
            except SheafError as error:
                refused[text] = str(error).splitlines()[0]
                continue
            if split is not None:
                splits.setdefault(plan.split_kind, split.to_dict())
        legal.append(text)
    return legal, [[list(kind), values] for kind, values in splits.items()], refused


def row(text: str, price: Price, rounds: list[list[StepReport]]) -> dict[str, Any]:
    """Predicted and measured, whole and by term; the median over rounds of the mean over a round's steps."""
    seconds = [statistics.fmean(report.seconds for report in reports) for reports in rounds]
    predicted = as_measured(price.seconds)
    terms = {
        term: statistics.median(statistics.fmean(one.terms.get(term, 0.0) for one in reports) for reports in rounds)
        for term in rounds[0][0].terms
    }
    measured = statistics.median(seconds)
    return {
        "plan": text,
        "exact": price.plan.exact,
        "predicted_seconds": _rounded(price.step_seconds),
        "measured_seconds": _rounded(measured),
        "rounds": [_rounded(value) for value in seconds],
        "error": _rounded(price.step_seconds / measured - 1),
        "terms": {
            term: [_rounded(predicted.get(term, 0.0)), _rounded(terms.get(term, 0.0))]
            for term in dict.fromkeys([*terms, *predicted])
            if predicted.get(term) or terms.get(term)
        },
        "priced": {term: _rounded(value) for term, value in price.seconds.items() if value},
    }


def judged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How far off the rows are, and what the first choice among exact plans costs."""
    exact = [one for one in rows if one["exact"]]
    fastest = min(exact, key=lambda one: one["measured_seconds"])
    chosen = min(exact, key=lambda one: one["predicted_seconds"])
    return {
        "rows": rows,
        "median_error": statistics.median(abs(one["error"]) for one in rows),
        "first_choice": chosen["plan"],
        "fastest": fastest["plan"],
        "regret": slower(chosen, fastest),
    }


def slower(chosen: dict[str, Any], fastest: dict[str, Any]) -> float:
    """How much slower one plan is than another: the median over rounds, each of which was as noisy for both."""
    ratios = [one / other for one, other in zip(chosen["rounds"], fastest["rounds"], strict=True)]
    return max(0.0, statistics.median(ratios) - 1)


@contextmanager
def counted(spent: Spent, what: str) -> Iterator[None]:
    """Add the seconds that the block takes."""
    began = time.perf_counter()
    try:
        yield
    finally:
        spent[what] = spent.get(what, 0.0) + time.perf_counter() - began


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
