"""Contenders timed in turn, round after round, so that a noisy machine is noisy for all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class Ratio:
    """How many times the peer's throughput Sheaf reaches: the median over rounds, and the quartiles."""

    sheaf: str
    peer: str
    median: float
    low: float
    high: float
    sheaf_seconds: float
    peer_seconds: float


def rounds(
    contenders: Mapping[str, Callable[[], object]],
    *,
    count: int,
    steps: int,
    around: Callable[[int], AbstractContextManager[object]] = nullcontext,
) -> dict[str, list[float]]:
    """Seconds per step of every contender in each of ``count`` rounds of ``steps`` steps, after one round to warm up.

    The order turns from round to round, so that nobody always follows the same one. ``around(round)`` surrounds what
    is timed of each.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(count + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            _barrier()
            with around(turn):
                start = time.perf_counter()
                for _ in range(steps):
                    contenders[name]()
                _barrier()
                took = (time.perf_counter() - start) / steps
            if turn:
                seconds[name].append(took)
    return seconds


def ratio(seconds: dict[str, list[float]], sheaf: str, peer: str) -> Ratio:
    """Throughput of one contender over another's, round by round."""
    each = [theirs / ours for ours, theirs in zip(seconds[sheaf], seconds[peer], strict=True)]
    low, median, high = statistics.quantiles(each, n=4)
    ours, theirs = statistics.median(seconds[sheaf]), statistics.median(seconds[peer])
    return Ratio(sheaf, peer, median, low, high, ours, theirs)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
