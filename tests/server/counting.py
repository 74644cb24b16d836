"""A task from whose weights one reads how often each sample was used, by two workers whose shares are equal."""

import functools

import torch
from torch import nn

from sheaf import Loss, Task
from sheaf.task import Order
from sheaf.task.blueprint import Blueprint

SAMPLES, SHARE = 24, 4


class Counting(nn.Module):
    """A number for each sample; it loses the sample's part of a share each time that a gradient of it is applied."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(SAMPLES, 1)
        self.none = nn.Parameter(torch.zeros(1))  # a second shard needs something

    def forward(self, index):
        return self.table(index) + 0 * self.none


def summed(output, batch):
    return Loss(output.sum(), len(batch[1]))


def counting(data=tuple((index, index) for index in range(SAMPLES))):
    """The task; ``data[index]`` is ``index``, twice."""
    descent = functools.partial(torch.optim.SGD, lr=1.0)
    options = {"batch": 2 * SHARE, "microbatch": 2, "precision": "fp64", "seed": 5}
    return Task(model=Counting, data=data, loss=summed, optimizer=descent, **options)


def counted(table):
    """How often each sample was used, by the table that training left."""
    first = Blueprint(counting()).fill(torch.device("cpu")).table.weight.detach()
    return ((first - table) * SHARE)[:, 0].round().tolist()


def samples_of(parts):
    """How often each sample is in these parts, each a step and a worker's place."""
    made, count = counting(), torch.zeros(SAMPLES)
    order = Order(SAMPLES, made.batch, made.microbatch, made.seed, shuffle=made.shuffle)
    for step, place in parts:
        for microbatch in order.step(step)[SHARE // 2 * place :][: SHARE // 2]:
            count[list(microbatch.samples)] += 1
    return count.tolist()
