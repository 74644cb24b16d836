"""Which gradients are kept as rows, and that the optimizer is timed on such gradients as the model gives it."""

import sys

import pytest
import torch
from graph_cases import task
from torch import Tensor, nn

from sheaf.graph import profile, trace
from sheaf.graph.gradients import rows_stepped, with_gradients
from sheaf.task import Task

measuring = sys.modules["sheaf.graph.profile"]
SEEN = list[dict[tuple[int, ...], int | None]]()  # rows with gradients by the parameter's shape; None: dense


class Tables(nn.Module):
    """One table whose gradients are rows, one whose gradient is dense, and a layer where there is room for one."""

    def __init__(self, *, narrow_only: bool = False) -> None:
        super().__init__()
        self.narrow = nn.Embedding(40, 4, sparse=True)
        self.wide = nn.Embedding(30, 4, sparse=narrow_only)
        self.layer = nn.Identity() if narrow_only else nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.layer(self.narrow(ids) + self.wide(ids % 30))


class Watched(torch.optim.SGD):
    """Notes the gradients that it is given."""

    def step(self, closure=None):
        held = [one for group in self.param_groups for one in group["params"]]
        SEEN.append({tuple(one.shape): one.grad._nnz() if one.grad.is_sparse else None for one in held})
        return super().step(closure)


def ids(rows: int = 6) -> list[tuple[Tensor, int]]:
    """Sixteen samples that look up so many rows of each table in a step."""
    return [(torch.arange(place, place + 2) % rows, 0) for place in range(16)]


def of_tables(optimizer=torch.optim.SGD, **options) -> Task:
    given = {"optimizer": lambda parameters: optimizer(parameters, lr=0.1)} | options
    return task(given.pop("model", Tables), ids(), **given)


def test_rows_that_a_step_has_gradients_of():
    found = of_tables()
    assert rows_stepped(found, trace(found, 4), with_gradients(found, 4).model) == {"narrow.weight": 6}


@pytest.mark.parametrize(("clip", "comfort"), [(None, 0.4), (1.0, 0.4), (None, 0.0)], ids=["whole", "clip", "blocks"])
def test_the_optimizer_is_timed_on_gradients_as_the_model_gives_them(monkeypatch, clip, comfort):
    SEEN.clear()
    monkeypatch.setattr(measuring, "COMFORT", comfort)
    found = of_tables(Watched, clip=clip)
    made = profile(found, trace(found, 4), threads=1, budget_seconds=0.1)
    assert made.optimizer_seconds_per_byte > 0
    assert SEEN
    assert all(one == {(40, 4): 6, (30, 4): None, (4, 4): None, (4,): None} for one in SEEN)


def test_an_optimizer_that_takes_rows_only_is_timed(monkeypatch):
    found = of_tables(torch.optim.SparseAdam, model=lambda: Tables(narrow_only=True))
    facts = trace(found, 4)
    assert profile(found, facts, threads=1, budget_seconds=0.1).optimizer_state_bytes_per_byte == pytest.approx(2, 0.1)
    monkeypatch.setattr(measuring, "SAMPLE_BYTES", 20 * 4 * 4)
    assert profile(found, facts, threads=1, budget_seconds=0.1).optimizer_seconds_per_byte > 0
    SEEN.clear()  # of a table that is larger, half is stepped
    found = of_tables(Watched, model=lambda: Tables(narrow_only=True))
    profile(found, facts, threads=1, budget_seconds=0.1)
    assert SEEN[0] == {(20, 4): 3}
