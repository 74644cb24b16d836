"""Clusters for tests, drawn by Hypothesis, and what a worker might have measured.

Strategies draw descriptions, and `built` makes the values inside the test: beartype draws a random item of each
container that it checks, and Hypothesis forbids that within a strategy.
"""

from typing import Any

from hypothesis import strategies as st

from sheaf.cluster import OPERATIONS, Cluster, Device, Host, Link, Timing
from sheaf.task import PRECISIONS


def described(kind: type, /, **fields: st.SearchStrategy) -> st.SearchStrategy:
    return st.tuples(st.just(kind), st.fixed_dictionaries(fields))


def built(description: Any) -> Any:
    if isinstance(description, tuple):
        kind, fields = description
        return kind(**{name: built(value) for name, value in fields.items()})
    return tuple(built(item) for item in description) if isinstance(description, list) else description


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
positive = st.floats(1e-9, 1e18, allow_nan=False)
natural = st.integers(1, 2**50)
shares = st.floats(0, 1)

timings = described(
    Timing,
    operation=st.sampled_from(OPERATIONS),
    workers=st.integers(2, 64),
    size_bytes=st.integers(0, 2**40),
    seconds=st.floats(0, 1e6),
)
links = described(
    Link,
    name=texts,
    latency_seconds=st.floats(0, 10),
    bytes_per_second=positive,
    timings=st.lists(timings, max_size=6),
    source=texts,
)
devices = described(
    Device,
    name=texts,
    kind=st.sampled_from(("cpu", "cuda")),
    flops_per_second=st.dictionaries(st.sampled_from(tuple(PRECISIONS)), positive),
    memory_bytes_per_second=positive,
    memory_bytes=natural,
    kernel_seconds=st.floats(0, 1),
    threads=st.integers(1, 64),
    thread_speedup=st.dictionaries(st.integers(1, 64), positive, max_size=3),
    source=texts,
)
hosts = described(
    Host,
    name=texts,
    count=st.integers(1, 1000),
    workers=st.integers(1, 64),
    device=devices,
    cores=st.integers(1, 512),
    memory_bytes=natural,
    speed=positive,
)
clusters = described(
    Cluster,
    name=texts,
    backend=st.sampled_from(("gloo", "nccl")),
    hosts=st.lists(hosts, min_size=1, max_size=3),
    intra=links,
    inter=links,
    contention=st.dictionaries(st.integers(1, 64), st.floats(0, 1, exclude_min=True), max_size=4),
    overlap=shares,
    source=texts,
)


def measured(rank: int, host: str, *, rate: float = 1e10, timings: list[dict] | None = None, busy: dict | None = None):
    """What one worker's measure_rank might return."""
    return {
        "rank": rank,
        "host": host,
        "backend": "gloo",
        "cores": 2,
        "threads": 1,
        "host_memory_bytes": 8_000_000_000,
        "device": {"name": "a processor", "kind": "cpu", "memory_bytes": 8_000_000_000},
        "torch": "2.13.0",
        "date": "2026-01-01",
        "cores_taken": 0.1,
        "flops_per_second": {"fp64": rate / 2, "fp32": rate, "bf16": rate, "fp16": rate},
        "memory_bytes_per_second": 1e10,
        "kernel_seconds": 1e-6,
        "thread_speedup": {"1": 1.0, "2": 1.9},
        "busy": {"1": rate} if busy is None else busy,
        "timings": timings or [],
        "overlap": 0.5,
    }
