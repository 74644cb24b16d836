"""What this process has sent to other workers, counted where it is handed to the network."""

from collections import Counter
from typing import Any

Ends = tuple[Any, Any]  # the addresses of a connection: here, and there


def share(operation: str, workers: int) -> float:
    """What one of ``workers`` workers sends in a collective, as a share of its size.

    The size is that of the whole: what is summed, all that is gathered, all that a worker has for the others. A
    bandwidth-optimal ring (Patarasuk and Yuan, 2009), which gloo and NCCL have, reduces by sending twice what a gather
    does; sends from each to each take as much.

    >>> share("all_reduce", 4), share("all_gather", 4), share("trade", 2)
    (1.5, 0.75, 1.0)
    """
    if operation == "trade":
        return 1.0
    once = (workers - 1) / workers
    return 2 * once if operation == "all_reduce" else once


class Traffic:
    """Bytes sent so far: in collectives by what their algorithm sends, in messages and on lines as they are.

    Headers of the network are not in it. A line of which this process holds both ends, as a worker's to a shard of its
    own, does not count.
    """

    def __init__(self) -> None:
        self._messages = 0.0
        self._lines: Counter[Ends] = Counter()

    @property
    def sent_bytes(self) -> float:
        """What was sent to other processes."""
        lines = dict(self._lines)
        return self._messages + sum(size for (here, there), size in lines.items() if (there, here) not in lines)

    def collective(self, operation: str, size_bytes: int, workers: int) -> None:
        """Count this worker's part of a collective of that size."""
        self._messages += share(operation, workers) * size_bytes

    def message(self, size_bytes: int) -> None:
        """Count a message to another worker."""
        self._messages += size_bytes

    def line(self, ends: Ends, size_bytes: int) -> None:
        """Count what was written to a connection."""
        self._lines[ends] += size_bytes


traffic = Traffic()
