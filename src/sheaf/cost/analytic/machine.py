"""The machine of a published run: a known cluster, with the links that the run names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from sheaf.cluster import Cluster, collective_seconds, known, read
from sheaf.cost.analytic.constants import kind_of
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
    assumed: tuple[str, ...] = ()  # devices that were taken as others

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
                return _all_reduce_seconds(self.cluster.name, n, size_bytes) * rounds / 2 / intra
            rate = self.intra_bytes_per_second * link.among(n) / link.bytes_per_second * intra
            return rounds * (n - 1) / n * size_bytes / rate + link.latency_seconds * n
        outside = self.host_bytes_per_second / group.beside * inter
        if group.on_host > 1:
            outside = min(outside, self.intra_bytes_per_second * intra)
        latency = (self.cluster.inter or self.cluster.intra).latency_seconds
        return rounds * ((n - 1) / n * size_bytes / outside + latency * max(1.0, float(group.hosts)) ** 0.5)


@lru_cache(maxsize=65536)
def _all_reduce_seconds(cluster: str, workers: int, size_bytes: float) -> float:
    return collective_seconds(_by_name()[cluster].intra, "all_reduce", workers, size_bytes)


def machine(work: Workload) -> Machine:
    """The machine of a run; a device that is not known is taken as one of the same generation, and that is noted.

    Raises Refused for a device of a generation that no known cluster has.
    """
    by_device = _by_device()
    found: list[Cluster] = []
    unknown: list[str] = []
    assumed: list[str] = []
    for device in work.devices:
        name = _known_as(device)
        if not name and (name := _kin_of(device)):
            assumed.append(f"hardware.gpu {device} taken as {name}: the nearest that is known")
        if name:
            found.append(_of_hosts(name, work.workers_per_host))
        else:
            unknown.append(f"hardware.gpu: {device!r} is not known; {nearest(device, by_device)}")
    if unknown or not found:
        raise Refused(unknown or ["hardware.gpu is absent: it was not published"])
    return _with_links(work, found, tuple(assumed))


def _of_hosts(device: str, workers: int) -> Cluster:
    """The known cluster of this device with so many workers a host; else the one with most."""
    clusters = [each for each in _by_name().values() if each.hosts[0].device.name == device]
    fitting = [each for each in clusters if each.hosts[0].workers == workers]
    return fitting[0] if fitting else max(clusters, key=lambda each: each.hosts[0].workers)


def _known_as(device: str) -> str:
    """The known device of this name, or the first that has all of its words; empty: none.

    >>> _known_as("NVIDIA A100 80GB PCIe"), _known_as("V100-16GB"), _known_as("A10")
    ('A100-PCIE-80GB', 'V100-SXM2-16GB', '')
    """
    by_device = _by_device()
    if device in by_device:
        return device
    said = set(_plain(device).split())
    return next((each for each in by_device if said and said <= set(_plain(each).split())), "")


def _kin_of(device: str) -> str:
    """The known device of the same generation that shares most words with this name; empty: none."""
    kind, said = kind_of(_plain(device).upper().replace(" ", "-")), set(_plain(device).split())
    kin = [each for each in _by_device() if kind_of(each) == kind]
    return max(kin, key=lambda each: len(said & set(_plain(each).split())), default="")


def _with_links(work: Workload, found: Sequence[Cluster], assumed: tuple[str, ...]) -> Machine:
    host = found[0].hosts[0]
    island = host.workers if host.workers > _RACK else work.workers_per_host
    intra = min(cluster.intra.bytes_per_second for cluster in found)
    if work.intra_bytes_per_second:
        intra = min(intra, work.intra_bytes_per_second)
    outside = min((cluster.inter or cluster.intra).bytes_per_second for cluster in found) * island
    if work.inter_bytes_per_second:
        outside = work.inter_bytes_per_second * island / work.workers_per_host
    return Machine(tuple(found), island, intra, outside, assumed)


def _rate(cluster: Cluster, precision: str) -> float:
    rates = cluster.hosts[0].device.flops_per_second
    wider = {"fp4": "fp8", "fp8": "bf16", "bf16": "fp16", "tf32": "fp32", "fp16": "bf16"}
    while precision not in rates and precision in wider:
        precision = wider[precision]
    return rates.get(precision, min(rates.values()))


def _plain(name: str) -> str:
    """Without makers' and boards' names.

    >>> _plain("NVIDIA A100-SXM4-80GB"), _plain("GeForce RTX 3090")
    ('a100 80gb', 'rtx 3090')
    """
    words = re.sub(r"[-_ ]+", " ", name.lower())
    return re.sub(r"\b(nvidia|geforce|tesla|amd|instinct|quadro|google|cloud|sxm\d?) ?", "", words).strip()


@cache
def _by_name() -> dict[str, Cluster]:
    return {cluster.name: cluster for cluster in map(read, known())}


@cache
def _by_device() -> dict[str, Cluster]:
    made: dict[str, Cluster] = {}
    for cluster in _by_name().values():
        made.setdefault(cluster.hosts[0].device.name, cluster)
    return made
