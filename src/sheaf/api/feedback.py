"""What a run tells about the machine it ran on: figures of the cluster file put right by what was measured."""

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sheaf.api.measure import default_workers, kept_file, measure
from sheaf.cluster import Cluster, Link, available_cores, read, write
from sheaf.cluster.cluster import OVERLAP_RANGE
from sheaf.cluster.machine import host_name, processor_name
from sheaf.errors import ClusterError, RunError
from sheaf.plans import Plan
from sheaf.record import StepReport, read_record, step_reports
from sheaf.training.directory import RECORD

SAME = 0.02  # a figure that would change by less stays
SAME_SPEED = 0.05  # hosts whose workers computed as fast within this stay as they are
NOTHING_SECONDS = 50e-6  # what neither a link nor a host is blamed for
FEWEST_STEPS = 3


@dataclass(frozen=True)
class Change:
    """One figure of a cluster, before and after."""

    figure: str
    before: float
    after: float


def from_run(directory: str | Path, *, out: Path | None = None) -> tuple[Cluster, tuple[Change, ...]]:
    """This machine's cluster, put right by what a run measured beside what it was told, and what that changed.

    It takes the place of what ``sheaf measure`` keeps, so that later predictions stand on it; ``out`` writes it there
    as well. What is put right: the overlap of communication and computing, as far as that explains what communication
    took; the link's times and bandwidth for the rest; what a step takes on the host; and where hosts differ, their
    speeds, by how long their workers computed.

    Raises RunError for a run without prediction or with too few steps, and ClusterError for one of another machine, or
    that was predicted from other figures than there are now.
    """
    from sheaf.watch import compared

    directory = Path(directory)
    terms, told = compared(directory), _told(directory / RECORD)
    reports = step_reports(directory / RECORD)
    if not terms:
        raise RunError(
            f"{directory} holds no prediction beside measured steps: train without --no-predict, on one machine"
        )
    if len(reports) < FEWEST_STEPS:
        raise RunError(f"{directory} holds {len(reports)} steps; a machine is put right by {FEWEST_STEPS} or more")
    on: dict[str, Any] = told.get("on") or {}
    _refuse(directory, on)
    workers = int(on["workers"])
    cluster = measure(workers, quick=True)
    if on["figures"] != digest(cluster):
        raise ClusterError(
            f"{directory} was predicted from other figures than this machine has now (it was measured again, or put "
            "right by a run before): train again, then give that run"
        )
    plan = Plan.parse(str(told["plan"]))
    found = right(cluster, plan, terms, float(told.get("hidden_seconds", 0.0)), reports)
    changes = changed(cluster, found)
    if changes:
        found = replace(found, source=f"{cluster.source}; put right by run {directory.resolve().name}")
        write(found, kept_file(workers))
        found = read(kept_file(workers))
    if out is not None:
        write(found, out)
    return found, changes


def right(
    cluster: Cluster,
    plan: Plan,
    terms: Mapping[str, Mapping[str, float]],
    hidden_seconds: float,
    reports: Sequence[StepReport],
) -> Cluster:
    """The cluster with figures by which the run would have been predicted as it was measured."""
    if plan.workers > 1 and "communicate" in terms:
        cluster = _communication(cluster, plan, terms["communicate"], hidden_seconds)
    more = terms["host"]["measured"] - terms["host"]["predicted"] if "host" in terms else 0.0
    if abs(more) > NOTHING_SECONDS:
        cluster = replace(cluster, host_seconds=_rounded(max(0.0, cluster.host_seconds + more)))
    return _speeds(cluster, plan, reports)


def changed(before: Cluster, after: Cluster) -> tuple[Change, ...]:
    """The figures in which two clusters of the same hosts differ."""
    pairs = [("overlap", before.overlap, after.overlap), ("host_seconds", before.host_seconds, after.host_seconds)]
    for tier in ("intra", "inter"):
        one, other = getattr(before, tier), getattr(after, tier)
        if one is not None and other is not None:
            pairs += [
                (f"{tier}.{name}", getattr(one, name), getattr(other, name))
                for name in ("latency_seconds", "bytes_per_second")
            ]
    pairs += [
        (f"speed of {one.name}", one.speed, other.speed) for one, other in zip(before.hosts, after.hosts, strict=True)
    ]
    return tuple(Change(*pair) for pair in pairs if pair[1] != pair[2])


