"""Which seat of the cluster each worker of a plan takes: hosts in the cluster's order, each filled before the next."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, repeat

import numpy as np

from sheaf.cluster.cluster import Cluster, Host
from sheaf.errors import PlanError


@dataclass(frozen=True)
class Seat:
    """Where one worker runs; ``busy`` workers of the plan share its machine.

    Rates are what this worker reaches while the others are busy too.
    """

    host_name: str
    device_kind: str
    busy: int
    flops_per_second: float
    memory_bytes_per_second: float
    kernel_seconds: float
    speed: float  # relative to the figures a profile was measured with
    available_bytes: int  # for this worker
    host_bytes: int = 0  # of an accelerator's host, for this worker
    offload_bytes_per_second: float = 0.0  # as its host has it, for each worker
    update_bytes_per_second: float = 0.0  # as its host has it, for all its workers


@dataclass(frozen=True, eq=False)
class Seats:
    """One seat per rank, as runs of machines that are filled alike: a hundred thousand take no more room than ten.

    ``runs`` are the seat of each run and how many machines it has, each with as many ranks as are ``busy``.
    """

    runs: tuple[tuple[Seat, int], ...]

    def __len__(self) -> int:
        return sum(machines * seat.busy for seat, machines in self.runs)

    def __iter__(self) -> Iterator[Seat]:
        return chain.from_iterable(repeat(seat, machines * seat.busy) for seat, machines in self.runs)

    def __getitem__(self, rank: int) -> Seat:
        left = rank
        for seat, machines in self.runs:
            if 0 <= left < machines * seat.busy:
                return seat
            left -= machines * seat.busy
        raise IndexError(f"rank {rank} of {len(self)}")

    @cached_property
    def kinds(self) -> tuple[Seat, ...]:
        """The seats that differ, in order."""
        return tuple(dict.fromkeys(seat for seat, _ in self.runs))

    @cached_property
    def numbers(self) -> np.ndarray:
        """By rank, which of the ``kinds`` its seat is."""
        places = [self.kinds.index(seat) for seat, _ in self.runs]
        return np.repeat(places, [machines * seat.busy for seat, machines in self.runs])

    @cached_property
    def machines(self) -> np.ndarray:
        """By rank, the number of its machine."""
        busy = [seat.busy for seat, machines in self.runs for _ in range(machines)]
        return np.repeat(np.arange(len(busy), dtype=np.int32), busy)


def seats(cluster: Cluster, workers: int, precision: str = "fp32") -> Seats:
    """One seat per worker, by rank.

    Raises PlanError when the cluster has fewer seats.
    """
    if workers > cluster.workers:
        raise PlanError(
            f"the plan needs {workers} workers and {cluster.name} has {cluster.workers}: lower dp, or give more workers"
        )
    filled = _filled(cluster, workers)
    return Seats(tuple((_seat(cluster, host, busy, precision), count) for host, count, busy in filled))


def kinds(cluster: Cluster, workers: int, precision: str = "fp32") -> tuple[Seat, ...]:
    """The seats of ``seats`` that differ, in order."""
    found = (_seat(cluster, host, busy, precision) for host, _, busy in _filled(cluster, workers))
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


def _seat(cluster: Cluster, host: Host, busy: int, precision: str) -> Seat:
    device = host.device
    rates = device.flops_per_second
    rate = rates.get(precision) or rates.get("fp32") or max(rates.values())
    reached = host.speed * (_shared(cluster, host, busy) if device.kind == "cpu" else 1.0)
    return Seat(
        host_name=host.name,
        device_kind=device.kind,
        busy=busy,
        flops_per_second=rate * reached,
        memory_bytes_per_second=device.memory_bytes_per_second * reached,
        kernel_seconds=device.kernel_seconds / host.speed,
        speed=host.speed / cluster.hosts[0].speed,
        available_bytes=host.memory_per_worker(busy),
        host_bytes=0 if device.kind == "cpu" else host.memory_bytes // busy,
        offload_bytes_per_second=host.offload_bytes_per_second,
        update_bytes_per_second=host.update_bytes_per_second,
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
