"""How long a collective takes on a link: interpolated where it was measured, a latency-bandwidth model elsewhere."""

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence

from sheaf.cluster.cluster import Link, Timing
from sheaf.errors import ClusterError, nearest

OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "barrier")

# Below this size a message's time is mostly latency, and tells nothing of bandwidth.
BANDWIDTH_FROM_BYTES = 64 * 1024


def collective_seconds(link: Link, operation: str, workers: int, size_bytes: int | float) -> float:  # noqa: PYI041
    """Seconds for one collective of ``workers`` workers on ``size_bytes`` (all_gather: the gathered size).

    Where the link holds timings of the operation for that number of workers: log-log interpolation between them, the
    smallest one's time below them, and beyond them their own bytes per second. Where it holds timings for fewer and
    for more workers: between those two. Elsewhere ``model_seconds``. Never falls as the size grows.

    Raises ClusterError for an unknown operation.

    >>> ethernet = Link(name="1 Gbit/s", latency_seconds=1e-4, bytes_per_second=1e8)
    >>> collective_seconds(ethernet, "all_reduce", 2, 1e8)
    1.0002
    """
    if operation not in OPERATIONS:
        raise ClusterError(f"{operation!r} is not a collective; {nearest(operation, OPERATIONS)}")
    if workers <= 1:
        return 0.0
    counts = {timing.workers for timing in link.timings if timing.operation == operation}
    if workers in counts:
        return _measured_seconds(link, operation, workers, size_bytes)
    fewer = max((count for count in counts if 1 < count < workers), default=None)
    more = min((count for count in counts if count > workers), default=None)
    if fewer is not None and more is not None:
        share = (workers - fewer) / (more - fewer)
        low = _measured_seconds(link, operation, fewer, size_bytes)
        high = _measured_seconds(link, operation, more, size_bytes)
        return low + share * (high - low)
    return model_seconds(link, operation, workers, size_bytes)


def model_seconds(link: Link, operation: str, workers: int, size_bytes: int | float) -> float:  # noqa: PYI041
    """Seconds by the latency-bandwidth model: rounds x latency + share x bytes / bandwidth.

    Source: Thakur, Rabenseifner, Gropp, Optimization of Collective Communication Operations in MPICH, 2005. The
    bandwidth terms are those of the ring; the latency terms those of recursive halving and doubling, as libraries
    leave the ring where latency counts.
    """
    rounds, share = _rounds_and_share(operation, workers)
    return rounds * link.latency_seconds + share * size_bytes / link.among(workers)


def fit(timings: Sequence[Timing]) -> tuple[float, float]:
    """The latency (seconds) and bandwidth (bytes per second) with which the model comes closest to ``timings``.

    Latency: the smallest message's time over its rounds, the median over operations and worker counts. Bandwidth:
    least squares of the relative error over messages of 64 KiB and more (over all where there are none).
    Raises ClusterError without a timing of a collective that carries bytes.
    """
    carrying = [timing for timing in timings if timing.workers > 1 and timing.size_bytes > 0]
    if not carrying:
        raise ClusterError("no timings to fit a link to: measure with two workers or more")
    smallest: dict[tuple[str, int], Timing] = {}
    for timing in sorted(carrying, key=lambda timing: -timing.size_bytes):
        smallest[timing.operation, timing.workers] = timing
    latency_seconds = statistics.median(
        timing.seconds / _rounds_and_share(timing.operation, timing.workers)[0] for timing in smallest.values()
    )
    large = [timing for timing in carrying if timing.size_bytes >= BANDWIDTH_FROM_BYTES] or carrying
    return latency_seconds, _bandwidth(large, latency_seconds)


def _bandwidth(timings: Iterable[Timing], latency_seconds: float) -> float:
    above, below, best = 0.0, 0.0, 0.0
    for timing in timings:
        rounds, share = _rounds_and_share(timing.operation, timing.workers)
        carried = share * timing.size_bytes / timing.seconds
        above += carried * (1 - rounds * latency_seconds / timing.seconds)
        below += carried**2
        best = max(best, carried)
    return below / above if above > 0 else best


def _rounds_and_share(operation: str, workers: int) -> tuple[float, float]:
    doublings = float(math.ceil(math.log2(workers)))
    ring_share = (workers - 1) / workers
    return {
        "all_reduce": (2 * doublings, 2 * ring_share),
        "reduce_scatter": (doublings, ring_share),
        "all_gather": (doublings, ring_share),
        "broadcast": (2 * doublings, 2 * ring_share),  # scatter, then all-gather
        "barrier": (doublings, 0.0),
    }[operation]


def _measured_seconds(link: Link, operation: str, workers: int, size_bytes: int | float) -> float:  # noqa: PYI041
    points = [
        (timing.size_bytes, timing.seconds)
        for timing in link.timings
        if timing.operation == operation and timing.workers == workers
    ]
    points.sort()
    if operation == "barrier":
        return statistics.median(seconds for _, seconds in points)
    curve: list[tuple[int, float]] = []
    for size, seconds in points:  # noise may make a larger message look faster: the curve never falls
        seconds = max(seconds, curve[-1][1]) if curve else seconds
        if curve and curve[-1][0] == size:
            curve.pop()
        curve.append((size, seconds))
    if size_bytes <= curve[0][0]:
        return curve[0][1]
    for (size, seconds), (next_size, next_seconds) in itertools.pairwise(curve):
        if size_bytes <= next_size:
            if size <= 0 or seconds <= 0:
                share = (size_bytes - size) / (next_size - size)
                return seconds + share * (next_seconds - seconds)
            share = math.log(size_bytes / size) / math.log(next_size / size)
            return seconds * (next_seconds / seconds) ** share
    last_size, last_seconds = curve[-1]
    rising = last_seconds > curve[0][1]
    seconds_per_byte = (
        (last_seconds - curve[0][1]) / (last_size - curve[0][0])
        if rising
        else _rounds_and_share(operation, workers)[1] / link.among(workers)
    )
    return last_seconds + (size_bytes - last_size) * seconds_per_byte
