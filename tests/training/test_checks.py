"""What is refused before any worker starts."""

import pytest
import torch
from test_loop import make_task
from torch import nn

from sheaf.errors import DataError, PlanError, TaskError
from sheaf.plans import Plan
from sheaf.task.blueprint import Blueprint
from sheaf.training import affordable, describe, first_sample


class Broken:
    def __len__(self):
        return 3

    def __getitem__(self, index):
        raise OSError("disk gone")


def test_data_whose_item_raises_is_named():
    with pytest.raises(DataError, match=r"data\[0\] raised OSError: disk gone"):
        first_sample(make_task(data=Broken()))


def test_reading_a_sample_leaves_the_random_state():
    torch.manual_seed(3)
    first_sample(make_task())
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))


def test_a_model_that_does_not_fit_is_refused_with_the_numbers():
    blueprint = Blueprint(make_task(model=lambda: nn.Linear(1 << 20, 1 << 20, bias=False)))
    with pytest.raises(PlanError, match=r"2 x 4.00 TiB of parameters.*64.0 GiB.*zero=3"):
        affordable(blueprint, Plan(dp=2), 64 * 2**30)
    with pytest.raises(PlanError, match=r"1 x 4.00 TiB"):
        affordable(blueprint, Plan(dp=2, zero=3), 64 * 2**30)
    affordable(blueprint, Plan(dp=2, zero=3), 9 * 2**40)


def test_an_optimizer_that_does_not_build_is_told():
    with pytest.raises(TaskError, match="building the optimizer raised ValueError"):
        describe(make_task(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=-1.0)), Plan())
    with pytest.raises(TaskError, match=r"optimizer.. returned a NoneType"):
        describe(make_task(optimizer=lambda parameters: None), Plan())
