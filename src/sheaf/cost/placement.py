"""Which seat of the cluster each worker of a plan takes: hosts in the cluster's order, each filled before the next."""

from dataclasses import dataclass, field, replace

import numpy as np

from sheaf.cluster.cluster import Cluster, Host
from sheaf.errors import PlanError


@dataclass(frozen=True)
class Seat:
    """Where one worker runs: ``machine`` counts machines over all hosts; ``busy`` workers of the plan share it.

    Rates are what this worker reaches while the others are busy too.
    """

    host_name: str
    device_kind: str
    machine: int = field(compare=False)
    busy: int
    flops_per_second: float
    memory_bytes_per_second: float
    kernel_seconds: float
    speed: float  # relative to the figures a profile was measured with
    available_bytes: int  # for this worker


def seats(cluster: Cluster, workers: int, precision: str = "fp32") -> tuple[Seat, ...]:
    """One seat per worker, by rank.

    Raises PlanError when the cluster has fewer seats.
    """
    if workers > cluster.workers:
        raise PlanError(
            f"the plan needs {workers} workers and {cluster.name} has {cluster.workers}: lower dp, or give more workers"
        )
    taken: list[Seat] = []
    first = 0
    for host, count, busy in _filled(cluster, workers):
        seat = _seat(cluster, host, first, busy, precision)
        for machine in range(first, first + count):
            taken.extend([seat if machine == first else replace(seat, machine=machine)] * busy)
        first += count
    return tuple(taken)


def last(cluster: Cluster, workers: int, precision: str = "fp32") -> Seat:
    """The last of so many seats, whose host may not be full; its machine is not counted."""
    host, _, busy = _filled(cluster, workers)[-1]
    return _seat(cluster, host, 0, busy, precision)


def kinds(cluster: Cluster, workers: int, precision: str = "fp32") -> tuple[Seat, ...]:
    """The seats of ``seats`` that differ by more than their machine, in order; quick for any number of workers."""
    found = (_seat(cluster, host, 0, busy, precision) for host, _, busy in _filled(cluster, workers))
    return tuple(dict.fromkeys(found))


def _filled(cluster: Cluster, workers: int) -> list[tuple[Host, int, int]]:
    """Hosts as workers fill them: the host, how many such, and how many workers on each."""
    filled: list[tuple[Host, int, int]] = []
    for host in cluster.hosts:
        full = min(host.count, workers // host.workers)
        workers -= full * host.workers
        if full:
            filled.append((host, full, host.workers))
        if 0 < workers < host.workers and full < host.count:
            filled.append((host, 1, workers))
            workers = 0
    return filled


def _seat(cluster: Cluster, host: Host, machine: int, busy: int, precision: str) -> Seat:
    device = host.device
    rates = device.flops_per_second
    rate = rates.get(precision) or rates.get("fp32") or max(rates.values())
    reached = host.speed * (_shared(cluster, host, busy) if device.kind == "cpu" else 1.0)
    return Seat(
        host_name=host.name,
        device_kind=device.kind,
        machine=machine,
        busy=busy,
        flops_per_second=rate * reached,
        memory_bytes_per_second=device.memory_bytes_per_second * reached,
        kernel_seconds=device.kernel_seconds / host.speed,
        speed=host.speed / cluster.hosts[0].speed,
        available_bytes=host.memory_per_worker(busy),
    )


def _shared(cluster: Cluster, host: Host, busy: int) -> float:
    """What each of ``busy`` workers of a CPU host reaches, relative to the device's figures.

    Workers share the cores out among their threads. Where the device's speed-up by threads was measured, it holds for
    a lone worker, and contention adds what the other workers take; elsewhere threads count as workers do.
    """
    device = host.device
    threads = max(1, host.cores // busy)
    own = threads / device.threads
    everyone = busy * own
    if not device.thread_speedup:
        return own * contention(cluster, everyone, host.cores / device.threads)
    known = tuple(sorted({1: 1.0, **device.thread_speedup}.items()))
    speedup = _interpolated(known, threads) / _interpolated(known, device.threads)
    cores = host.cores / device.threads
    return speedup * contention(cluster, everyone, cores) / contention(cluster, max(1.0, own), cores)


def contention(cluster: Cluster, busy: float, cores: float) -> float:
    """The share of its lone speed that each of ``busy`` workers of one CPU host reaches; ``cores`` fit side by side.

    Measured shares are interpolated; without any, workers share the cores evenly. Beyond the most that was measured,
    and beyond the cores, workers share what there is.
    """
    if busy <= 1:
        return 1.0
    known = tuple(sorted({1: 1.0, **cluster.contention}.items()))
    most, least_share = known[-1]
    if busy > most:
        return least_share * min(1.0, max(most, cores) / busy)
    return _interpolated(known, busy)


def _interpolated(known: tuple[tuple[int, float], ...], where: float) -> float:
    """Straight lines between known points, flat outside them."""
    return float(np.interp(where, [at for at, _ in known], [value for _, value in known]))
