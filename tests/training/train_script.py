"""A task in a file, and a script that trains it: what tests start as users would."""

import sys

import torch
from torch import nn

from sheaf.api.train import train
from sheaf.task import Task


def rows(count=24):
    """Samples of a noisy line."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 4, generator=generator)
    return list(zip(inputs, inputs.sum(1, keepdim=True), strict=True))


def loss(output, batch):
    """Mean square error."""
    return nn.functional.mse_loss(output, batch[1])


def task(**changed):
    """A small regression with dropout and momentum, 5 steps to an epoch."""
    settings = {
        "model": lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1)),
        "loss": loss,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        "data": rows(),
        "batch": 5,
        "microbatch": 2,
        "seed": 3,
        "name": "line",
    }
    return Task(**(settings | changed))


class SlowRows(list):
    """Rows that take a while, so that a signal arrives in the middle of a run."""

    def __getitem__(self, index):
        torch.zeros(1)
        import time

        time.sleep(0.005)
        return super().__getitem__(index)


if __name__ == "__main__":
    out, plan, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    given = task(data=SlowRows(rows())) if "slow" in sys.argv else task()
    run = train(given, plan, steps=steps, out=out, quiet=True, resume="resume" in sys.argv, predict=False)
    print(len(run.losses), run.stopped, run.losses[-1])
