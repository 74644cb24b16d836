"""A step without a model: sharded numbers with momentum, so that saving, stopping and resuming can be judged."""

import math
import os
import signal

import torch
import torch.distributed as dist

from sheaf.errors import NonFiniteLoss
from sheaf.record import StepReport


class FakeStep:
    """Worker r holds row r of a whole (workers x 3) weight and its momentum."""

    def __init__(self, task, plan, device=None, nan_at=None, signal_at=None, seconds=0.0):
        self.task, self.plan, self.index = task, plan, 0
        self.together = dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self.together else 0
        self.workers = dist.get_world_size() if self.together else 1
        generator = torch.Generator().manual_seed(task.seed + self.rank)
        self.weight = torch.rand(3, generator=generator)
        self.momentum = torch.zeros(3)
        self.nan_at, self.signal_at, self.seconds = nan_at, signal_at, seconds
        self.stop = self.closed = False

    def __call__(self):
        if self.signal_at == (self.rank, self.index):
            os.kill(os.getpid(), signal.SIGTERM)
        if self.seconds:
            torch.zeros(1).numpy()
            __import__("time").sleep(self.seconds)
        told = torch.tensor([self.weight.square().sum(), float(self.stop)])
        if self.together:
            dist.all_reduce(told)
        if self.index == self.nan_at:
            raise NonFiniteLoss(self.index, 0, math.nan)
        self.momentum.mul_(0.9).add_(self.weight)
        self.weight.sub_(0.1 * self.momentum)
        report = StepReport(
            step=self.index,
            loss=told[0].item(),
            weight=1.0,
            samples=4,
            seconds=0.001 + self.seconds,
            stop=told[1].item() > 0,
        )
        self.index += 1
        return report

    @property
    def spans(self):
        if self.plan.pp == 1:
            return []
        start = 1000.0 + self.index
        return [
            ("F", 0, self.rank, start + self.rank, start + self.rank + 1.0),
            ("B", 0, self.rank, start + 3, start + 4),
        ]

    def state(self):
        return {"weight": self.weight, "momentum": self.momentum}, {"index": self.index}

    def load(self, tensors, values):
        self.weight, self.momentum, self.index = tensors["weight"], tensors["momentum"], values["index"]

    def full_state(self):
        if not self.together:
            return {"weight": self.weight[None]}
        rows = [torch.empty(3) for _ in range(self.workers)]
        dist.all_gather(rows, self.weight)
        return {"weight": torch.stack(rows)} if self.rank == 0 else {}

    def request_stop(self):
        self.stop = True

    def close(self):
        self.closed = True
