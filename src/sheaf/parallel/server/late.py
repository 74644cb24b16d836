"""What a shard does with a gradient that was computed on older values than it has now.

``tau`` is how many updates were applied between the pull and the push.
"""

import torch
from torch import Tensor

from sheaf.plans.server import LATE

PLAIN, SCALED, COMPENSATED, BUFFERED, DELAYED = LATE
COMPENSATION = 0.04  # the constant of DC-ASGD-c


def adjusted_(way: str, gradient: Tensor, tau: int, value: Tensor, pulled: Tensor | None) -> None:
    """Change a late gradient in place.

    ``scaled``       divided by 1 + tau
    ``compensated``  g + 0.04 g g (w - w_pulled): a first-order guess of what it would be on the present values
                     (DC-ASGD: Zheng et al., 2017, arXiv:1609.08326, with its constant lambda)

    >>> gradient = torch.tensor([4.0, 2.0])
    >>> adjusted_("scaled", gradient, 3, gradient, None)
    >>> gradient
    tensor([1.0000, 0.5000])
    """
    if way == SCALED:
        gradient.div_(1 + tau)
    elif way == COMPENSATED and pulled is not None and tau:
        gradient.addcmul_(gradient * gradient, value - pulled, value=COMPENSATION)


class Buffer:
    """Gathers gradients; the optimizer steps on their mean when ``count`` have come.

    ``buffered`` leaves the values alone until then (FedBuff: Nguyen et al., 2022, arXiv:2106.06639). ``delayed`` steps
    at once by each one's part of the mean, without momentum, and lets the momentum see the mean when it is whole:
    delayed Nesterov (Liu et al., 2024, arXiv:2401.09135, algorithm 3 with its default c = 0, a buffer of N = ``count``,
    and a worker's gradient in place of its pseudo-gradient). Of each gradient g the values lose lr g / N; with the
    N-th, m becomes b m + D / N, D being the sum of all N, and the values lose lr b m besides. ``torch.optim.SGD`` with
    ``nesterov=True`` does that at once when it steps on D / N, so the step on the mean starts from where the values
    were: ``ahead`` is what they have moved by since. Of other optimizers, which may have no lr, plans with ``delayed``
    are refused.
    """

    def __init__(self, count: int, *, plain_between: bool = False) -> None:
        self.count, self.gathered, self._plain = count, 0, plain_between
        self.sums: dict[str, Tensor] = {}
        self.ahead: dict[str, Tensor] = {}

    def add(
        self, gradients: dict[str, Tensor], optimizer: torch.optim.Optimizer, values: dict[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """Add one worker's gradients; the mean when it was the last of a round, else None."""
        for name, gradient in gradients.items():
            if name in self.sums:
                self.sums[name] += gradient
            else:
                self.sums[name] = gradient.clone()
        self.gathered += 1
        if self.gathered == self.count:
            return self.given(values)
        if self._plain:
            groups = {id(value): group for group in optimizer.param_groups for value in group["params"]}
            for name, gradient in gradients.items():
                group = groups[id(values[name])]
                rate = float(group["lr"]) * (-1 if group["maximize"] else 1)
                part = gradient * (-rate / self.count)
                values[name] += part
                self.ahead[name] = self.ahead[name] + part if name in self.ahead else part
        return None

    def given(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """What was gathered, each gradient with the weight that it has in a whole round; the next round begins."""
        for name, moved in self.ahead.items():
            values[name] -= moved
        full, self.sums, self.ahead, self.gathered = self.sums, {}, {}, 0
        torch._foreach_div_(list(full.values()), self.count)
        return full
