"""The machine of a published run: a known cluster, with the links that the run names."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from sheaf.cluster import Cluster, collective_seconds, known, read
from sheaf.cost.analytic.rows import Refused
from sheaf.cost.analytic.workload import Workload
from sheaf.errors import nearest

_RACK = 16  # workers: a host of more is a rack or a slice whose links are those of one host


@dataclass(frozen=True)
class Group:
    """Workers that communicate: how many, how many of them on one host, and how many such groups a host has."""

    workers: int
    on_host: int
    beside: int

    @property
    def hosts(self) -> int:
        """Hosts that it spans."""
        return -(-self.workers // max(1, self.on_host))


@dataclass(frozen=True)
class Machine:
    """One run's cluster; ``island`` workers share the links of a host."""

    clusters: tuple[Cluster, ...]
    island: int
    intra_bytes_per_second: float
    host_bytes_per_second: float  # leaving one host, all of its workers together

    @property
    def cluster(self) -> Cluster:
        """Of its first kind of device."""
        return self.clusters[0]

    def flops_per_second(self, precision: str) -> float:
        """Of the slowest kind of device."""
        return min(_rate(cluster, precision) for cluster in self.clusters)

    @property
    def memory_bytes_per_second(self) -> float:
        """Of the slowest kind of device."""
        return min(cluster.hosts[0].device.memory_bytes_per_second for cluster in self.clusters)

    @property
    def memory_bytes(self) -> float:
        """Of the smallest kind of device."""
        return min(cluster.hosts[0].device.memory_bytes for cluster in self.clusters)

    @property
    def multiprocessors(self) -> int:
        """Tiles at once; 1 where the file does not say."""
        return max(1, min(cluster.hosts[0].device.multiprocessors for cluster in self.clusters))

    def group(self, workers: int, stride: int = 1) -> Group:
        """A group of ranks ``stride`` apart, where consecutive ranks fill host after host."""
        on_host = max(1, min(workers, self.island // stride))
        return Group(workers, on_host, max(1, self.island // on_host))

    def ring_seconds(self, group: Group, size_bytes: float, *, intra: float, inter: float, rounds: float) -> float:
        """A ring's time over ``size_bytes``: (n - 1)/n of them ``rounds`` times (2: all-reduce, 1: gather or scatter).

        Within one host an all-reduce takes what was measured there. Across hosts the bytes pass every host once, over
        this group's share of the host's network cards, at the slower of the two tiers.
        """
        n = group.workers
        if n < 2 or size_bytes <= 0:
            return 0.0
        if group.hosts == 1:
            link = self.cluster.intra
            if link.timings and self.intra_bytes_per_second >= link.bytes_per_second:
                return collective_seconds(link, "all_reduce", n, size_bytes) * rounds / 2 / intra
            return rounds * (n - 1) / n * size_bytes / (self.intra_bytes_per_second * intra) + link.latency_seconds * n
        outside = self.host_bytes_per_second / group.beside * inter
        if group.on_host > 1:
            outside = min(outside, self.intra_bytes_per_second * intra)
        latency = (self.cluster.inter or self.cluster.intra).latency_seconds
        return rounds * ((n - 1) / n * size_bytes / outside + latency * max(1.0, float(group.hosts)) ** 0.5)


def machine(work: Workload) -> Machine:
    """The machine of a run. Raises Refused for a device that no known cluster has."""
    by_device = _by_device()
    found: list[Cluster] = []
    unknown: list[str] = []
    for device in work.devices:
        name = device if device in by_device else next((each for each in by_device if each.startswith(device)), "")
        name = name or next((each for each in by_device if _plain(each).startswith(_plain(device))), "")
        if name:
            found.append(by_device[name])
        else:
            unknown.append(f"hardware.gpu: {device!r} is not known; {nearest(device, by_device)}")
    if unknown or not found:
        raise Refused(unknown or ["hardware.gpu is absent: it was not published"])
    return _with_links(work, found)


def _with_links(work: Workload, found: Sequence[Cluster]) -> Machine:
    host = found[0].hosts[0]
    island = host.workers if host.workers > _RACK else work.workers_per_host
    intra = min(cluster.intra.bytes_per_second for cluster in found)
    if work.intra_bytes_per_second:
        intra = min(intra, work.intra_bytes_per_second)
    outside = min((cluster.inter or cluster.intra).bytes_per_second for cluster in found) * island
    if work.inter_bytes_per_second:
        outside = work.inter_bytes_per_second * island / work.workers_per_host
    return Machine(tuple(found), island, intra, outside)


def _rate(cluster: Cluster, precision: str) -> float:
    rates = cluster.hosts[0].device.flops_per_second
    wider = {"fp4": "fp8", "fp8": "bf16", "bf16": "fp16", "tf32": "fp32", "fp16": "bf16"}
    while precision not in rates and precision in wider:
        precision = wider[precision]
    return rates.get(precision, min(rates.values()))


def _plain(name: str) -> str:
    return (
        name.replace("SXM2-", "")
        .replace("SXM3-", "")
        .replace("SXM4-", "")
        .replace("SXM5-", "")
        .replace("-", " ")
        .lower()
    )


@cache
def _by_device() -> dict[str, Cluster]:
    made: dict[str, Cluster] = {}
    for name in known():
        cluster = read(name)
        made.setdefault(cluster.hosts[0].device.name, replace(cluster))
    return made
