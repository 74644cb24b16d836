"""sheaf.build: a step for a loop of one's own, alone and among workers, given a plan or its text."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import sheaf
from sheaf.errors import PlanError, TaskError


def task():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(12, 4, generator=generator)
    return sheaf.Task(
        model=lambda: nn.Linear(4, 1),
        loss=lambda output, batch: nn.functional.mse_loss(output, batch[1]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        data=list(zip(inputs, inputs.sum(1, keepdim=True), strict=True)),
        batch=6,
        microbatch=2,
    )


def losses(plan):
    step = sheaf.build(task(), plan)
    told = [step().loss for _ in range(3)]
    step.close()
    return told


def test_a_loop_of_ones_own_is_the_same_alone_and_among_workers(ranks):
    alone = losses(sheaf.Plan())
    assert alone[-1] < alone[0]
    for there in ranks(losses, 2, "dp=2,zero=1"):
        assert there == pytest.approx(alone, rel=1e-6)


def test_workers_that_are_not_there_are_missed():
    with pytest.raises(PlanError, match="is for 2 workers and 1 are here"):
        sheaf.build(task(), "dp=2")
    with pytest.raises(PlanError, match="did you mean zero"):
        sheaf.build(task(), "dp=2,zer=1")


@pytest.mark.parametrize("start", [sheaf.verify, sheaf.train])
@pytest.mark.parametrize(
    ("model", "told"),
    [
        (lambda: nn.AdaptiveAvgPool1d(1), "the model has no parameters"),
        (lambda: nn.Linear(4, 1).requires_grad_(False), "no parameter of the model requires"),
    ],
)
def test_a_model_of_which_nothing_is_trained_is_refused_before_workers_start(start, model, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TaskError, match=f"{told}.*nothing to train"):
        start(replace(task(), model=model), "dp=2", steps=1)
    assert not list(tmp_path.iterdir())
