"""Random masks are the serial ones where the order of memory, or of calls, might tell plans apart."""

import pytest
import torch
from plain import assert_same, mlp_float64, plain, planned
from torch import Tensor, nn

from sheaf import Task
from sheaf.plans import Plan
from sheaf.split.moves import laid_out


class Turned(nn.Module):
    """Dropout on tensors that lie in memory in another order than that of their dimensions."""

    def __init__(self, channels: int, softmax: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, channels, 3, padding=1), nn.Conv1d(channels, 4, 3, padding=1)
        self.drop, self.out, self.softmax = nn.Dropout(0.4), nn.Linear(4, 5), softmax

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.first(given.view(len(given), 4, 3).transpose(1, 2)).transpose(1, 2)
        hidden = hidden.softmax(-1) if self.softmax else hidden.tanh()
        hidden = self.second(self.drop(hidden).transpose(1, 2)).transpose(1, 2)
        return self.out(self.drop(hidden)).mean(1)


class Recurring(nn.Module):
    """What an LSTM gives, batch first, is such a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.drop, self.out = nn.LSTM(3, 6, batch_first=True), nn.Dropout(0.4), nn.Linear(6, 5)

    def forward(self, given: Tensor) -> Tensor:
        return self.out(self.drop(self.cell(given.view(len(given), 4, 3))[0])).mean(1)


class Dropping(nn.Module):
    """A block that draws in a module inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(12, 12), nn.Dropout(0.4)

    def forward(self, given: Tensor) -> Tensor:
        return given + self.drop(self.linear(given).tanh())


class Again(nn.Module):
    """Such a block runs again in a later stage."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.out = nn.ModuleList([Dropping() for _ in range(3)]), nn.Linear(12, 5)

    def forward(self, given: Tensor) -> Tensor:
        for index in (0, 1, 2, 0):
            given = self.layers[index](given)
        return self.out(given)


MODELS = {
    "five channels": lambda: Turned(5, softmax=False),
    "two channels": lambda: Turned(2, softmax=False),
    "softmax": lambda: Turned(5, softmax=True),
    "lstm": Recurring,
    "again": Again,
}


def task(name: str) -> Task:
    return mlp_float64(model=MODELS[name])


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("five channels", "tp=2"),
        ("five channels", "pp=2,stages=1:3"),
        ("two channels", "tp=2"),
        ("two channels", "tp=3"),
        ("softmax", "tp=2"),
        ("lstm", "pp=2,stages=1:2"),
        ("lstm", "tp=2"),
        ("again", "pp=2,stages=2:2"),
        ("again", "pp=2:1f1b,stages=2:2,recompute=full"),
    ],
)
def test_masks_are_those_of_one_process(ranks, name, plan):
    assert_same(ranks(planned, Plan.parse(plan).workers, task(name), plan, 1)[0], plain(task(name), 1), 1e-11)


def test_a_tensor_is_laid_out_as_another_and_keeps_its_values():
    given = torch.randn(2, 3, 4)
    made = laid_out(given, torch.zeros(5, 7, 6).permute(2, 0, 1))
    assert torch.equal(made, given)
    assert made.permute(1, 2, 0).is_contiguous()
    assert laid_out(given, torch.zeros(1, 2, 1)) is given
