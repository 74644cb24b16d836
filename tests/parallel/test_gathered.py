"""ZeRO-3 under what used to hang, read freed memory or go unnoticed: the order of collectives, and guards of memory."""

from dataclasses import replace

import pytest
import torch
from plain import assert_same, mlp_float64, plain, planned
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

ZERO3 = "dp=2,zero=3,bucket_bytes=1024"


class Embeddings(nn.Module):
    """More embeddings than reductions may be in flight; autograd does not save their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(40, 16) for _ in range(5)])
        self.linear, self.out = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, given: Tensor) -> Tensor:
        rows = (given.abs() * 10).long() % 40
        hidden = torch.stack([table(rows[:, index]) for index, table in enumerate(self.tables)]).sum(0)
        return self.out(self.linear(hidden).tanh())


class SkippingLast(nn.Module):
    """Data decide that one worker skips the last blocks, whose reductions come first."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(12, 30)
        self.layers = nn.ModuleList([nn.Linear(30, 30) for _ in range(8)])
        self.skip = nn.ModuleList([nn.Linear(30, 12) for _ in range(4)])
        self.out = nn.Linear(12, 5)

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.into(given)
        for layer in self.layers:
            hidden = layer(hidden).tanh()
        ends = [hidden[:, :12]]
        if given[0, 0] > 0:
            ends += [layer(hidden) for layer in self.skip]
        return self.out(torch.stack(ends).sum(0))


def stack() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 40), *[nn.Linear(40, 40) for _ in range(6)], nn.Linear(40, 5))


@pytest.mark.parametrize("plan", [ZERO3, f"{ZERO3},recompute=full"])
@pytest.mark.parametrize("model", [Embeddings, SkippingLast])
def test_uneven_rounds_and_skipped_blocks_do_not_hang(ranks, model, plan):
    task = mlp_float64(model=model)  # 5 microbatches on 2 workers
    assert_same(ranks(planned, 2, task, plan, 3)[0], plain(task, 3), 1e-11)


def test_low_precision_with_uneven_rounds_does_not_hang(ranks):
    task = mlp_float64(model=stack, precision="bf16")
    assert_same(ranks(planned, 2, task, ZERO3, 2)[0], plain(task, 2), 5e-2)


class OnContext(torch.autograd.Function):
    """Keeps the weight where no saved-tensor hook sees it."""

    @staticmethod
    def forward(ctx, given, weight):
        ctx.save_for_backward(given)
        ctx.weight = weight
        return given @ weight

    @staticmethod
    def backward(ctx, gradient):
        (given,) = ctx.saved_tensors
        return gradient @ ctx.weight.t(), given.t() @ gradient


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(40, 40) / 7)

    def forward(self, given: Tensor) -> Tensor:
        return OnContext.apply(given, self.weight).tanh()


class Detached(nn.Module):
    """Needs its weight again in backward after the weight's gradient is there."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(40, 40) / 7)

    def forward(self, given: Tensor) -> Tensor:
        return ((given @ self.weight.detach()) @ self.weight).tanh()


class OwnCheckpoint(nn.Module):
    """Recomputes a part of itself."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(40, 40), nn.Linear(40, 40), reentrant

    def inner(self, given: Tensor) -> Tensor:
        return self.first(given).tanh()

    def forward(self, given: Tensor) -> Tensor:
        return self.second(checkpoint(self.inner, given, use_reentrant=self.reentrant))


class Passing(nn.Module):
    """Returns its input beside its answer, in a plain object, and is changed in place by what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(40, 40)

    def forward(self, given: Tensor) -> Tensor:
        return self.linear(F.relu_(given.clone())).tanh_()


@pytest.mark.parametrize(
    "block",
    [Custom, Detached, lambda: OwnCheckpoint(reentrant=False), lambda: OwnCheckpoint(reentrant=True), Passing],
    ids=["context", "detached", "checkpoint", "reentrant", "in-place"],
)
def test_backward_finds_a_block_gathered_whatever_it_kept(ranks, block):
    def model() -> nn.Module:
        blocks = [made for _ in range(3) for made in (block(), nn.Linear(40, 40))]
        return nn.Sequential(nn.Linear(12, 40), *blocks, nn.Linear(40, 5))

    task = mlp_float64(model=model)
    assert_same(ranks(planned, 2, task, ZERO3, 2)[0], plain(task, 2), 1e-11)


class Reaching(nn.Module):
    """Reads another block's weight, on later data only."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(12, 30)
        self.layers = nn.ModuleList([nn.Linear(30, 30) for _ in range(5)])
        self.out = nn.Linear(30, 5)
        self.calls = [0]  # a list: a number that forward changes is refused

    def forward(self, given: Tensor) -> Tensor:
        self.calls[0] += 1
        hidden = self.into(given)
        if float(given.sum()) < 1e9 and self.calls[0] > 2:
            hidden = F.linear(hidden, self.layers[3].weight)
        for layer in self.layers:
            hidden = layer(hidden).tanh()
        return self.out(hidden)


def raised(task, plan: str, steps: int) -> str:
    """The class and words of what a run raised."""
    try:
        planned(task, plan, steps)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_a_freed_parameter_read_on_later_data_is_refused(ranks):
    task = mlp_float64(model=Reaching)
    task = replace(task, batch=12, data=task.data[:36])  # two microbatches on each worker
    found = ranks(raised, 2, task, ZERO3, 2)
    assert all("PlanError: a parameter of layers.3 is used while layers.3 is not running" in text for text in found)


class ChangedInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(30, 30)

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.linear(given).sigmoid()
        square = hidden * hidden
        hidden.mul_(3)
        return square + hidden


def test_a_saved_activation_changed_in_place_is_noticed(ranks):
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 30), ChangedInPlace(), ChangedInPlace(), nn.Linear(30, 5))

    found = ranks(raised, 2, mlp_float64(model=model), ZERO3, 1)
    assert all("modified by an inplace operation" in text for text in found), found


class Caching(nn.Module):
    """Caches a mask and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(12, 30), nn.Linear(30, 5)
        self.mask: Tensor | None = None
        self.made: dict[str, Tensor] = {}
        self.calls = [0]  # a list: a number that forward changes is refused

    def forward(self, given: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.ones(30, dtype=given.dtype)
        if "half" not in self.made:
            self.made["half"] = torch.full((30,), 0.5, dtype=given.dtype)
        self.calls[0] += 1
        return self.out(self.into(given) * self.mask * self.made["half"])


def test_what_the_rehearsal_leaves_in_modules_is_put_back(ranks):
    def calls() -> int:
        from sheaf.parallel import build
        from sheaf.plans import Plan

        step = build(task, Plan.parse(ZERO3))
        found = step.model.calls[0]
        step.close()
        return found

    task = mlp_float64(model=Caching)
    assert ranks(calls, 2) == [0, 0]
    assert_same(ranks(planned, 2, task, ZERO3, 2)[0], plain(task, 2), 1e-11)
