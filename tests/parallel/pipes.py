"""Blocks that are awkward to cut inside of, each in a small model in float64."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sheaf import Task

WIDTH = 6


class Twice(nn.Module):
    """Calls a module again, has a parameter of its own, draws, and changes in place, between its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, given: Tensor) -> Tensor:
        given = given + torch.tanh(self.first(given))
        hidden = F.dropout(self.inner(given).relu(), 0.3, self.training)
        hidden += given
        return given + self.first(hidden) * self.scale


class Deciding(nn.Module):
    """Calls one of its modules only for some values, which a later one computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, given: Tensor) -> Tensor:
        given = given + torch.tanh(self.first(given))
        hidden = self.inner(given)
        if hidden.mean() > 0:
            hidden = self.last(hidden).relu()
        return given + hidden


class Kept(nn.Linear):
    """Keeps what it computed."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        self.kept = super().forward(input)
        return self.kept * 2


class Keeping(nn.Module):
    """Uses what one of its modules keeps to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Kept(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.first(given)
        return self.last(hidden) + self.first.kept


class Layered(nn.Module):
    """Three such blocks, and a head."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block() for _ in range(3)])
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, given: Tensor) -> Tensor:
        for layer in self.layers:
            given = layer(given)
        return self.head(given.mean(1))


def layered(block: Callable[[], nn.Module]) -> Task:
    """A task of one of them, whose last microbatch is smaller."""
    generator = torch.Generator().manual_seed(1)
    data = [(torch.randn(4, WIDTH, generator=generator), index % 5) for index in range(21)]
    return Task(
        model=partial(Layered, block),
        loss=lambda output, batch: F.cross_entropy(output, batch[1]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        data=data,
        batch=7,
        microbatch=2,
        precision="fp64",
        seed=3,
    )
