"""What a rehearsal adds up, block by block: arithmetic, and what autograd keeps."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sheaf.graph import ops


class Counted(TorchDispatchMode):
    """Adds up what products and convolutions compute, block by block, forward only."""

    def __init__(self, mode: Any) -> None:
        super().__init__()
        self._mode = mode

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch._C._current_graph_task_id() == -1:
            counted = ops.flops(func, args, kwargs or {}, result)
            if counted and ops.named(func, args, kwargs or {}).get("is_causal"):
                counted /= 2  # such kernels leave out what no query sees
            flops = self._mode.found.flops
            flops[self._mode.block] = flops.get(self._mode.block, 0.0) + counted
        return result


class Saved:
    """Adds up what autograd keeps, block by block, parameters apart, each tensor once."""

    def __init__(self, mode: Any, model: nn.Module) -> None:
        self._mode = mode
        self._seen = {id(parameter) for parameter in model.parameters()}
        self._alive: list[Tensor] = []

    def pack(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._seen and (tensor._base is None or id(tensor._base) not in self._seen):
            self._seen.add(id(tensor))
            self._alive.append(tensor)
            saved = self._mode.found.saved
            saved[self._mode.block] = saved.get(self._mode.block, 0.0) + tensor.nbytes
        return tensor
