"""Fields of a task that are misspelt, missing or nameless are all told at once, with what is like them."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from sheaf.errors import TaskError
from sheaf.task import Task
from sheaf.task.batches import fetch


def loss(output, batch):
    return nn.functional.mse_loss(output, batch[1])


def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


GIVEN = {
    "model": nn.Identity,
    "loss": loss,
    "optimizer": optimizer,
    "data": [(torch.ones(2), torch.ones(2))],
    "batch": 1,
}


def told(*unnamed, **given):
    with pytest.raises(TaskError) as caught:
        Task(*unnamed, **given)
    return caught.value.broken


def test_every_misspelt_and_every_missing_field_is_named():
    assert told(model=nn.Identity, los=loss, optimiser=optimizer) == (
        "'los' is not a field of a task; did you mean loss?",
        "'optimiser' is not a field of a task; did you mean optimizer?",
        "loss, optimizer, data, batch are missing; see help(sheaf.Task)",
    )
    assert told(**{name: value for name, value in GIVEN.items() if name != "batch"}) == (
        "batch is missing; see help(sheaf.Task)",
    )


def test_fields_without_a_name_are_refused():
    assert told(nn.Identity, loss) == ("2 of its fields have no name: give each as NAME=..., such as model=...",)


def test_copies_and_replacements_are_tasks_all_the_same():
    task = Task(**GIVEN)
    for other in (copy.copy(task), replace(task, seed=0), pickle.loads(pickle.dumps(task))):
        assert (other.batch, other.seed, other.loss) == (1, 0, loss)
    with pytest.raises(TaskError, match="'sede' is not a field of a task; did you mean seed"):
        replace(task, sede=1)


def test_a_value_of_many_lines_is_told_by_its_type():
    with pytest.raises(TaskError, match=r"^optimizer is a Tensor; it must be callable"):
        replace(Task(**GIVEN), optimizer=torch.eye(3))


@pytest.mark.parametrize(
    ("collate", "words"),
    [
        (None, "items of different shapes need collate="),
        (torch.stack, "collate= is given a list of items, and must return a batch"),
    ],
)
def test_a_collate_that_fails_is_told_apart_from_none(collate, words):
    task = replace(Task(**GIVEN), data=[torch.ones(2), torch.ones(3)], collate=collate)
    with pytest.raises(TaskError, match=words):
        fetch(task, [0, 1], 0)
