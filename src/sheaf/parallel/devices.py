"""Which device a worker computes on, whether its process group carries tensors of it, and how full it has been."""

import os
import resource

import torch
import torch.distributed as dist

from sheaf.cluster.primitives import backends, carried_accelerator
from sheaf.errors import PlanError


def default_device() -> torch.device:
    """This worker's device: the current accelerator, or that of torchrun's local rank when none was set; else the CPU.

    The accelerator becomes the current one. Workers whose group has gloo alone compute on CPUs, as those of a machine
    that has not an accelerator for each.
    """
    accelerator = carried_accelerator()
    if accelerator is None:
        return torch.device("cpu")
    index, local = torch.accelerator.current_device_index(), os.environ.get("LOCAL_RANK", "")
    if index == 0 and local.isdecimal() and dist.is_initialized() and int(local) < torch.accelerator.device_count():
        index = int(local)
        torch.accelerator.set_device_index(index)
    return torch.device(accelerator.type, index)


def refuse_uncarried(device: torch.device) -> None:
    """Raise PlanError where the default process group does not carry tensors of the device, or those of the host."""
    known = backends()
    if not known:
        return
    kind = device.type
    if "cpu" not in known:
        raise PlanError(
            f"the process group carries tensors of {', '.join(known)} only, and workers tell each other some things "
            f"through their hosts: use init_process_group('cpu:gloo,{kind}:nccl'), or leave it to sheaf.build"
        )
    if kind != "cpu" and known.get(kind, "gloo") == "gloo":
        raise PlanError(
            f"device {device} was given, and the process group has gloo only, which is for the hosts' tensors: give "
            f"device=torch.device('cpu'), or start one worker per accelerator with 'cpu:gloo,{kind}:nccl'"
        )


def memory_bytes(device: torch.device) -> int:
    """The most memory that this worker has held: of its process, or on its accelerator."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(torch.accelerator.max_memory_allocated(device))
