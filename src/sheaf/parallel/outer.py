"""What becomes of weights when workers that stepped alone meet: the mean, or an outer optimizer's step towards it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sheaf.plans.local import OUTER, Local


@dataclass(frozen=True)
class Outer:
    """An outer optimizer over ``anchor`` weights, with the workers' mean departure from them for a gradient.

    ``average``  the mean of the workers' weights (local SGD: Stich, "Local SGD Converges Fast", 2019), or whatever
                 else they depart by together
    ``slowmo``   momentum on the departure over the inner learning rate (Wang et al., "SlowMo", 2020, algorithm 1)
    ``diloco``   Nesterov momentum on the departure (Douillard et al., "DiLoCo", 2023)
    """

    kind: str
    lr: float
    momentum: float

    @property
    def keeps(self) -> bool:
        """Whether it has momentum to keep."""
        return self.kind in OUTER

    def step(self, anchor: Tensor, departure: Tensor, velocity: Tensor | None, *, rate_ratio: float = 1.0) -> Tensor:
        """New weights; ``velocity`` is updated in place. All are of one shape.

        ``departure`` is the anchor minus the mean of the workers' weights. ``rate_ratio`` is the inner learning rate
        now over that of the last meeting: SlowMo's momentum is kept in units of it.
        """
        if velocity is None:
            return anchor - departure
        if self.kind == "slowmo":
            velocity.mul_(self.momentum * rate_ratio).add_(departure)
            return torch.sub(anchor, velocity, alpha=self.lr)
        velocity.mul_(self.momentum).add_(departure)
        return anchor - self.lr * (departure + self.momentum * velocity)


def optimizer_of(local: Local, values: Sequence[Tensor]) -> torch.optim.Optimizer:
    """The same as one of torch's over ``values``, which takes departures for gradients; the inner rate does not change.

    >>> value = torch.ones(1)
    >>> value.grad = value - 0.75
    >>> optimizer_of(Local.parse("4"), [value]).step()
    >>> value
    tensor([0.7500])
    """
    nesterov = local.kind == "diloco" and local.momentum > 0
    return torch.optim.SGD(list(values), lr=local.lr, momentum=local.momentum, nesterov=nesterov)
