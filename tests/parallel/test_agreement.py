"""A lone pipeline's stages step by what they have, before all know which parameters were used."""

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from sheaf.errors import TaskError
from sheaf.parallel import build
from sheaf.plans import Plan
from sheaf.task import Blueprint, Order, Task, fetch

LIMIT_S = 60.0
DATA = [(torch.full((4,), float(index)), torch.ones(2)) for index in range(8)]


def task(model, loss=None, **changed):
    settings = {
        "model": model,
        "loss": loss or (lambda output, batch: nn.functional.mse_loss(output, batch[1])),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        "data": DATA,
        "batch": 4,
        "microbatch": 2,
    }
    return Task(**(settings | changed))


class Waiting(nn.Linear):
    """Its backward ends once another worker's optimizer has stepped."""

    path = Path()

    def forward(self, inputs):
        output = super().forward(inputs)
        output.register_hook(self.wait)
        return output

    def wait(self, gradient):
        end = time.monotonic() + LIMIT_S
        while type(gradient) is torch.Tensor and not self.path.exists():
            assert time.monotonic() < end, "the last stage waits for this one"
            time.sleep(0.001)


class Telling(torch.optim.SGD):
    path = Path()

    def step(self, closure=None):
        super().step(closure)
        self.path.touch()


def test_the_last_stage_steps_while_earlier_ones_go_backward(ranks, tmp_path):
    def trained(path):
        Waiting.path = Telling.path = Path(path)
        model = lambda: nn.Sequential(Waiting(4, 4), nn.Linear(4, 2))  # noqa: E731
        telling = lambda parameters: Telling(parameters, lr=0.01)  # noqa: E731
        step = build(task(model, optimizer=telling, microbatch=4), Plan.parse("pp=2,stages=1:1"))
        report = step()
        step.close()
        return report.loss

    first, second = ranks(trained, 2, str(tmp_path / "stepped"))
    assert first == second


def test_a_stage_without_parameters_goes_along(ranks):
    def model():
        return nn.Sequential(nn.Linear(4, 2), nn.Tanh())

    def trained():
        step = build(task(model), Plan.parse("pp=2,stages=1:1"))
        losses = [step().loss for _ in range(3)]
        weights = step.full_state()
        step.close()
        return losses, weights

    given = task(model)
    plain = Blueprint(given).fill(torch.device("cpu"))
    optimizer, order, wanted = (
        given.optimizer(list(plain.parameters())),
        Order(8, 4, 2, given.seed, shuffle=given.shuffle),
        [],
    )
    for number in range(3):
        optimizer.zero_grad()
        samples = [sample for one in order.step(number) for sample in one.samples]
        batch = fetch(given, samples, 0)
        loss = given.loss(plain(batch[0]), batch)
        loss.backward()
        optimizer.step()
        wanted.append(loss.item())
    for losses, weights in ranks(trained, 2):
        assert losses == pytest.approx(wanted, rel=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(value, plain.state_dict()[name])


def test_a_loss_without_gradient_stops_every_stage_before_anything_is_updated(ranks):
    def trained():
        step = build(
            task(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), lambda output, _: output.detach().sum()),
            Plan.parse("pp=2,stages=1:1"),
        )
        before = {name: value.clone() for name, value in step.full_state().items()}
        with pytest.raises(TaskError, match="no parameter got a gradient"):
            step()
        after = step.full_state()
        step.close()
        return all(torch.equal(before[name], after[name]) for name in before)

    assert ranks(trained, 2) == [True, True]
