"""How right the planner is on this machine: predicted beside measured step time, and what its first choice costs.

For every task and network, one set of workers measures itself and the task's blocks, predicts every plan, and then runs
all of them in turn, several rounds: what disturbs one disturbs all. Networks are the loopback, and hosts of one core
each (``bench.hosts``), the second of them at half speed (``bench.quota``).

`python -m bench.planner gpt 1gbit` takes a short look at one task on one network.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from bench.company import Company
from bench.hosts import Hosts, unavailable
from bench.planner_tasks import ALONE, CASES, EQUAL, FOURS, PAIRS, UNEQUAL, made
from bench.quota import quota
from sheaf import Plan, Task, launch
from sheaf.api.here import question_here
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

NETWORKS = ("loopback", "1gbit", "100mbit")
HALF = 0.5  # the speed of the second host
STEPS = 4  # in a row: weights that meet every fourth step meet once
WARM_UP = 2
TIMEOUT_S = 900.0


def compare(name: str, network: str, rounds: int, folder: Path) -> dict[str, Any]:
    """What one task's plans were predicted to take on the workers that are here, and what they took (collective).

    ``folder`` holds the clusters that were measured with earlier tasks, and those that are measured now.
    """
    company, task = Company(), made(name)
    pairs = PAIRS + CASES[name].own + (EQUAL if network == "loopback" else UNEQUAL)
    rows: list[dict[str, Any]] = []
    for workers, plans in ((1, ALONE), (2, pairs), (4, FOURS)):
        if workers > company.workers:
            continue
        with company.of(workers) as mine:
            if mine:
                torch.set_num_threads(max(1, available_cores() // workers) if network == "loopback" else 1)
                rows += together(task, plans, workers, rounds, folder / f"{network}-{workers}.toml")
    return {"task": name, "network": network, **judged(rows)}


def together(task: Task, plans: tuple[str, ...], workers: int, rounds: int, file: Path) -> list[dict[str, Any]]:
    """A row for each plan of so many workers; the workers are here (collective)."""
    facts = trace(task, task.microbatch or task.batch)
    legal, splits = from_first(lambda: list(allowed(task, facts, plans)))
    question = question_here(
        task,
        facts,
        cluster=known(file),
        splits={tuple(key): SplitFacts.from_dict(values) for key, values in splits},
        plans=[Plan.parse(text) for text in legal],
    )
    prices = {text: question.price(Plan.parse(text)) for text in legal if workers > 1 or text in ALONE}
    steps = {text: build(task, Plan.parse(text)) for text in prices}
    reports: dict[str, list[list[StepReport]]] = {text: [] for text in prices}
    names = list(steps)
    for text, step in steps.items():
        for _ in range(WARM_UP if "local" not in text else STEPS):
            step()
    for turn in range(rounds):
        for text in names[turn % len(names) :] + names[: turn % len(names)]:
            if dist.is_initialized():
                dist.barrier()
            reports[text].append([steps[text]() for _ in range(STEPS)])
    for step in steps.values():
        step.close()
    return [row(text, prices[text], reports[text]) for text in names]


def known(file: Path) -> Cluster:
    """The workers that are here as a cluster: measured with an earlier task, or now."""
    if from_first(file.exists):
        return read(file)
    found = measure_here(quick=True)
    from_first(lambda: write(found, file))
    return read(file)


def allowed(task: Task, facts: ModelFacts, plans: tuple[str, ...]) -> tuple[list[str], list[Any]]:
    """The plans that can run the task, and how they split its layers. Replicas alone always can."""
    legal: list[str] = []
    splits: dict[tuple[int, int], Any] = {}
    for text in plans:
        plan = Plan.parse(text)
        if plan.tp * plan.cp * plan.pp > 1 or plan.by_parts:
            try:
                split = rehearsed(task, facts, *plan.split_kind) if plan.cp > 1 else refuse(task, plan)
            except SheafError:
                continue
            if split is not None:
                splits.setdefault(plan.split_kind, split.to_dict())
        legal.append(text)
    return legal, [[list(kind), values] for kind, values in splits.items()]


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
        "predicted_seconds": price.step_seconds,
        "measured_seconds": measured,
        "rounds": seconds,
        "error": price.step_seconds / measured - 1,
        "terms": {
            term: [predicted.get(term, 0.0), terms.get(term, 0.0)]
            for term in dict.fromkeys([*terms, *predicted])
            if predicted.get(term) or terms.get(term)
        },
        "priced": {term: value for term, value in price.seconds.items() if value},
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
        "regret": chosen["measured_seconds"] / fastest["measured_seconds"] - 1,
    }


def work(folder: Path, name: str, network: str, rounds: int) -> None:
    """What a host does: the comparison, which the first writes to a file in ``folder``; clusters are kept there."""
    rank = int(os.environ["RANK"])
    socket.sethostname(f"host-{rank}")  # of its own: the command that starts it has left the machine's name behind
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank % available_cores()]})
    launch.join()
    control_groups_here()
    with ExitStack() as held:
        limited = held.enter_context(quota(HALF)) if rank == 1 else True
        told = torch.tensor(float(limited))
        dist.all_reduce(told)
        found: dict[str, Any] = {"network": network, "left_out": "a slower host needs root and the cpu controller"}
        if told == dist.get_world_size():
            found = compare(name, network, rounds, folder)
    if rank == 0:
        (folder / f"{name}-{network}.json").write_text(json.dumps(found), encoding="utf-8")


def control_groups_here() -> None:
    """Show this host the machine's control groups, which its own ``/sys`` hides; nobody else sees that."""
    place = Path("/sys/fs/cgroup")
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()]
    controllers = next((names for _, names, _ in lines if "cpu" in names.split(",")), None)
    if controllers is None:
        subprocess.run(["mount", "-t", "cgroup2", "none", str(place)], check=False, capture_output=True)
        return
    subprocess.run(["mount", "-t", "tmpfs", "none", str(place)], check=False, capture_output=True)
    with suppress(OSError):
        (place / "cpu").mkdir()
        command = ["mount", "-t", "cgroup", "-o", controllers, "none", str(place / "cpu")]
        subprocess.run(command, check=False, capture_output=True)


