"""What benchmarks on hosts share: what each host found comes back, contenders are noted, bytes are predicted."""

import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from bench.hosts import Hosts, HostsError, cluster, sent_bytes
from bench.interleaved import ratio, rounds
from bench.tensor import agreed
from sheaf import Plan, Task, launch
from sheaf.cluster.machine import available_cores
from sheaf.cost import microbatch_sizes, price
from sheaf.graph import trace
from sheaf.launch.world import World
from sheaf.parallel import refuse


class Broken(HostsError):
    """Hosts did not come to their end; ``told`` is what each had told by then, None where that was nothing."""

    def __init__(self, why: HostsError, told: list[Any]) -> None:
        super().__init__(str(why))
        self.told = told


def found_by(name: str, hosts: int, rate: str, *given: object, timeout_s: float) -> list[Any]:
    """What each host wrote last by ``tell``: they run ``bench/NAME.py`` as a program, with a folder and what is given.

    Raises Broken when a host fails, or it takes longer than ``timeout_s`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder, Hosts(hosts, rate) as started:
        files = [Path(folder) / f"{rank}.json" for rank in range(hosts)]
        try:
            started.run([sys.executable, "-m", f"bench.{name}", folder, *map(str, given)], timeout_s=timeout_s)
        except HostsError as error:
            told = [json.loads(one.read_text(encoding="utf-8")) if one.exists() else None for one in files]
            raise Broken(error, told) from error
        return [json.loads(one.read_text(encoding="utf-8")) for one in files]


def joined(name: str) -> World:
    """This host among those that ``found_by`` started. Ends the program where it is none."""
    world = launch.join()
    if world is None:
        raise SystemExit(f"no host: start this by `python -m bench {name}`")
    return world


def tell(folder: Path, rank: int, found: Any) -> None:
    """Write what this host has found so far."""
    written = folder / f"{rank}.part"
    written.write_text(json.dumps(found), encoding="utf-8")
    written.replace(folder / f"{rank}.json")  # a host may be killed while it writes


def noted(contenders: dict[str, Callable[[], float]], *, count: int, steps: int) -> dict[str, Any]:
    """Run all in turn, on each host: seconds of each, and the loss and the bytes sent of each step of each."""
    losses: dict[str, list[float]] = {name: [] for name in contenders}
    sent: dict[str, list[int]] = {name: [] for name in contenders}

    def step(name: str) -> None:
        before = sent_bytes()
        losses[name].append(contenders[name]())
        sent[name].append(sent_bytes() - before)

    seconds = rounds({name: partial(step, name) for name in contenders}, count=count, steps=steps)
    return {"seconds": seconds, "losses": losses, "sent_bytes": sent}


def beside(told: list[dict[str, Any]], rate: str, peer: str, steps: int) -> dict[str, dict[str, Any]]:
    """Of what hosts have ``noted``, for each contender but the peer: the ratio of throughputs, what a host sends in a
    step (the mean over hosts), and how far losses are apart.

    Raises ValueError when losses differ by more than rounding.
    """
    names = list(told[0]["losses"])
    sent = {name: statistics.mean(statistics.median(one["sent_bytes"][name][steps:]) for one in told) for name in names}
    apart = agreed({name: [one["losses"][name] for one in told] for name in names}, peer)
    return {
        name: asdict(ratio(told[0]["seconds"], name, peer))
        | {"hosts": len(told), "rate": rate, "cores": available_cores()}
        | {"sheaf_sent_bytes": sent[name], "peer_sent_bytes": sent[peer], "losses_apart": apart}
        for name in names
        if name != peer
    }


def predicted_bytes(given: Task, text: str, hosts: int, rate: str) -> float:
    """What the busiest host's link carries in a step, by the cost model: ``Price.wire_bytes``.

    Where some hosts are late for meetings, it is the mean over the hosts.
    """
    plan, samples = Plan.parse(text), given.microbatch or given.batch
    sizes, split = microbatch_sizes(given.batch, samples), refuse(given, plan)
    found = price(plan, trace(given, samples), cluster(hosts, rate), None, microbatches=sizes, split=split)
    return found.wire_bytes
