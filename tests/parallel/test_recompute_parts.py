"""Only the blocks that a plan names run again, and all is what it would be without, under every kind of plan."""

import functools
from typing import Any

import pytest
import torch
from plain import assert_same, mlp_float64, plain, planned
from torch import Tensor, nn

from sheaf.errors import PlanError
from sheaf.parallel.build import refuse
from sheaf.plans import Plan

STEPS = 2
calls: list[int] = []


class Block(nn.Module):
    """Draws, and counts statistics of its batch."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.into, self.norm, self.out = nn.Linear(8, 9, bias=False), nn.BatchNorm1d(9), nn.Linear(9, 8)
        self.dropout = nn.Dropout(0.3)

    def forward(self, given: Tensor) -> Tensor:
        calls.append(self.number)
        return given + self.out(self.dropout(torch.tanh(self.norm(self.into(given)))))


def task() -> Any:
    return mlp_float64(model=lambda: nn.Sequential(nn.Linear(12, 8), *(Block(n) for n in range(4)), nn.Linear(8, 5)))


@functools.cache
def reference() -> Any:
    return plain(task(), STEPS)


@pytest.mark.parametrize(
    "plan",
    [
        "[13]=recompute",
        pytest.param("dp=2,zero=1,{1-2}=recompute", marks=pytest.mark.nightly),
        "dp=3,zero=3,bucket_bytes=1024,2=recompute,4=recompute",
        "tp=2,[2-4]=recompute",
        "dp=2,server=1,[13]=recompute",
        "dp=2,2=tp,[2-3]=recompute",
        pytest.param("dp=2,tp=2,zero=2,1=recompute", marks=pytest.mark.nightly),
        pytest.param("pp=2,stages=3:3,1=recompute,4=recompute", marks=pytest.mark.nightly),
        "dp=2,pp=2:zero-bubble,[1-3]=recompute",
        "pp=2:interleaved,virtual=2,{2:4}=recompute",
        pytest.param("pp=2:interleaved,virtual=2,recompute=full", marks=pytest.mark.nightly),
    ],
)
def test_some_blocks_computed_again_change_nothing(ranks, plan):
    found = ranks(planned, Plan.parse(plan).workers, task(), plan, STEPS)[0]
    assert_same(found, reference(), 1e-11)


@pytest.mark.parametrize(("plan", "again"), [("serial", ""), ("[13]=recompute", "02"), ("recompute=full", "0123")])
def test_no_other_block_runs_twice(plan, again):
    calls.clear()
    planned(task(), plan, 1)
    microbatches = 5  # of 3 samples, of a batch of 14
    assert {number: calls.count(number) for number in range(4)} == {
        number: microbatches * (2 if str(number) in again else 1) for number in range(4)
    }


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("layers.1=recompute", "layers.1=recompute names no block of the model, .* whole; known: 0, 1"),
        ("dp=2,1.norm=recompute", r"1\.norm=recompute .* is inside of 1: use 1=recompute"),
        ("pp=2,0=recompute", "0 is one module, which keeps no more than its input .* drop it, or 1=recompute"),
    ],
)
def test_parts_that_are_no_block_are_refused(plan, message):
    with pytest.raises(PlanError, match=message):
        refuse(task(), Plan.parse(plan))
