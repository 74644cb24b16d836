"""The optimizer in the host's memory: it steps copies there, from gradients that come down, and values go back up.

Ren et al., 2021, "ZeRO-Offload: Democratizing Billion-Scale Model Training" (arXiv:2101.06840): the accelerator keeps
parameters and gradients, the host the optimizer's state and the values that it steps.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim

from sheaf.cluster.machine import available_cores
from sheaf.errors import PlanError
from sheaf.graph.profile import on_threads
from sheaf.parallel.optimizers import sliced_optimizer
from sheaf.parallel.portion import Portion
from sheaf.plans.layout import Piece

_FUSED = (optim.Adam, optim.AdamW, optim.SGD, optim.Adagrad)  # torch steps these in one pass over the host's memory
_OPEN, _OTHERWISE = ("fused", "foreach"), ("capturable", "differentiable")  # settings of how a task wants to step


class Offload:
    """A task's ``optimizer`` over copies in the host's memory of the tensors that it would step on the device.

    ``stepped`` are those tensors by parameter name, as ``sliced_optimizer`` takes them; what is not trained is not
    copied. Copies and gradients are pinned where there is an accelerator, and copied while it goes on.
    """

    def __init__(self, portion: Portion, stepped: Mapping[str, tuple[Tensor, Piece | None]]) -> None:
        tensors = {name: tensor for name, (tensor, _) in stepped.items()}
        self._device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
        held = {name: tensor for name, tensor in tensors.items() if portion.parameters[name].requires_grad}
        self._pairs = {name: (tensor, self._copy(tensor)) for name, tensor in held.items()}
        self._gradients = {name: self._room(tensor) for name, tensor in held.items()}
        self.tensors = tensors | {name: copy for name, (_, copy) in self._pairs.items()}
        self.optimizer = sliced_optimizer(
            portion, {name: (self.tensors[name], piece) for name, (_, piece) in stepped.items()}
        )

    def step(self) -> None:
        """Bring the gradients down, let the optimizer step, and bring the new values up.

        A parameter without a gradient has none here either. Raises PlanError for a sparse gradient.
        """
        with torch.no_grad():
            for name, (tensor, copy) in self._pairs.items():
                copy.grad = self._brought(name, tensor.grad)
        self._wait()
        if self._device.type == "cpu":
            self.optimizer.step()
        else:
            with in_one_pass(self.optimizer), on_threads(_own_cores()):
                self.optimizer.step()
        with torch.no_grad():
            for tensor, copy in self._pairs.values():
                tensor.copy_(copy, non_blocking=True)

    def reread(self) -> None:
        """The device has other values than those that the optimizer stepped: take them."""
        with torch.no_grad():
            for tensor, copy in self._pairs.values():
                copy.copy_(tensor)

    def _brought(self, name: str, gradient: Tensor | None) -> Tensor | None:
        if gradient is None:
            return None
        if gradient.layout is not torch.strided:
            raise PlanError(
                f"parameter {name} got a sparse gradient, which offload=optimizer does not take to the host: build its "
                "layer with sparse=False, or drop offload"
            )
        return self._gradients[name].copy_(gradient, non_blocking=True)

    def _copy(self, tensor: Tensor) -> Tensor:
        made = self._room(tensor).copy_(tensor.detach())
        return nn.Parameter(made) if tensor.requires_grad else made

    def _room(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor.detach(), device="cpu", pin_memory=self._device.type != "cpu")

    def _wait(self) -> None:
        """What was brought down is there, and what went up before has left its memory."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


def _own_cores() -> int:
    """This worker's share of its host's cores; torchrun gives each worker of several one thread."""
    workers = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    here = min(workers, int(os.environ.get("LOCAL_WORLD_SIZE", workers)))
    return max(torch.get_num_threads(), available_cores() // here)


@contextmanager
def in_one_pass(optimizer: optim.Optimizer) -> Iterator[None]:
    """Let torch's own optimizers use their fused kernels, where a task leaves it open how they step.

    On a processor torch else goes through memory once for each operation; the fused kernels read and write each number
    once, on all threads. Settings are as before afterwards: a checkpoint says nothing of it.
    """
    open_groups = [
        group
        for group in optimizer.param_groups
        if type(optimizer) in _FUSED
        and all(group.get(setting, False) is None for setting in _OPEN)
        and not any(group.get(setting) for setting in _OTHERWISE)
        and _taken(optimizer, group)
    ]
    for group in open_groups:
        group["fused"] = True
    try:
        yield
    finally:
        for group in open_groups:
            group["fused"] = None


def _taken(optimizer: optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether fused kernels take a group as it is: real numbers, of which all have a momentum by now, or none has."""
    stepped = [one for one in group["params"] if one.grad is not None]
    begun = {optimizer.state.get(one, {}).get("momentum_buffer") is not None for one in stepped}
    return all(one.is_floating_point() for one in stepped) and (not group.get("momentum") or len(begun) < 2)
