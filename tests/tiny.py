"""A task that trains in no time, and a function of a user's own, for tests of several rooms."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sheaf.task import Task


def tiny(width: int = 9) -> Task:
    """Two layers under plain SGD: 48 samples, four steps of four microbatches to an epoch."""
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(48, 6, generator=generator), torch.randint(0, 3, (48,), generator=generator)
    return Task(
        model=lambda: nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)),
        loss=lambda output, batch: nn.functional.cross_entropy(output, batch[1]),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        data=torch.utils.data.TensorDataset(inputs, labels),
        batch=12,
        microbatch=3,
        name="small",
    )


class Doubled(torch.autograd.Function):
    """A function that torch's dispatch to modes does not see."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * 2
