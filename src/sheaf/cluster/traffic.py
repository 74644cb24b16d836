"""What this process has sent to other workers, counted where it is handed to the network."""

import math
from collections import Counter
from typing import Any

# Of a message gloo says that it is coming, that the one from the other side may come, and what it is (its tcp/pair.cc).
CONTROL_BYTES = 3 * 48
SEGMENT_BYTES = 2**20  # the most that its ring sends at once
# Counted by the kernel on loopback and between network namespaces: these three are a packet each, about two of three
# are acknowledged by one more, and the kernel hands data to the link 64 KiB at a time.
PACKETS, DATA_PACKET_BYTES = 3.7, 2**16
HEADER_BYTES = 66  # of Ethernet, IPv4, and TCP with its timestamps

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


def messages(operation: str, workers: int, size_bytes: int) -> float:
    """How many messages one of ``workers`` workers sends in a collective on gloo.

    Its all-reduce is a ring of segments, at least two for each worker (allreduce.cc). The others go from each to each,
    as ``primitives`` has them.

    >>> messages("all_reduce", 4, 1000), messages("all_reduce", 4, 9 * 2**20), messages("all_gather", 4, 1000)
    (12, 18, 3)
    """
    if operation == "trade":
        return min(1, workers - 1)
    if operation == "broadcast":  # of whoever's turn it is
        return (workers - 1) / workers
    if operation != "all_reduce":
        return workers - 1
    return 2 * (workers - 1) * max(2, math.ceil(size_bytes / SEGMENT_BYTES / workers))


def wire_bytes(sent_bytes: float, messages: float) -> float:
    """What the link carries when ``sent_bytes``, in messages of gloo, are handed to the network: with all headers.

    >>> wire_bytes(0, 12) - 12 * CONTROL_BYTES < wire_bytes(12 * CONTROL_BYTES, 12)
    True
    """
    return sent_bytes + HEADER_BYTES * (PACKETS * messages + sent_bytes / DATA_PACKET_BYTES)


class Traffic:
    """Bytes sent so far: in collectives by what their algorithm sends, in messages and on lines as they are.

    What gloo says about its messages is in it; headers of the network are not. A line of which this process holds both
    ends, as a worker's to a shard of its own, does not count.
    """

    def __init__(self) -> None:
        self._bytes = 0.0
        self._lines: Counter[Ends] = Counter()

    @property
    def sent_bytes(self) -> float:
        """What was sent to other processes."""
        lines = dict(self._lines)
        return self._bytes + sum(size for (here, there), size in lines.items() if (there, here) not in lines)

    def collective(self, operation: str, size_bytes: int, workers: int, *, gloo: bool = False) -> None:
        """Count this worker's part of a collective of that size; on gloo, with what it says about its messages."""
        self._bytes += share(operation, workers) * size_bytes
        if gloo:
            self._bytes += CONTROL_BYTES * messages(operation, workers, size_bytes)

    def message(self, size_bytes: int, *, gloo: int = 0) -> None:
        """Count what is sent to other workers, in so many messages of gloo, which brings as many."""
        self._bytes += size_bytes + CONTROL_BYTES * gloo

    def line(self, ends: Ends, size_bytes: int) -> None:
        """Count what was written to a connection."""
        self._lines[ends] += size_bytes


traffic = Traffic()
