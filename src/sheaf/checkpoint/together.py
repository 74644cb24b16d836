"""What workers do together around files: wait for each other, and hear what worker 0 found. No pickles travel."""

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from sheaf import errors
from sheaf.errors import RunError, SheafError


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
    told, error = b"", None
    if dist.get_rank() == 0:
        try:
            told = json.dumps({"value": function()}).encode()
        except SheafError as raised:
            error = raised
            told = json.dumps({"error": type(raised).__name__, "message": str(raised)}).encode()
    size = torch.tensor([len(told)])
    dist.broadcast(size, 0)
    content = (
        torch.frombuffer(bytearray(told), dtype=torch.uint8) if told else torch.empty(int(size), dtype=torch.uint8)
    )
    dist.broadcast(content, 0)
    if error is not None:
        raise error
    answer: dict[str, Any] = json.loads(content.numpy().tobytes())
    if "error" in answer:
        raise _error(answer["error"], answer["message"])
    return answer["value"]


def _error(name: str, message: str) -> SheafError:
    kind = getattr(errors, name, RunError)
    return (
        kind(message)
        if kind in (errors.RunError, errors.TaskError, errors.PlanError, errors.DataError)
        else RunError(message)
    )
