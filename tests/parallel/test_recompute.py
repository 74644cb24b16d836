"""A recomputed block computes what it computed at first, or says why it cannot."""

import random

import numpy as np
import pytest
import torch
from plain import assert_same, mlp_float64, plain, planned
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sheaf.errors import PlanError, TaskError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l, self.d = nn.Linear(8, 8), nn.Dropout(0.5)

    def inner(self, given: Tensor) -> Tensor:
        return torch.tanh(self.l(given))

    def forward(self, given: Tensor) -> Tensor:
        return self.inner(given)


class PythonDraws(Block):
    def inner(self, given: Tensor) -> Tensor:
        return torch.tanh(self.l(given * (0.5 + random.random())))


class NumpyDraws(Block):
    def inner(self, given: Tensor) -> Tensor:
        return torch.tanh(self.l(given * (0.5 + np.random.rand())))


class Dropping(Block):
    """Draws in itself and twice in a module that it shares."""

    def inner(self, given: Tensor) -> Tensor:
        return torch.tanh(self.d(self.l(F.dropout(self.d(given), 0.3))))


def reentrant(module: Block, given: Tensor) -> Tensor:
    return checkpoint(module.inner, given, use_reentrant=True)


def modern(module: Block, given: Tensor) -> Tensor:
    return checkpoint(module.inner, given, use_reentrant=False)


def forgetful(module: Block, given: Tensor) -> Tensor:
    return checkpoint(module.inner, given, use_reentrant=False, preserve_rng_state=False)


def model(block=Block, how=None):
    class Made(block):
        def forward(self, given: Tensor) -> Tensor:
            return self.inner(given) if how is None else how(self, given)

    return lambda: nn.Sequential(nn.Linear(12, 8), Made(), Made(), nn.Linear(8, 5))


class Shared(nn.Module):
    """One dropout in two checkpoints of one frame, entered in the same generator state."""

    def __init__(self, how: bool | None) -> None:
        super().__init__()
        self.i, self.d, self.o, self.how = nn.Linear(12, 8), nn.Dropout(0.5), nn.Linear(8, 5), how

    def part(self, given: Tensor) -> Tensor:
        return torch.sin(self.d(given))

    def forward(self, given: Tensor) -> Tensor:
        given = self.i(given)
        for _ in range(3):
            given = self.part(given) if self.how is None else checkpoint(self.part, given, use_reentrant=self.how)
        return self.o(given)


class Halves(nn.Module):
    """A matrix whose halves gate each other."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.out = nn.Linear(8, 18), nn.Linear(9, 8)

    def forward(self, given: Tensor) -> Tensor:
        gate, value = self.both(given).chunk(2, dim=-1)
        return given + self.out(F.silu(gate) * value)


class Wide(nn.Module):
    """A block that runs again by the model's own wish."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.own = nn.LayerNorm(8), nn.Linear(8, 11), nn.Linear(11, 8), own

    def inner(self, given: Tensor) -> Tensor:
        return given + self.down(F.gelu(self.up(self.norm(given))))

    def forward(self, given: Tensor) -> Tensor:
        return checkpoint(self.inner, given, use_reentrant=False) if self.own else self.inner(given)


class Rare(nn.Module):
    """Experts, of which one has only the few samples whose first number is large."""

    def __init__(self, least: float, *, staged: bool) -> None:
        super().__init__()
        self.least, self.staged = least, staged
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 8)) for _ in range(2))
        self.last = nn.Linear(8, 5)

    def forward(self, given: Tensor) -> Tensor:
        hidden, found = self.second(self.first(given)), torch.zeros(len(given), 8, dtype=given.dtype)
        score = given[:, 0] + 0 * hidden[:, 0] if self.staged else given[:, 0]
        for expert, mine in zip(self.experts, (score <= self.least, score > self.least), strict=True):
            places = mine.nonzero(as_tuple=True)[0]
            if len(places):
                found = found.index_add(0, places, expert(hidden[places]))
        return self.last(hidden + found)


@pytest.mark.parametrize("block", [PythonDraws, NumpyDraws, Dropping])
def test_every_generator_is_put_back(block):
    task = mlp_float64(model=model(block))
    assert_same(planned(task, "recompute=full", 2), plain(task, 2), 1e-11)


@pytest.mark.parametrize("plan", ["serial", "recompute=full"])
@pytest.mark.parametrize("how", [reentrant, modern])
def test_a_models_own_checkpoint_draws_what_forward_drew(how, plan):
    wanted = plain(mlp_float64(model=model(Dropping)), 2)
    assert_same(planned(mlp_float64(model=model(Dropping, how)), plan, 2), wanted, 1e-11)


@pytest.mark.parametrize("how", [True, False])
def test_a_module_shared_by_several_checkpoints(how):
    wanted = plain(mlp_float64(model=lambda: Shared(None)), 2)
    assert_same(planned(mlp_float64(model=lambda: Shared(how)), "serial", 2), wanted, 1e-11)


def test_a_checkpoint_that_forgets_the_generators_is_refused_where_it_draws():
    with pytest.raises(TaskError, match=r"1\.d runs again in backward and draws|2\.d runs again in backward and draws"):
        planned(mlp_float64(model=model(Dropping, forgetful)), "serial", 1)
    wanted = plain(mlp_float64(model=model(Block)), 2)
    assert_same(planned(mlp_float64(model=model(Block, forgetful)), "serial", 2), wanted, 1e-11)


def test_a_block_that_keeps_state_outside_itself_is_named():
    cache: list[Tensor] = []

    class Caching(Block):
        def inner(self, given: Tensor) -> Tensor:
            cache.append(given)
            return torch.tanh(self.l(given)) if len(cache) > 1 else torch.tanh(self.l(given)).exp().square()

    with pytest.raises(PlanError, match=r"1 did not compute again .*config\.use_cache=False"):
        planned(mlp_float64(model=model(Caching)), "recompute=full", 1)


def test_a_models_own_checkpoint_of_what_is_cut_inside_of_one_of_the_plan(ranks):
    def made(own: bool) -> nn.Module:
        return nn.Sequential(nn.Linear(12, 8), Halves(), Wide(own), nn.Linear(8, 5))

    wanted = plain(mlp_float64(model=lambda: made(False)), 2)
    assert_same(ranks(planned, 2, mlp_float64(model=lambda: made(True)), "tp=2,recompute=full", 2)[0], wanted, 1e-11)


@pytest.mark.parametrize("staged", [False, True])
def test_a_block_that_the_first_batch_does_not_use(ranks, staged):
    task = mlp_float64(model=lambda: Rare(1.5, staged=staged), batch=5, microbatch=1)
    used = [float(task.data[index][0][0]) > 1.5 for index in range(task.num_samples)]
    assert any(used)
    assert not any(used[: task.microbatch])
    assert_same(ranks(planned, 2, task, "pp=2,stages=1:3,recompute=full", 9)[0], plain(task, 9), 1e-11)
