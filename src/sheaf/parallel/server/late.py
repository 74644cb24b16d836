"""What a shard does with a gradient that was computed on older values than it has now.

``tau`` is how many updates were applied between the pull and the push.
"""

import torch
from torch import Tensor

from sheaf.plans.server import LATE

PLAIN, SCALED, COMPENSATED, BUFFERED = LATE
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
    """Gathers gradients, and gives their mean when ``count`` have come.

    So the optimizer's momentum sees one gradient for ``count`` late ones, which is what delayed Nesterov asks for (Liu
    et al., 2024, arXiv:2401.09135; its plain steps in between are left out). The buffer itself is that of FedBuff
    (Nguyen et al., 2022, arXiv:2106.06639).
    """

    def __init__(self, count: int) -> None:
        self.count, self.gathered = count, 0
        self.sums: dict[str, Tensor] = {}

    def add(self, gradients: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Add one worker's gradients; the mean when it was the last of a round, else None."""
        for name, gradient in gradients.items():
            if name in self.sums:
                self.sums[name] += gradient
            else:
                self.sums[name] = gradient.clone()
        self.gathered += 1
        if self.gathered < self.count:
            return None
        full, self.sums, self.gathered = self.sums, {}, 0
        torch._foreach_div_(list(full.values()), self.count)
        return full
