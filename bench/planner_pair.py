"""One task on one network: workers measure themselves, run every plan in turn, and predict it from what they measured.

What disturbs one plan disturbs all. Blocks are measured before the runs, between their rounds and after them, as the
machine is not always as fast; no prediction sees how long a plan took. All that was measured is kept, so that it can be
predicted again (``bench.planner_kept``). The workers are there already: of the loopback, or of hosts.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.company import Company
from bench.planner_tasks import ALONE, CASES, EQUAL, FOURS, PAIRS, UNEQUAL, made
from sheaf import Plan, Task
from sheaf.api.heard import Heard, Pair, question_from
from sheaf.api.here import heard_again, heard_here
from sheaf.api.measure import measure_here
from sheaf.api.rehearsals import WORKERS
from sheaf.api.splits import rehearsed
from sheaf.checkpoint import from_first
from sheaf.cluster import Cluster, available_cores, read, write
from sheaf.cost.price import Price
from sheaf.errors import SheafError
from sheaf.graph import ModelFacts, trace
from sheaf.parallel import build, refuse  # sheaf.build joins the workers that the environment names
from sheaf.plans.split import SplitFacts
from sheaf.record import StepReport
from sheaf.search import Question
from sheaf.watch.picture import as_measured

LOOPBACK = "loopback"
STEPS = 4  # at most in a round: weights that meet every fourth step meet once
WARM_UP = 2
MEASURING_SECONDS, BETWEEN_SECONDS = 1.0, 0.5  # before the runs and after them; between two rounds
ROUND_SECONDS = 0.25  # of one plan, as far as whole steps allow

Spent = dict[str, float]


@dataclass(frozen=True)
class Ran:
    """What a plan's steps told this worker, by round, and by round the seconds of a step on the slowest worker."""

    reports: list[list[StepReport]]
    seconds: list[float]


