"""Objects that are built already are refused with the line that is to stand in their place, and that line works."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sheaf import Task
from sheaf.errors import DataError, TaskError

DATA = TensorDataset(torch.ones(8, 2), torch.zeros(8, dtype=torch.int64))
LINEAR = nn.Linear(2, 3)
SGD = torch.optim.SGD(LINEAR.parameters(), lr=0.25)


def made(**changes) -> Task:
    given = {
        "model": lambda: nn.Linear(2, 3),
        "loss": lambda output, batch: nn.functional.cross_entropy(output, batch[1]),
        "optimizer": torch.optim.SGD,
        "data": DATA,
        "batch": 4,
    }
    return Task(**(given | changes))


def refused(**changes) -> str:
    with pytest.raises(TaskError) as caught:
        made(**changes)
    (line,) = caught.value.broken
    return line


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss])
def test_a_loss_of_output_and_target(loss):
    said = refused(loss=loss)
    assert "Sheaf calls loss(output, batch): write criterion = nn.CrossEntropyLoss() before the task" in said
    setting, _, line = said.partition(": write ")[2].partition(" before the task, and ")
    names = {"nn": nn}
    exec(setting, names)
    task = made(loss=eval(line.removeprefix("loss="), names))
    output = torch.randn(8, 3)
    wanted = nn.functional.cross_entropy(output, DATA.tensors[1])
    assert torch.equal(task.loss(output, DATA.tensors), wanted)


def test_a_model_an_optimizer_and_a_schedule():
    assert refused(model=LINEAR).endswith("write model=lambda: nn.Linear(...) (weights= takes a safetensors file to "
                                          "start from)")  # fmt: skip
    line = refused(optimizer=SGD).partition("write optimizer=")[2]
    optimizer = made(optimizer=eval(line, {"torch": torch})).optimizer([*LINEAR.parameters()])
    assert (type(optimizer), optimizer.defaults["lr"]) == (torch.optim.SGD, 0.25)
    schedule = torch.optim.lr_scheduler.ExponentialLR(SGD, 0.9)
    said = refused(scheduler=schedule)
    assert said.endswith("write scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, ...)")


def test_data_that_is_in_batches_already():
    with pytest.raises(DataError, match=r"data is a DataLoader, which makes batches.*give its dataset as data"):
        made(data=DataLoader(DATA, batch_size=2))
