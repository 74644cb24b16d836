"""One update of a shard's values by its optimizer."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Update:
    """Steps ``optimizer``, which was made over ``values``, by gradients by name; what has none stays as it is."""

    def __init__(self, values: dict[str, Tensor], optimizer: torch.optim.Optimizer, *, scheduled: bool) -> None:
        self._values, self._optimizer = values, optimizer
        self._names = {id(value): name for name, value in values.items()}
        self._is_plain = not scheduled and is_plain(optimizer)  # a scheduler wants its steps counted

    def __call__(self, gradients: Mapping[str, Tensor]) -> None:
        """Step once."""
        if self._is_plain:  # what the optimizer would do, without what it does around that
            for group in self._optimizer.param_groups:
                for value in group["params"]:
                    if (gradient := gradients.get(self._names[id(value)])) is not None:
                        value.add_(gradient, alpha=-group["lr"])
            return
        for name, value in self._values.items():
            value.grad = gradients.get(name)
        self._optimizer.step()
        for value in self._values.values():
            value.grad = None


def is_plain(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step subtracts each gradient times a rate, and does nothing else."""
    if type(optimizer) is not torch.optim.SGD or optimizer._optimizer_step_pre_hooks:
        return False
    if optimizer._optimizer_step_post_hooks:
        return False
    other = ("momentum", "weight_decay", "maximize", "differentiable", "fused")
    return not any(group[key] for group in optimizer.param_groups for key in other)