def compare(name: str, network: str, rounds: int, folder: Path) -> dict[str, Any]:
    """What one task's plans were predicted to take on the workers that are here, and what they took (collective).

    ``folder`` holds the clusters that were measured with earlier tasks, and those that are measured now. Under
    ``heard`` is all that the predictions follow from.
    """
    company, task = Company(), made(name)
    pairs = PAIRS + CASES[name].own + (EQUAL if network == LOOPBACK else UNEQUAL)
    rows: list[dict[str, Any]] = []
    heard: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    spent: Spent = {}
    pair: Pair | None = None
    for workers, plans in ((1, ALONE), (2, pairs), (4, FOURS)):
        if workers > company.workers:
            continue
        with company.of(workers) as mine:
            if mine:
                torch.set_num_threads(max(1, available_cores() // workers) if network == LOOPBACK else 1)
                file = folder / cluster_file(network, workers)
                asked, found, reports = together(task, plans, rounds, file, pair, left_out, spent)
                prices = {text: asked.price(Plan.parse(text)) for text in reports}
                rows += [row(text, prices[text], reports[text]) for text in reports]
                kept = {"workers": workers, "plans": list(reports), "cluster": file.read_text(encoding="utf-8")}
                heard.append(kept | found.to_dict())
                if workers == WORKERS:
                    (profile,) = asked.profiles.values()
                    pair = Pair(profile.overheads, profile)
    told = {"task": name, "network": network, **judged(rows), "plans_left_out": left_out, "spent_seconds": spent}
    return {**told, "heard": heard}


def cluster_file(network: str, workers: int) -> str:
    """The name of the file of so many workers on a network."""
    return f"{network}-{workers}.toml"


def together(
    task: Task,
    plans: tuple[str, ...],
    rounds: int,
    file: Path,
    pair: Pair | None,
    left_out: dict[str, str],
    spent: Spent,
) -> tuple[Question, Heard, dict[str, Ran]]:
    """What is asked of the workers that are here, what they heard, and how each legal plan ran (collective).

    ``pair`` is what the first two of them have rehearsed before.
    """
    with counted(spent, "tracing"):
        facts = trace(task, task.microbatch or task.batch)
        legal, splits, refused = from_first(lambda: list(allowed(task, facts, plans)))
        left_out |= refused
    with counted(spent, "measuring workers"):
        cluster = known(file)
    with counted(spent, "measuring blocks and executors"):
        heard = heard_here(
            task, facts, plans=[Plan.parse(text) for text in legal], pair=pair, budget_seconds=MEASURING_SECONDS
        )

    def measure(seconds: float) -> None:
        nonlocal heard
        with counted(spent, "measuring blocks again"):
            heard = heard_again(heard, task, facts, budget_seconds=seconds)

    ran = run_in_turn(task, legal, rounds, lambda: measure(BETWEEN_SECONDS), spent)
    measure(MEASURING_SECONDS)
    heard = Heard.from_dict(from_first(heard.to_dict))  # as it is kept: rounded, and of the first worker's pair
    return question_from(task, facts, cluster, heard, splits_from(splits)), heard, ran


def splits_from(told: list[Any]) -> dict[tuple[int, int], SplitFacts]:
    """How plans split layers, as ``allowed`` tells it."""
    return {(key[0], key[1]): SplitFacts.from_dict(values) for key, values in told}


def run_in_turn(
    task: Task, plans: Sequence[str], rounds: int, between: Callable[[], None], spent: Spent
) -> dict[str, Ran]:
    """How each plan's steps ran, by round (collective); ``between`` two rounds something else is done.

    A round of a plan has as many steps as fit into ``ROUND_SECONDS``, from one to ``STEPS``; of weights that meet now
    and then as many as from one meeting to the next. It is over when the last worker is done: under a parameter server
    they are not done at once.
    """
    found = {text: Ran([], []) for text in plans}
    counts: dict[str, int] = {}
    with counted(spent, "running"):
        steps = {text: build(task, Plan.parse(text)) for text in plans}
        for text, step in steps.items():
            every = Plan.parse(text).meets_locally.every
            seconds = [step().seconds for _ in range(every or WARM_UP)]
            counts[text] = every or max(1, min(STEPS, int(ROUND_SECONDS / largest(min(seconds)))))
    names = list(steps)
    for turn in range(rounds):
        if turn:
            between()
        with counted(spent, "running"):
            for text in names[turn % len(names) :] + names[: turn % len(names)]:
                if dist.is_initialized():
                    dist.barrier()
                began = time.perf_counter()
                found[text].reports.append([steps[text]() for _ in range(counts[text])])
                found[text].seconds.append((time.perf_counter() - began) / counts[text])
    for step in steps.values():
        step.close()
    slowest = from_all([ran.seconds for ran in found.values()])
    return {text: Ran(ran.reports, seconds) for (text, ran), seconds in zip(found.items(), slowest, strict=True)}


def from_all(seconds: list[list[float]]) -> list[list[float]]:
    """The most that any worker found, of each (collective)."""
    found = torch.tensor(seconds, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.tolist()


def largest(seconds: float) -> float:
    """The most that any worker found (collective)."""
    return from_all([[seconds]])[0][0]


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


def row(text: str, price: Price, ran: Ran) -> dict[str, Any]:
    """Predicted and measured, whole and by term; the median over rounds of the mean over a round's steps.

    Terms are the first worker's.
    """
    terms = {
        term: statistics.median(
            statistics.fmean(one.terms.get(term, 0.0) for one in reports) for reports in ran.reports
        )
        for term in ran.reports[0][0].terms
    }
    measured = {
        "plan": text,
        "exact": price.plan.exact,
        "measured_seconds": _rounded(statistics.median(ran.seconds)),
        "rounds": [_rounded(value) for value in ran.seconds],
        "terms": {term: [0.0, _rounded(seconds)] for term, seconds in terms.items()},
    }
    return predicted(measured, price)


def predicted(row: dict[str, Any], price: Price) -> dict[str, Any]:
    """The row with what is predicted, in the place of what was."""
    terms, measured = as_measured(price.seconds), {term: pair[1] for term, pair in row["terms"].items()}
    return {
        **row,
        "predicted_seconds": _rounded(price.step_seconds),
        "error": _rounded(price.step_seconds / row["measured_seconds"] - 1),
        "terms": {
            term: [_rounded(terms.get(term, 0.0)), measured.get(term, 0.0)]
            for term in dict.fromkeys([*measured, *terms])
            if terms.get(term) or measured.get(term)
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
