"""Workers, devices and links as values; measured here or read from a file."""

from dataclasses import dataclass, field

OVERLAP_RANGE = (-2.0, 1.0)  # all of it hides; at worst, communication takes three times as long as alone


@dataclass(frozen=True, kw_only=True)
class Device:
    """What one worker computes on.

    ``flops_per_second`` maps a precision (fp64, fp32, tf32, bf16, fp16, fp8, fp4) to the matrix rate that is reached in
    practice on large matrices with ``threads`` threads; a worker of a shared host reaches ``contention[n]`` of it while
    n workers of the host are busy. ``thread_speedup`` maps a number of threads to the rate relative to one thread.
    A CPU device's ``memory_bytes`` is its host's, which all workers of the host share.
    """

    name: str
    kind: str  # "cpu", "cuda" or "xla", as in torch.device
    flops_per_second: dict[str, float]
    memory_bytes_per_second: float
    memory_bytes: int
    kernel_seconds: float = 0.0  # launching one kernel from eager Python
    threads: int = 1
    thread_speedup: dict[int, float] = field(default_factory=dict[int, float])
    multiprocessors: int = 0  # of an accelerator: tiles of a matrix product that are computed at once; 0: not known
    price_per_hour: float = 0.0  # of one such device (a CPU: of its host), in the cluster's currency; 0: not known
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One measured collective: every worker passed ``size_bytes`` in (all_gather: the gathered size)."""

    operation: str  # all_reduce, reduce_scatter, all_gather, broadcast, barrier
    workers: int
    size_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Link:
    """How workers of one tier reach each other; ``timings`` win over latency and bandwidth where they exist."""

    name: str
    latency_seconds: float
    bytes_per_second: float  # one direction, per worker
    timings: tuple[Timing, ...] = ()
    direct: int = 0  # so many workers, each with links of its own to each other; 0: a switch, or one shared way
    source: str = ""

    def among(self, workers: int) -> float:
        """Bytes per second of one worker in a group of so many: direct links count as far as they lead into it."""
        if 1 < workers < self.direct:
            return self.bytes_per_second * (workers - 1) / (self.direct - 1)
        return self.bytes_per_second


@dataclass(frozen=True, kw_only=True)
class Tier:
    """Workers closer to each other than to the rest: a socket within a host; a rack, a hall or a region of hosts.

    Each run of ``workers`` consecutive workers of full hosts is one; two workers of it that no smaller tier (nor, for
    tiers of hosts, one host) holds reach each other over its link.
    """

    name: str
    workers: int
    latency_seconds: float
    bytes_per_second: float  # one direction, per worker
    source: str = ""

    @property
    def link(self) -> Link:
        """The link among its workers."""
        return Link(
            name=self.name,
            latency_seconds=self.latency_seconds,
            bytes_per_second=self.bytes_per_second,
            source=self.source,
        )


@dataclass(frozen=True, kw_only=True)
class Host:
    """A kind of machine and how many there are of it."""

    name: str
    count: int
    workers: int  # that may run on one such machine (CPU hosts: as many as cores unless asked otherwise)
    device: Device
    cores: int
    memory_bytes: int  # of the machine, shared by CPU workers; where measured, what was free
    speed: float = 1.0  # relative to the device's figures
    # Of its memory: each way to one of its accelerators while all copy, and what an optimizer on all cores reads and
    # writes of it; 0: not known.
    offload_bytes_per_second: float = 0.0
    update_bytes_per_second: float = 0.0

    def memory_per_worker(self, workers: int | None = None) -> int:
        """Bytes that each of ``workers`` busy workers of one such machine may use (all of them unless given).

        CPU workers share the machine's memory; an accelerator's worker has its own.
        """
        if self.device.kind != "cpu":
            return self.device.memory_bytes
        return self.memory_bytes // max(1, self.workers if workers is None else min(workers, self.workers))


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A set of hosts, the link inside a host and the link between hosts; ``tiers`` name links between those.

    A socket's tier is of fewer workers than a host, a rack's or a region's of whole hosts: ``intra`` then is between
    sockets, ``inter`` between the largest of them.

    ``contention`` maps n busy workers of one CPU host, each with its device's number of threads, to the share of its
    lone speed that each reaches.
    ``overlap`` is the share of communication that hides behind computation when there is enough of it; below zero
    where both need the same cores and take longer together than one after the other.
    """

    name: str
    backend: str  # gloo, nccl or xla
    hosts: tuple[Host, ...]
    intra: Link
    inter: Link | None = None
    contention: dict[int, float] = field(default_factory=dict[int, float])
    overlap: float = 0.0
    host_seconds: float = 0.0  # of a step on the host, beside what is measured of a task: from a run
    source: str = ""
    tiers: tuple[Tier, ...] = ()
    currency: str = ""  # of every ``price_per_hour``

    @property
    def workers(self) -> int:
        """All workers of all hosts."""
        return sum(host.count * host.workers for host in self.hosts)
