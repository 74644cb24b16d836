"""How long the collectives take among the workers of a group, as Sheaf runs them."""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from sheaf.cluster import primitives
from sheaf.cluster.cluster import OVERLAP_RANGE
from sheaf.cluster.links import OPERATIONS
from sheaf.cluster.rates import synchronize

_FEWEST, _MOST = 3, 31  # repetitions of one measurement
_BANDWIDTH_SEEN_BYTES = 2**20
_LEAST_BYTES = 2**16
_SLOW_BYTES_PER_SECOND = 1e8  # 1 Gbit/s
_LONG_ENOUGH_SECONDS = 2e-3  # shorter operations are repeated back to back until this


def timed_collectives(
    group: dist.ProcessGroup, device: torch.device, sizes_bytes: tuple[int, ...], seconds_budget: float
) -> list[tuple[str, int, float]]:
    """(operation, size_bytes, seconds) for every operation and size, the slowest worker's time, the median.

    Collective over ``group``; returns the same list on all its workers. Sizes are measured in rising order; one that
    the budget cannot hold any more is left out, and so are larger ones of that operation.
    """
    deadline = time.perf_counter() + seconds_budget
    cells = [("barrier", 0), *((op, size) for size in sorted(sizes_bytes) for op in OPERATIONS if op != "barrier")]
    last: dict[str, tuple[int, float]] = {}  # operation -> size and seconds of the last measurement
    dropped: set[str] = set()
    timings: list[tuple[str, int, float]] = []
    for index, (operation, size_bytes) in enumerate(cells):
        if operation in dropped:
            continue
        left_seconds = deadline - time.perf_counter()
        fits = operation not in last or (_FEWEST + 2) * _expected_seconds(*last[operation], size_bytes) < left_seconds
        share_seconds = max(0.0, left_seconds) / (len(cells) - index)
        if not _agreed(float(fits), group, device):
            dropped.add(operation)
            continue
        seconds = _seconds_of(operation, size_bytes, group, device, share_seconds)
        last[operation] = (size_bytes, seconds)
        timings.append((operation, size_bytes, seconds))
    return timings


def _expected_seconds(last_size_bytes: int, last_seconds: float, size_bytes: int) -> float:
    """What a larger message may take, from the one before; a small one tells nothing of bandwidth."""
    if last_size_bytes >= _BANDWIDTH_SEEN_BYTES:
        return last_seconds * size_bytes / last_size_bytes
    return last_seconds + size_bytes / _SLOW_BYTES_PER_SECOND


def _seconds_of(
    operation: str, size_bytes: int, group: dist.ProcessGroup, device: torch.device, share_seconds: float
) -> float:
    run = collective(operation, size_bytes, group, device)
    run()
    started = time.perf_counter()
    once = _slowest([_timed(run, 1, group, device)], group, device)[0]
    beside = max(0.0, time.perf_counter() - started - once)  # waiting for each other before it
    # Back to back, a broadcast's root runs ahead of the others: only the operations that wait for all are repeated so.
    inner = 1 if operation == "broadcast" else max(1, min(20, round(_LONG_ENOUGH_SECONDS / max(once, 1e-6))))
    repetitions = max(_FEWEST, min(_MOST, int(share_seconds / max(once * inner + beside, 1e-6))))
    inner, repetitions = (int(_agreed(float(value), group, device)) for value in (inner, repetitions))
    times = _slowest([_timed(run, inner, group, device) for _ in range(repetitions)], group, device)
    return sorted(times)[len(times) // 2]


def collective(operation: str, size_bytes: int, group: dist.ProcessGroup, device: torch.device) -> Callable[[], None]:
    """A call that runs one collective on ``size_bytes`` of fp32 (rounded up to equal parts) and waits for it."""
    workers = dist.get_world_size(group)
    elements = -(-max(4, size_bytes) // (4 * workers)) * workers
    whole = torch.ones(elements, device=device)
    part = torch.ones(elements // workers, device=device)
    root = dist.get_global_rank(group, 0)
    runs: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "reduce_scatter": lambda: primitives.reduce_scatter(part, whole, group),
        "all_gather": lambda: primitives.all_gather(whole, part, group),
        "broadcast": lambda: dist.broadcast(whole, src=root, group=group),
        "barrier": lambda: barrier(group, device),
    }
    run = runs[operation]

    def call() -> None:
        run()
        synchronize(device)

    return call


def barrier(group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Wait for every worker of the group; on an accelerator by a one-element all-reduce, which names no device."""
    if device.type == "cpu":
        dist.barrier(group=group)
    else:
        dist.all_reduce(torch.zeros(1, device=device), group=group)
        synchronize(device)


def within(group: dist.ProcessGroup, device: torch.device, seconds: float, *, most_bytes: int) -> int:
    """The most bytes, from 64 KiB on in steps of four times, that an all-reduce sums in so many seconds.

    Collective over ``group``.
    """
    size_bytes = min(most_bytes, _LEAST_BYTES)
    while size_bytes < most_bytes:
        once = _seconds_of("all_reduce", 4 * size_bytes, group, device, 0.0)
        if once > seconds:
            break
        size_bytes *= 4
    return min(size_bytes, most_bytes)


def overlap_share(group: dist.ProcessGroup, device: torch.device, *, size_bytes: int, repetitions: int) -> float:
    """The share of the shorter of computing and all-reducing that hides behind the other; negative where they collide.

    (computing + communicating - both at once) / the shorter one, with as much computing as takes the same time.
    Collective over ``group``.
    """
    whole = torch.ones(max(1, size_bytes // 4), device=device)
    side = 256 if device.type == "cpu" else 4096
    left, product = torch.ones(side, side, device=device), torch.empty(side, side, device=device)

    def compute(products: int) -> None:
        for _ in range(products):
            torch.mm(left, left, out=product)
        synchronize(device)

    def communicate() -> None:
        dist.all_reduce(whole, group=group)
        synchronize(device)

    def both(products: int) -> None:
        work = dist.all_reduce(whole, group=group, async_op=True)
        for _ in range(products):
            torch.mm(left, left, out=product)
        if work is not None:
            work.wait()
        synchronize(device)

    compute(2)
    communicate()
    one = _slowest([_timed(lambda: compute(4), 1, group, device)], group, device)[0] / 4
    sent = _slowest([_timed(communicate, 1, group, device) for _ in range(3)], group, device)[1]
    products = int(_agreed(float(max(1, min(500, round(sent / max(one, 1e-9))))), group, device))
    times: list[float] = []
    for _ in range(repetitions):
        whole.fill_(1.0)
        times += [_timed(lambda: compute(products), 1, group, device), _timed(communicate, 1, group, device)]
        times.append(_timed(lambda: both(products), 1, group, device))
    slowest = _slowest(times, group, device)
    middle = repetitions // 2
    computing, communicating, together = (sorted(slowest[start::3])[middle] for start in range(3))
    low, high = OVERLAP_RANGE
    return min(high, max(low, (computing + communicating - together) / min(computing, communicating)))


def _timed(run: Callable[[], None], times: int, group: dist.ProcessGroup, device: torch.device) -> float:
    barrier(group, device)
    started = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - started) / times


def _slowest(times: list[float], group: dist.ProcessGroup, device: torch.device) -> list[float]:
    seconds = torch.tensor(times, dtype=torch.float64, device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=group)
    return seconds.tolist()


def _agreed(value: float, group: dist.ProcessGroup, device: torch.device) -> float:
    """The value of the group's first worker: clocks differ, and all must run the same collectives."""
    agreed = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(agreed, src=dist.get_global_rank(group, 0), group=group)
    return float(agreed.item())
