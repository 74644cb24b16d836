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
