"""What workers do together around files: wait for each other, and hear what worker 0 found. No pickles travel."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from sheaf.cluster.answers import heard, told


def is_together() -> bool:
    """Whether there is a default process group of more than one worker."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Whether this is worker 0, or the only one."""
    return not is_together() or dist.get_rank() == 0


def barrier() -> None:
    """Wait until every worker is here."""
    if is_together():
        dist.all_reduce(torch.zeros(1))  # gloo's, whatever the device: dist.barrier() would take NCCL's


def from_first(function: Callable[[], Any]) -> Any:
    """What ``function`` gives on worker 0, on every worker; it must be of what JSON knows.

    A SheafError that it raises is raised on every worker.
    """
    if not is_together():
        return function()
    content, error = told(function) if is_first() else (b"", None)
    size = torch.tensor([len(content)])
    dist.broadcast(size, 0)
    sent = (
        torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if content
        else torch.empty(int(size), dtype=torch.uint8)
    )
    dist.broadcast(sent, 0)
    if error is not None:
        raise error
    return heard(sent.numpy().tobytes())
