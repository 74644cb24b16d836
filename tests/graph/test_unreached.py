"""What cannot be trained is told before any worker starts, and what reaches its parameters only now and then is not."""

import random
from contextlib import closing, suppress

import pytest
import torch
from graph_cases import task, vectors
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules

from sheaf.errors import TaskError
from sheaf.graph import trace
from sheaf.graph.refusals import refuse_untrainable
from sheaf.parallel import build
from sheaf.plans import Plan


def told(model=lambda: nn.Linear(4, 3), loss=None, **options) -> str:
    """What is said of such a task before it runs."""
    given = task(model, vectors(4), loss, **options)
    try:
        refuse_untrainable(given, trace(given, 4))
    except TaskError as error:
        return str(error)
    return ""


class Detached(nn.Linear):
    def forward(self, value: Tensor) -> Tensor:
        return super().forward(value).detach()


class Skipping(nn.Module):
    """Leaves its layer out of half of its calls, as drawn by Python's or by torch's generator."""

    def __init__(self, draw) -> None:
        super().__init__()
        self.layer, self.draw = nn.Linear(4, 3), draw

    def forward(self, value: Tensor) -> Tensor:
        made = self.layer(value)
        return made if self.draw() < 0.5 else made.detach()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_a_loss_that_reaches_no_parameter(precision):
    cut = told(loss=lambda output, _batch: output.detach().mean(), precision=precision)
    assert cut.startswith("the loss depends on no parameter that is trained, though the model's output does")
    assert "look for detach(), .data, item() or no_grad() in the loss function" in cut
    fresh = told(loss=lambda output, _batch: output.detach().requires_grad_().mean(), precision=precision)
    assert fresh.startswith("the model's output, or what the loss takes of it, depends on no parameter")


def test_a_model_that_cuts_its_own_output_off():
    assert "look for detach(), .data, item() or no_grad() in the model's forward" in told(lambda: Detached(4, 3))


def test_a_loss_of_some_microbatches_only_is_none_of_that():
    def of_the_second(output: Tensor, batch: list[Tensor]) -> Tensor:
        here = bool((batch[0] == vectors(4)[4][0]).all(1).any())
        return output.mean() if here else output.detach().mean()

    assert not told(loss=of_the_second)
    assert told(loss=of_the_second, batch=4).startswith("the loss depends on no parameter"), (
        "the microbatch is of the second step"
    )


@pytest.mark.parametrize("draw", [random.random, lambda: torch.rand(())])
def test_a_model_that_leaves_itself_out_at_random_is_computed_with_the_draws_of_training(draw):
    """With some seeds a first step of one microbatch reaches nothing; that is told where the trace shows it, too."""
    found = list[tuple[bool, bool]]()
    for seed in range(8):
        step = build(task(lambda: Skipping(draw), vectors(4), batch=4, seed=seed), Plan())
        with closing(step), suppress(TaskError):
            step()
        found.append((step.index == 1, bool(told(lambda: Skipping(draw), batch=4, seed=seed))))
    assert {trains for trains, _ in found} == {True, False}
    assert {trains for trains, is_refused in found if is_refused} == {False}


@pytest.mark.parametrize("scheduler", [schedules.StepLR, lambda made: schedules.LambdaLR(made, [lambda _: 1.0] * 2)])
def test_a_scheduler_that_cannot_be_built(scheduler):
    said = told(scheduler=scheduler)
    assert said.startswith(("building the scheduler raised TypeError", "building the scheduler raised ValueError"))
    assert "such as lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 30)" in said


def test_a_scheduler_is_given_the_optimizer_of_the_model_itself():
    """It has a group for weights and one for biases, and a rate that is a tensor."""

    def optimizer(given: list[nn.Parameter]) -> torch.optim.Optimizer:
        weights, biases = ([one for one in given if one.dim() == size] for size in (2, 1))
        return torch.optim.SGD([{"params": weights}, {"params": biases}], lr=torch.tensor(0.5))

    assert not told(optimizer=optimizer, scheduler=lambda made: schedules.LambdaLR(made, [lambda _: 1.0] * 2))
    assert not told(optimizer=optimizer, scheduler=lambda made: schedules.OneCycleLR(made, 0.1, total_steps=9))


@pytest.mark.parametrize("loss", [nn.functional.cross_entropy, nn.functional.mse_loss])
def test_a_loss_that_was_written_for_output_and_target_is_told_where_the_target_is(loss):
    with pytest.raises(
        TaskError, match=r"Sheaf calls loss\(output, batch\) with the whole batch: its target is batch\[1"
    ):
        trace(task(lambda: nn.Linear(4, 3), vectors(4), loss), 4)


def test_a_loss_that_fails_otherwise_is_told_as_it_is():
    with pytest.raises(TaskError, match=r"raised RuntimeError.*the batch is float32\[4, 4\], int64\[4\]$"):
        trace(task(lambda: nn.Linear(4, 3), vectors(4), lambda output, batch: (output @ batch[1]).mean()), 4)