def measured_for(plan: Plan, *, auto: bool, workers: int | None) -> int:
    """With how many workers the cluster was measured from which a plan was predicted; ``auto``: in a ranking."""
    return (default_workers() if workers is None else workers) if auto else plan.workers


def figures(workers: int) -> dict[str, Any]:
    """What a run keeps of the machine that it was predicted for."""
    return machine() | {"workers": workers, "figures": digest(measure(workers, quick=True))}


def machine() -> dict[str, Any]:
    """What tells this machine from others."""
    return {"host": host_name(), "processor": processor_name(), "cores": available_cores()}


def digest(cluster: Cluster) -> str:
    """A short fingerprint of all figures of a cluster."""
    told = asdict(cluster) | {"source": ""}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _refuse(directory: Path, on: Mapping[str, Any]) -> None:
    if not on:
        raise ClusterError(
            f"{directory} does not say on which machine it ran: train again with this version, then give that run"
        )
    here = machine()
    different = [f"{key} {on.get(key)}, here {here[key]}" for key in here if on.get(key) != here[key]]
    if different:
        raise ClusterError(
            f"{directory} is of another machine ({'; '.join(different)}): its times say nothing of this one. "
            "Give a run of this machine, or run `sheaf measure --from-run` on that one"
        )


def _told(record: Path) -> dict[str, Any]:
    """The latest event that named the plan and what it was predicted to take."""
    return next((line for line in reversed(list(read_record(record))) if line.get("kind") == "plan"), {})


def _communication(cluster: Cluster, plan: Plan, term: Mapping[str, float], hidden_seconds: float) -> Cluster:
    """What shows is all there is less ``overlap`` of what could hide: that share is put right first, then the link."""
    shown, measured = term["predicted"], term["measured"]
    if shown + abs(hidden_seconds) < NOTHING_SECONDS or abs(measured - shown) < max(NOTHING_SECONDS, SAME * shown):
        return cluster
    whole = shown + hidden_seconds
    overlap = cluster.overlap
    hideable = hidden_seconds / overlap if abs(overlap) > SAME else 0.0
    if hideable > NOTHING_SECONDS:
        low, high = OVERLAP_RANGE
        overlap = _rounded(min(high, max(low, (whole - measured) / hideable)))
    left = whole - overlap * hideable
    factor = measured / left if left > NOTHING_SECONDS else 1.0
    found = replace(cluster, overlap=overlap)
    if abs(factor - 1) < SAME or measured < NOTHING_SECONDS:
        return found
    inside = max(host.workers for host in cluster.hosts)
    tier = "inter" if plan.workers > inside and cluster.inter is not None else "intra"
    return replace(found, **{tier: slower(getattr(found, tier), factor)})


def slower(link: Link, factor: float) -> Link:
    """The link with everything taking ``factor`` times as long."""
    timings = tuple(replace(timing, seconds=_rounded(timing.seconds * factor)) for timing in link.timings)
    return replace(
        link,
        latency_seconds=_rounded(link.latency_seconds * factor),
        bytes_per_second=_rounded(link.bytes_per_second / factor),
        timings=timings,
    )


def _speeds(cluster: Cluster, plan: Plan, reports: Sequence[StepReport]) -> Cluster:
    """Speeds of hosts by the seconds their first workers computed on a microbatch, relative to the first host."""
    entries = [host for host in cluster.hosts for _ in range(host.count)]
    if len(cluster.hosts) < 2 or plan.pp > 1 or plan.tp > 1 or plan.workers != cluster.workers:
        return cluster
    paces: list[float] = []
    rank = 0
    for host in entries:
        each = [
            report.computed[rank] / report.microbatches[rank]
            for report in reports
            if len(report.computed) > rank and report.microbatches[rank]
        ]
        if not each:
            return cluster
        paces.append(statistics.median(each))
        rank += host.workers
    hosts: list[Any] = []
    place = 0
    for host in cluster.hosts:
        pace = statistics.median(paces[place : place + host.count])
        place += host.count
        speed = cluster.hosts[0].speed * paces[0] / pace
        same = abs(speed / host.speed - 1) < SAME_SPEED
        hosts.append(host if same else replace(host, speed=_rounded(speed)))
    return replace(cluster, hosts=tuple(hosts))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