def run(*, rounds: int = 3, tasks: tuple[str, ...] = (), networks: tuple[str, ...] = NETWORKS) -> list[dict[str, Any]]:
    """Every task on every network; those of hosts are left out, and say why, where there can be none."""
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for network in networks:
            reason = None if network == "loopback" else unavailable()
            if reason:
                results.append({"network": network, "left_out": reason})
                continue
            for name in tasks or CASES:
                began = time.monotonic()
                if network == "loopback":
                    given = (name, network, rounds, Path(folder))
                    found = launch.run(compare, 4, *given, threads=1, timeout_s=TIMEOUT_S)[0]
                else:
                    with Hosts(2, network) as hosts:
                        command = ["unshare", "--uts", sys.executable, "-m", "bench.planner"]
                        hosts.run([*command, folder, name, network, str(rounds)], timeout_s=TIMEOUT_S)
                    found = json.loads((Path(folder) / f"{name}-{network}.json").read_text(encoding="utf-8"))
                results.append(found)
                if "rows" not in found:
                    break
                took = time.monotonic() - began
                print(f"{network} {name}: {took:.0f} s, median error {found['median_error']:.1%}", flush=True)
    return results


def look(names: Sequence[str]) -> None:
    """A short run of the tasks and networks that are named (all, unless some are), and its tables."""
    from bench.__main__ import drawn
    from bench.report import plan_table

    tasks = tuple(name for name in names if name in CASES)
    networks = tuple(name for name in names if name in NETWORKS)
    unknown = sorted(set(names) - {*tasks, *networks})
    if unknown:
        raise SystemExit(f"{', '.join(unknown)}: choose from {', '.join((*CASES, *NETWORKS))}")
    console = Console(highlight=False)
    for result in run(rounds=2, tasks=tasks, networks=networks or NETWORKS):
        console.print(drawn(plan_table(result)) if "rows" in result else result)


if __name__ == "__main__":
    if len(sys.argv) == 5 and Path(sys.argv[1]).is_dir():
        work(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        look(sys.argv[1:])
