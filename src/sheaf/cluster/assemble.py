"""Measurements of all workers become one cluster."""

import statistics
from collections.abc import Sequence
from typing import Any

from sheaf.cluster.cluster import Cluster, Device, Host, Link, Timing
from sheaf.cluster.links import fit
from sheaf.cluster.machine import LOOPBACK
from sheaf.errors import ClusterError

SAME_SPEED = 0.10  # hosts of one kind whose rates differ by less are one entry

BUSY_CORES = 0.3  # other programs that take more than this of a host are told of


def assemble(results: Sequence[dict[str, Any]], *, name: str) -> Cluster:
    """The cluster that ``measure_rank`` saw, from the results of all its workers.

    Workers of one host name are one host; hosts that follow each other, with the same device, cores and number of
    workers and within 10 % of each other's speed, are one entry with a count. Links are fitted to their timings, which
    are kept.
    Raises ClusterError when there are no results.
    """
    if not results:
        raise ClusterError("no measurements: every worker of the group must return its result of measure_rank")
    by_host: dict[str, list[dict[str, Any]]] = {}
    for result in sorted(results, key=lambda result: result["rank"]):
        by_host.setdefault(result["host"], []).append(result)
    first = results[0]
    timings = [timing for result in results for timing in result["timings"]]
    overlaps = [result["overlap"] for result in results if result["overlap"] is not None]
    backend = first["backend"]
    source = f"measured on {first['date']} with torch {first['torch']}, {backend}, {len(results)} workers"
    taken = max(workers[0]["cores_taken"] for workers in by_host.values())
    if taken > BUSY_CORES:
        source += f"; other programs kept {taken:.1f} cores busy meanwhile: measure again when it is quiet"
    return Cluster(
        name=name,
        backend=backend,
        hosts=_hosts(list(by_host.values())),
        intra=_link("within a host", "intra", timings) or LOOPBACK,
        inter=_link("between hosts", "inter", timings) or (LOOPBACK if len(by_host) > 1 else None),
        contention=_contention(list(by_host.values())) if first["device"]["kind"] == "cpu" else {},
        overlap=_rounded(statistics.median(overlaps)) if overlaps else 0.0,
        source=source,
    )


def _hosts(measured: list[list[dict[str, Any]]]) -> tuple[Host, ...]:
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for workers in measured:
        kinds.setdefault(_kind(workers), []).append(workers[0])
    devices = {kind: _device(leads) for kind, leads in kinds.items()}
    teams: list[list[list[dict[str, Any]]]] = []
    for workers in measured:  # ranks keep their order, and with it their places
        if teams and _kind(workers) == _kind(teams[-1][0]) and _alike(workers, teams[-1][0]):
            teams[-1].append(workers)
        else:
            teams.append([workers])
    hosts: list[Host] = []
    for team in teams:
        kind = _kind(team[0])
        unequal = not all(_alike([lead], kinds[kind][:1]) for lead in kinds[kind])
        speed = statistics.median(_fp32_rate(workers) for workers in team) / devices[kind].flops_per_second["fp32"]
        hosts.append(
            Host(
                name=team[0][0]["host"],
                count=len(team),
                workers=len(team[0]),
                device=devices[kind],
                cores=team[0][0]["cores"],
                memory_bytes=min(workers[0]["host_memory_bytes"] for workers in team),
                speed=_rounded(speed) if unequal else 1.0,
            )
        )
    return tuple(hosts)


def _kind(workers: list[dict[str, Any]]) -> tuple[Any, ...]:
    lead = workers[0]
    return lead["device"]["name"], lead["cores"], lead["threads"], len(workers)


def _alike(workers: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    slow, fast = sorted((_fp32_rate(workers), _fp32_rate(others)))
    return slow > (1 - SAME_SPEED) * fast


def _device(leads: list[dict[str, Any]]) -> Device:
    """The device of hosts of one kind: the median of what their first workers measured alone."""
    facts = leads[0]["device"]
    return Device(
        name=facts["name"],
        kind=facts["kind"],
        flops_per_second={
            precision: _rounded(statistics.median(lead["flops_per_second"][precision] for lead in leads))
            for precision in leads[0]["flops_per_second"]
        },
        memory_bytes_per_second=_rounded(statistics.median(lead["memory_bytes_per_second"] for lead in leads)),
        memory_bytes=min(lead["device"]["memory_bytes"] for lead in leads),
        kernel_seconds=_rounded(statistics.median(lead["kernel_seconds"] for lead in leads)),
        threads=leads[0]["threads"],
        thread_speedup={
            int(number): _rounded(statistics.median(lead["thread_speedup"][number] for lead in leads))
            for number in leads[0]["thread_speedup"]
        },
        source=f"measured on {leads[0]['date']}: matmul and copy rates of one worker alone, memory that was free",
    )


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")  # no measurement here holds more digits


def _fp32_rate(workers: list[dict[str, Any]]) -> float:
    return workers[0]["flops_per_second"]["fp32"]


def _contention(measured: list[list[dict[str, Any]]]) -> dict[int, float]:
    shares: dict[int, float] = {}
    lowest = 1.0
    for count in sorted({int(count) for workers in measured for result in workers for count in result["busy"]}):
        seen = [
            statistics.fmean(result["busy"][str(count)] for result in workers if str(count) in result["busy"])
            / max(workers[0]["busy"]["1"], workers[0]["flops_per_second"]["fp32"])
            for workers in measured
            if str(count) in workers[0]["busy"]
        ]
        lowest = 1.0 if count == 1 else min(lowest, statistics.median(seen))  # one more worker never makes it faster
        shares[count] = _rounded(lowest)
    return shares


def _link(name: str, tier: str, measured: list[dict[str, Any]]) -> Link | None:
    timings = tuple(
        Timing(
            operation=timing["operation"],
            workers=timing["workers"],
            size_bytes=timing["size_bytes"],
            seconds=_rounded(timing["seconds"]),
        )
        for timing in sorted(measured, key=lambda each: (each["operation"], each["workers"], each["size_bytes"]))
        if timing["tier"] == tier
    )
    if not timings:
        return None
    latency_seconds, bytes_per_second = fit(timings)
    return Link(
        name=name,
        latency_seconds=_rounded(latency_seconds),
        bytes_per_second=_rounded(bytes_per_second),
        timings=timings,
        source="measured: collectives as Sheaf runs them, medians of the slowest worker",
    )
