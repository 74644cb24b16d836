"""Models that trip other tools: unused, frozen and shared parameters, repeated and skipped blocks, few samples."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from plain import assert_same, mlp_float64, plain, planned
from torch import Tensor, nn
from torch.nn import functional as F

ALL = [
    "dp=2",
    "dp=3,shares=stolen",
    "dp=2,zero=1",
    "dp=2,zero=2",
    "dp=2,zero=3,bucket_bytes=1024",
    "dp=2,zero=3,recompute=full,bucket_bytes=1024",
]


def world(plan: str) -> int:
    return int(plan.split("=")[1].split(",", maxsplit=1)[0])


class Odd(nn.Module):
    """An unused branch, a frozen layer, one block called three times, a parameter of the root, two tied layers."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(12, 8)
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(requires_grad=False)
        self.layers = nn.ModuleList([Layer() for _ in range(3)])
        self.unused = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.out = nn.Linear(8, 5)

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.frozen(self.into(given).tanh()) * self.scale
        for layer in (self.layers[0], self.layers[1], self.layers[0], self.layers[0], self.layers[2]):
            hidden = layer(hidden)
        return self.out(self.second(self.first(hidden).tanh()))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(8, 8), nn.Dropout(0.2)

    def forward(self, given: Tensor) -> Tensor:
        return given + self.dropout(self.linear(given).tanh()) + F.dropout(given, 0.1, self.training)


class Skipping(nn.Module):
    """Data decide which layers run, so workers run different ones in the same step."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(12, 8)
        self.layers = nn.ModuleList([Layer() for _ in range(4)])
        self.out = nn.Linear(8, 5)

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.into(given)
        for index, layer in enumerate(self.layers):
            if given[:, index].sum() > 0:
                hidden = layer(hidden)
        return self.out(hidden)


class Reaching(nn.Module):
    """The root and one block read parameters of others directly."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.deep, self.never = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 5)

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.deep(self.into(given).tanh()).tanh()
        return self.out(F.linear(hidden @ self.into.weight, self.into.weight) + F.linear(hidden, self.never.weight))


class Blocked(torch.autograd.Function):
    """Has no gradient to give, where ``detach`` would say so before backward."""

    @staticmethod
    def forward(ctx: Any, given: Tensor) -> Tensor:
        return given.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        return None


class Blocking(nn.Module):
    """Backward comes to a layer, and brings nothing: its parameters have no gradient, and must not decay."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.aside, self.out = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.into(given).tanh()
        return self.out(hidden + Blocked.apply(self.aside(hidden)))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("plan", ALL)
@pytest.mark.parametrize("model", [Odd, Skipping, Reaching, Blocking])
def test_an_odd_model_is_exact(ranks, model, plan):
    task = mlp_float64(model=model)
    assert_same(ranks(planned, world(plan), task, plan, 3)[0], plain(task, 3), 1e-11)


@pytest.mark.parametrize("plan", ALL)
def test_fewer_microbatches_than_workers_leave_some_idle(ranks, plan):
    task = mlp_float64(batch=3, microbatch=3)
    assert_same(ranks(planned, world(plan), task, plan, 3)[0], plain(task, 3), 1e-12)


def test_a_batch_of_seven_over_four_microbatches_is_used_whole(ranks):
    task = mlp_float64(batch=7, microbatch=2)
    assert_same(ranks(planned, 4, task, "dp=4", 3)[0], plain(task, 3), 1e-12)


@pytest.mark.parametrize("plan", ["dp=2", "dp=2,zero=1", "dp=2,zero=3,bucket_bytes=1024"])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda ps: torch.optim.Adagrad(ps, lr=0.1, initial_accumulator_value=0.5),
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda ps: torch.optim.AdamW(
            [
                {"params": [p for p in ps if p.ndim > 1], "weight_decay": 0.2},
                {"params": [p for p in ps if p.ndim == 1], "weight_decay": 0.0},
            ],
            lr=0.01,
        ),
        lambda ps: torch.optim.RMSprop([p for p in ps if p.ndim > 1], lr=0.01, centered=True),
    ],
    ids=["adagrad", "nesterov", "groups", "some"],
)
def test_optimizers_see_whole_shapes_and_step_slices(ranks, plan, optimizer):
    task = mlp_float64(optimizer=optimizer, clip=0.3)
    assert_same(ranks(planned, 2, task, plan, 3)[0], plain(task, 3), 1e-11)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "plan",
    ["serial", "dp=2", "dp=2,zero=1", "dp=2,zero=3,bucket_bytes=1024", "dp=2,zero=3,recompute=full,bucket_bytes=1024"],
)
def test_low_precision_departs_no_more_than_rounding(ranks, precision, plan):
    task = mlp_float64(precision=precision)
    found = ranks(planned, 1 if plan == "serial" else 2, task, plan, 3)[0]
    assert_same(found, plain(task, 3), 3e-2)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("plan", ALL)
def test_a_step_goes_on_from_its_saved_state_with_the_same_numbers(ranks, plan):
    def interrupted() -> tuple[list[float], list[float]]:
        import torch.distributed as dist

        from sheaf.parallel import build
        from sheaf.plans import Plan

        whole, first, second = (build(task, Plan.parse(plan)) for _ in range(3))
        wanted = [whole().loss for _ in range(5)]
        found = [first().loss for _ in range(2)]
        tensors, values = first.state()
        held = [None] * dist.get_world_size()
        dist.all_gather_object(held, tensors)
        second.load(held[first.state_owner], values)
        return wanted, found + [second().loss for _ in range(3)]

    task = replace(
        mlp_float64(model=Odd),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9),
    )
    for wanted, found in ranks(interrupted, world(plan)):
        if "stolen" in plan:
            assert found == pytest.approx(wanted, rel=1e-12)
        else:
            assert found == wanted
