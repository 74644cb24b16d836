"""Precision: autocast over float32 weights for bf16 and fp16, and the loss scale that fp16 needs.

Micikevicius et al., 2018, "Mixed Precision Training" (arXiv:1710.03740). Gradients, their sums between workers,
optimizer state and the weights that it updates stay float32.
"""

from contextlib import AbstractContextManager, nullcontext

import torch

from sheaf.task import PRECISIONS, Task


def autocast(task: Task, device: torch.device) -> AbstractContextManager[object]:
    """The context in which the model and the loss run forward."""
    if task.precision not in ("bf16", "fp16"):
        return nullcontext()
    return torch.autocast(device.type, dtype=PRECISIONS[task.precision])


class LossScale:
    """The dynamic loss scale of fp16, with the defaults of torch.amp.GradScaler; 1 for every other precision.

    It doubles after ``growth_interval`` steps without overflow, and halves at an overflow, whose step is skipped.
    """

    growth_interval = 2000

    def __init__(self, task: Task) -> None:
        self.dynamic = task.precision == "fp16"
        self.value = 65536.0 if self.dynamic else 1.0
        self.good_steps = 0

    def update(self, *, overflowed: bool) -> None:
        """Adapt to a step."""
        if not self.dynamic:
            return
        if overflowed:
            self.value, self.good_steps = self.value * 0.5, 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.value, self.good_steps = self.value * 2.0, 0
