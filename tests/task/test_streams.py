"""What is drawn depends on (seed, step, microbatch, module name) and on nothing else."""

import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sheaf.task import Streams

CPU = torch.device("cpu")


class Inner(nn.Module):
    def forward(self, given: Tensor) -> Tensor:
        return F.dropout(given, 0.5, training=True)


class Outer(nn.Module):
    """Draws itself before and after its children draw."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Inner(), nn.Dropout(0.5)

    def forward(self, given: Tensor) -> tuple[Tensor, ...]:
        return torch.rand(4), self.first(given), self.second(given), self.first(given), torch.rand(4)


def drawn(step: int, microbatch: int, seed: int = 0, model: nn.Module | None = None) -> tuple[Tensor, ...]:
    model = model or Outer()
    streams = Streams(model, seed, CPU)
    streams.enter(step, microbatch)
    result = model(torch.ones(64))
    streams.close()
    return result


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(one, other, strict=True)]


def test_the_same_key_draws_the_same_whatever_was_drawn_before():
    torch.rand(1000)
    first = drawn(3, 5)
    torch.manual_seed(99)
    assert same(first, drawn(3, 5)) == [True] * 5


def test_step_microbatch_and_seed_each_change_every_draw():
    base = drawn(3, 5)
    assert same(base, drawn(4, 5)) == same(base, drawn(3, 6)) == same(base, drawn(3, 5, seed=1)) == [False] * 5


def test_a_module_called_twice_draws_anew_and_its_caller_goes_on():
    before, first, second, again, after = drawn(0, 0)
    assert not torch.equal(first, again)
    assert not torch.equal(first, second)
    streams = Streams(model := Outer(), 0, CPU)
    streams.enter(0, 0)
    model.first.forward = lambda given: given  # a child that draws nothing changes nothing of what its parent draws
    silent = model(torch.ones(64))
    assert torch.equal(silent[0], before)
    assert torch.equal(silent[4], after)
    assert torch.equal(silent[2], second)


def test_going_back_to_a_position_draws_what_was_drawn_there():
    model = Outer()
    streams = Streams(model, 0, CPU)
    streams.enter(7, 1)
    position = streams.position()
    first = model(torch.ones(64))
    streams.enter(8, 0)
    ahead = torch.rand(3)
    streams.enter(8, 0)
    with streams.at(position):
        assert same(model(torch.ones(64)), first) == [True] * 5
    assert torch.equal(torch.rand(3), ahead)


def test_a_forward_that_raises_leaves_the_streams_usable():
    class Fragile(nn.Module):
        broken = True

        def forward(self, given: Tensor) -> Tensor:
            if self.broken:
                raise ValueError("no")
            return torch.rand(4)

    model = nn.Sequential(nn.Dropout(0.5), Fragile())
    streams = Streams(model, 0, CPU)
    streams.enter(0, 0)
    wanted = None
    for attempt in range(2):
        streams.enter(0, 0)
        Fragile.broken = attempt == 0
        try:
            wanted = model(torch.ones(4))
        except ValueError:
            continue
    fresh = drawn(0, 0, model=nn.Sequential(nn.Dropout(0.5), Fragile()))
    assert torch.equal(fresh, wanted)


def test_numpy_and_python_are_seeded_on_entering_and_put_back():
    streams = Streams(nn.Linear(2, 2), 0, CPU)
    streams.enter(1, 2)
    position = streams.position()
    first = (random.random(), np.random.rand(), float(torch.rand(())))
    ahead = streams.position()
    beyond = (random.random(), np.random.rand(), float(torch.rand(())))
    with streams.at(position):
        assert (random.random(), np.random.rand(), float(torch.rand(()))) == first
    with streams.at(ahead):
        assert (random.random(), np.random.rand(), float(torch.rand(()))) == beyond
    np.random.seed(5)
    streams.enter(1, 2)
    assert np.random.rand() == first[1]


def test_the_tag_of_a_state_changes_no_draw():
    streams = Streams(model := nn.Dropout(0.5), 0, CPU)
    streams.enter(0, 0)
    torch.randn(3)  # leaves half a pair of normal numbers in the state
    position = streams.position()
    wanted = torch.randn(700)
    streams.enter(0, 0)
    torch.randn(3)
    model(torch.ones(5))
    assert torch.default_generator.initial_seed() != position.record.ambient
    assert torch.equal(torch.randn(700), wanted)


def test_a_generator_is_that_of_its_device(monkeypatch):
    from sheaf.task import streams

    generators = [torch.Generator(), torch.Generator()]
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert streams._generators(torch.device("cuda:0"))[1] is generators[0]
    assert streams._generators(torch.device("cuda"))[1] is generators[1]
