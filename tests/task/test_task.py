"""A task says what is computed, refuses what contradicts itself, and deals samples that depend on no worker."""

import random
from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sheaf import Loss, Task
from sheaf.errors import DataError, TaskError
from sheaf.task import Order, arguments, as_loss, fetch, moved


def task(**changes) -> Task:
    values = {
        "model": lambda: nn.Linear(2, 2),
        "loss": lambda output, batch: output.mean(),
        "optimizer": torch.optim.SGD,
        "data": [(torch.ones(2), 0)] * 8,
        "batch": 4,
    }
    return Task(**(values | changes))


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 20), st.integers(0, 3))
def test_an_epoch_uses_every_sample_once(num_samples, batch, microbatch, epoch):
    order = Order(num_samples, batch, microbatch, seed=5, shuffle=True)
    steps = [order.step(epoch * order.steps_per_epoch + step) for step in range(order.steps_per_epoch)]
    used = [index for step in steps for one in step for index in one.samples]
    assert sorted(used) == list(range(num_samples))
    assert used == order.epoch(epoch).tolist()
    for step in steps:
        assert [one.index for one in step] == list(range(len(step)))
        assert all(len(one.samples) == microbatch for one in step[:-1])
        assert 1 <= len(step[-1].samples) <= microbatch
        assert sum(len(one.samples) for one in step) <= batch


def test_order_differs_between_epochs_and_seeds_and_may_be_left_as_it_is():
    first, other = Order(40, 8, 4, 0, shuffle=True), Order(40, 8, 4, 1, shuffle=True)
    assert first.epoch(0).tolist() != first.epoch(1).tolist() != other.epoch(0).tolist()
    assert Order(40, 8, 4, 0, shuffle=False).epoch(3).tolist() == list(range(40))


def test_everything_that_is_wrong_is_told_at_once():
    with pytest.raises(TaskError) as caught:
        task(batch=4, microbatch=8, precision="fp23", clip=-1.0, model=nn.Linear(2, 2), weights="missing.safetensors")
    text = str(caught.value)
    assert len(caught.value.broken) == 5
    assert "microbatch=8 is larger than batch=4" in text
    assert "precision='fp23': did you mean fp32?" in text
    assert "clip=-1.0" in text
    assert "model is a module, Linear, that is built already; Sheaf calls model() to build it" in text
    assert "weights='missing.safetensors': no such file" in text


def test_data_without_items_or_length():
    with pytest.raises(DataError, match="is empty; training needs at least one sample"):
        task(data=[])
    with pytest.raises(DataError, match=r"a generator without len\(\) and \[i\]"):
        task(data=(item for item in range(3)))


def test_losses_are_sums_with_weights():
    mean = as_loss(torch.tensor(2.0), samples=3)
    assert (float(mean.sum), mean.weight) == (6.0, 3.0)
    given = Loss(torch.tensor(5.0), 7)
    assert as_loss(given, samples=3) is given
    with pytest.raises(TaskError, match=r"a tensor of shape \(2,\)"):
        as_loss(torch.ones(2), samples=2)
    with pytest.raises(TaskError, match="returned NoneType"):
        as_loss(None, samples=2)
    with pytest.raises(TaskError, match=r"Loss.sum has shape \(2,\)"):
        as_loss(Loss(torch.ones(2), 1), samples=2)


def test_items_that_draw_random_numbers_draw_from_the_stream():
    class Noisy:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> tuple[torch.Tensor, float, float]:
            return torch.rand(2), random.random(), float(np.random.rand())

    given = task(data=Noisy())
    first, second, other = (fetch(given, (0, 1), stream) for stream in (11, 11, 12))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_an_item_or_a_batch_that_cannot_be_had_is_named():
    with pytest.raises(DataError, match=r"data\[9\] raised IndexError"):
        fetch(task(), (0, 9), 0)
    with pytest.raises(TaskError, match=r"collating samples \[0, 1\] raised .*items of different shapes need collate="):
        fetch(task(data=[torch.ones(1), torch.ones(2)]), (0, 1), 0)


