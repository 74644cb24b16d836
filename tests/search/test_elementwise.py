"""Which optimizers may step slices apart from each other."""

import pytest
import torch
from torch import nn

from sheaf.task.probe import elementwise, unhosted


class Normed(torch.optim.SGD):
    """Scales each update by the norm over all its parameters, as LAMB and gradient clipping do."""

    def step(self, closure=None):
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        for p in held:
            p.grad.div_(norm)
        return super().step(closure)


def by_shape(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim < 2]
    return torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.5}], lr=0.1)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True, foreach=True),
        lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True),
        by_shape,
    ],
    ids=["sgd", "adamw", "amsgrad", "adagrad", "rmsprop", "groups-by-shape"],
)
def test_elementwise(optimizer):
    assert elementwise(optimizer)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.Adafactor(p, lr=0.1),
        lambda p: Normed(p, lr=0.1),
        torch.optim.LBFGS,
        torch.optim.SparseAdam,
    ],
    ids=["adafactor", "norm-over-all", "closure", "sparse"],
)
def test_not_elementwise(optimizer):
    assert not elementwise(optimizer)


def test_the_probe_leaves_the_random_stream_alone():
    torch.manual_seed(3)
    before = torch.default_generator.get_state()
    elementwise(lambda p: torch.optim.SGD(p, lr=float(torch.rand(()))))
    assert torch.equal(before, torch.default_generator.get_state())


def test_whether_it_steps_in_a_hosts_memory_is_found_without_a_trace_and_left_open_where_nobody_knows():
    def drawing(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=float(torch.rand(())))

    def by_mark(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD([one for one in parameters if one.matters], lr=0.1)  # stand-ins have no such mark

    before = torch.default_generator.get_state()
    assert [unhosted(one, [(2, True), (1, False)]) for one in (drawing, by_mark)] == ["", ""]
    assert torch.equal(before, torch.default_generator.get_state())
    assert "capturable" in unhosted(lambda p: torch.optim.AdamW(p, capturable=True), [(2, True)])


class Sized(torch.optim.SGD):
    """Divides gradients by their norm, but only those of at least ``smallest`` numbers."""

    smallest = 4096

    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if p.numel() >= self.smallest:
                p.grad.div_(p.grad.norm())
        return super().step(closure)


class VeryLarge(Sized):
    smallest = 50_000


def test_a_rule_that_begins_at_a_size():
    assert not elementwise(lambda p: Sized(p, lr=0.1))
    assert elementwise(lambda p: VeryLarge(p, lr=0.1)), "never tried at that size"
    assert not elementwise(lambda p: VeryLarge(p, lr=0.1), shapes=[(3, 3), (300, 300)])
    assert elementwise(lambda p: torch.optim.AdamW(p, lr=0.1), shapes=[(0,), (), (10**6, 700), (3, 2000)])
