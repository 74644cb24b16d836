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


class Numbered(nn.Module):
    """One of two blocks that count every sample, each in a table of its own: beside its number goes what they add."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(SAMPLES, 1)

    def forward(self, numbered):
        if numbered.dim() == 1:
            numbered = torch.stack([numbered, 0 * numbered], 1).to(self.table.weight.dtype)
        return torch.cat([numbered[:, :1], numbered[:, 1:] + self.table(numbered[:, 0].long())], 1)


def twice():
    return nn.Sequential(Numbered(), Numbered())


def second(output, batch):
    return Loss(output[:, 1].sum(), len(batch[1]))


def summed(output, batch):
    return Loss(output.sum(), len(batch[1]))


def counting(data=tuple((index, index) for index in range(SAMPLES)), **changes):
    """The task; ``data[index]`` is ``index``, twice."""
    descent = functools.partial(torch.optim.SGD, lr=1.0)
    options = {"batch": 2 * SHARE, "microbatch": 2, "precision": "fp64", "seed": 5}
    made = {"model": Counting, "data": data, "loss": summed, "optimizer": descent, **options}
    return Task(**(made | changes))


def counted(table, name="table.weight", **changes):
    """How often each sample was used, by the table that training left."""
    first = Blueprint(counting(**changes)).fill(torch.device("cpu")).get_parameter(name).detach()
    return ((first - table) * SHARE)[:, 0].round().tolist()


def samples_of(parts):
    """How often each sample is in these parts, each a step and a worker's place."""
    made, count = counting(), torch.zeros(SAMPLES)
    order = Order(SAMPLES, made.batch, made.microbatch, made.seed, shuffle=made.shuffle)
    for step, place in parts:
        for microbatch in order.step(step)[SHARE // 2 * place :][: SHARE // 2]:
            count[list(microbatch.samples)] += 1
    return count.tolist()
