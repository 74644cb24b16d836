"""How right the planner is on this machine: predicted beside measured step time, and what its first choice costs.

Every task on every network: the loopback, and hosts of one core each (``bench.hosts``), the second of them at half
speed (``bench.quota``). What is done for each is in ``bench.planner_pair``.

`python -m bench.planner gpt 1gbit` takes a short look at one task on one network.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from bench.hosts import Hosts, HostsError, unavailable
from bench.planner_pair import LOOPBACK, compare
from bench.planner_tasks import CASES
from bench.quota import quota
from sheaf import launch
from sheaf.cluster import available_cores
from sheaf.errors import SheafError

NETWORKS = (LOOPBACK, "1gbit", "100mbit")
BURSTS = {"1gbit": "256kb", "100mbit": "32kb"}  # 2 to 3 ms of each link: a wire has none
HALF = 0.5  # the speed of the second host
TIMEOUT_S = 600.0
SLOWER = "a slower host needs root and the cpu controller"

Told = Callable[[dict[str, Any]], None]


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
        found: dict[str, Any] = {"network": network, "left_out": SLOWER}
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


def run(
    *,
    rounds: int = 5,
    tasks: tuple[str, ...] = (),
    networks: tuple[str, ...] = NETWORKS,
    told: Told | None = None,
) -> list[dict[str, Any]]:
    """Every task on every network, in order; ``told`` hears of each as soon as it is found.

    What could not be measured is among the results, with the reason under ``left_out``: a network where there can be
    no hosts, or one task on it that failed.
    """
    results: list[dict[str, Any]] = []

    def keep(found: dict[str, Any]) -> None:
        results.append(found)
        if told is not None:
            told(found)

    with tempfile.TemporaryDirectory() as folder:
        for network in networks:
            reason = None if network == LOOPBACK else unavailable()
            if reason:
                keep({"network": network, "left_out": reason})
                continue
            for name in tasks or CASES:
                began = time.monotonic()
                try:
                    found = found_on(name, network, rounds, Path(folder))
                except (SheafError, HostsError, OSError) as error:
                    found = {"task": name, "network": network, "left_out": str(error).strip()}
                took = time.monotonic() - began
                keep({**found, "took_seconds": took})
                print(f"{network} {name}: {took:.0f} s, {in_short(found)}", flush=True)
                if found.get("left_out") == SLOWER:
                    break
    return results


def found_on(name: str, network: str, rounds: int, folder: Path) -> dict[str, Any]:
    """One task on one network. Raises SheafError or HostsError where a worker failed."""
    if network == LOOPBACK:
        return launch.run(compare, 4, name, network, rounds, folder, threads=1, timeout_s=TIMEOUT_S)[0]
    with Hosts(2, network, burst=BURSTS[network]) as hosts:
        command = ["unshare", "--uts", sys.executable, "-m", "bench.planner"]
        hosts.run([*command, str(folder), name, network, str(rounds)], timeout_s=TIMEOUT_S)
    return json.loads((folder / f"{name}-{network}.json").read_text(encoding="utf-8"))


def in_short(found: dict[str, Any]) -> str:
    """One result in a few words."""
    if "rows" not in found:
        return f"left out: {found['left_out'].splitlines()[-1]}"
    return f"median error {found['median_error']:.1%}, first choice {found['regret']:.1%} slower than the fastest"


def look(names: Sequence[str]) -> None:
    """A short run of the tasks and networks that are named, all unless some are; each table as soon as it is found."""
    from bench.__main__ import drawn
    from bench.planner_report import plan_table

    tasks = tuple(name for name in names if name in CASES)
    networks = tuple(name for name in names if name in NETWORKS)
    unknown = sorted(set(names) - {*tasks, *networks})
    if unknown:
        raise SystemExit(f"{', '.join(unknown)}: choose from {', '.join((*CASES, *NETWORKS))}")
    console = Console(highlight=False, width=150)

    def show(result: dict[str, Any]) -> None:
        if "rows" not in result:
            console.print(result)
            return
        console.print(drawn(plan_table(result)))
        spent = ", ".join(f"{what} {seconds:.0f} s" for what, seconds in result["spent_seconds"].items())
        left = "".join(f"; left out {plan}: {reason}" for plan, reason in result["plans_left_out"].items())
        console.print(spent + left)

    run(rounds=2, tasks=tasks, networks=networks or NETWORKS, told=show)


if __name__ == "__main__":
    if len(sys.argv) == 5 and Path(sys.argv[1]).is_dir():
        work(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        look(sys.argv[1:])