def test_what_the_model_is_given():
    assert arguments(task(), ["x", "y"]) == (("x",), {})
    assert arguments(task(inputs=lambda batch: {"a": batch}), 3) == ((), {"a": 3})
    assert arguments(task(inputs=lambda batch: (batch, 1)), 3) == ((3, 1), {})
    with pytest.raises(TaskError, match="a batch is a dict, not an"):
        arguments(task(), {"a": 1})


def test_wrong_types_are_told_at_once():
    wrong = task()  # built right, then spoiled: the tests' own type checks look at the constructor first
    for name, value in {
        "batch": "6", "microbatch": 2.0, "clip": "big", "seed": "a", "name": 5, "precision": 32, "weights": 3,
        "shuffle": "no", "inputs": 3,
    }.items():  # fmt: skip
        object.__setattr__(wrong, name, value)
    with pytest.raises(TaskError) as caught:
        wrong.__post_init__()
    broken = caught.value.broken
    assert len(broken) == 9
    assert "batch='6' is a str; give a whole number of samples" in broken
    assert "microbatch=2.0 is a float; give a whole number of samples, or None" in broken
    assert "name=5 is an int; give a text" in broken
    with pytest.raises(TaskError, match="batch=True is a bool"):
        task(batch=True)


def test_wrong_values_are_told_beside_wrong_types():
    wrong = task()
    for name, value in {"seed": "a", "batch": 0, "microbatch": 7, "precision": "fp8", "clip": -1.0}.items():
        object.__setattr__(wrong, name, value)
    with pytest.raises(TaskError) as caught:
        wrong.__post_init__()
    assert len(caught.value.broken) == 4
    assert caught.value.broken[:2] == (
        "seed='a' is a str; give a whole number",
        "batch=0: at least one sample per step is needed",
    )
    object.__setattr__(wrong, "batch", "6")
    with pytest.raises(TaskError) as caught:
        wrong.__post_init__()
    assert [rule.split("=")[0] for rule in caught.value.broken] == ["batch", "seed", "precision", "clip"]


@dataclass(frozen=True)
class Given:
    x: torch.Tensor
    note: str


class Movable:
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def to(self, where: torch.device | torch.dtype) -> "Movable":
        return Movable(self.x.to(where))


class Rigid(Movable):
    def to(self, where: torch.device | torch.dtype) -> "Rigid":
        if isinstance(where, torch.dtype):
            raise NotImplementedError("of one type only")
        return self


class Stuck:
    def __init__(self) -> None:
        self.x = torch.ones(1)


def test_a_batch_of_any_kind_is_moved():
    ones, whole = torch.ones(2), torch.tensor([3])
    batch = [
        defaultdict(list, a=ones), UserDict(a=ones), OrderedDict(a=ones), Given(ones, "b"), Movable(ones), "c", object()
    ]  # fmt: skip
    found = moved([*batch, whole], torch.device("cpu"), torch.float64)
    assert [type(one) for one in found[:-1]] == [type(one) for one in batch]
    held = [found[0]["a"], found[1]["a"], found[2]["a"], found[3].x, found[4].x]
    assert {one.dtype for one in held} == {torch.float64}
    assert found[3].note == "b"
    assert found[-1].dtype == torch.int64
    assert batch[1]["a"] is ones is batch[3].x
    assert found[0]["new"] == []
    with pytest.raises(TaskError, match=r"a Stuck, which has tensors but no .to\(device\)"):
        moved({"a": Stuck()}, torch.device("cpu"))
    with pytest.raises(TaskError, match=r"Rigid.to\(torch.float64\) raised NotImplementedError: of one type only"):
        moved([Rigid(ones)], torch.device("cpu"), torch.float64)
