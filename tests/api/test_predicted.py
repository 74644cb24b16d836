"""One plan's predicted step, from what its own number of workers measured."""

import pytest
import torch
from torch import nn

from sheaf.api import plan as module
from sheaf.api.choice import checked, promised
from sheaf.cluster import read
from sheaf.plans import Plan
from sheaf.task import Task


def task(**changed):
    settings = {
        "model": lambda: nn.Linear(4, 1),
        "loss": lambda output, batch: nn.functional.mse_loss(output, batch[1]),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "data": [(torch.ones(4), torch.ones(1))] * 12,
        "batch": 8,
    }
    return Task(**(settings | changed))


@pytest.mark.parametrize("settings", [{"microbatch": 2}, {}, {"batch": 40}])
def test_only_the_plans_own_workers_are_measured_and_only_its_microbatch(monkeypatch, settings):
    asked = []

    def measured_profiles(given, facts, workers, *, source):
        asked.append(([one.samples for one in facts], workers))
        return []

    def measure(workers, *, quick):
        asked.append((workers, quick))
        return read("cpu-1gbit:4")

    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module, "measured_profiles", measured_profiles)
    given = task(**settings)
    chosen, facts = checked(given, Plan.parse("dp=2"))
    price, reason = promised(given, chosen, facts, world=None, source=None, note=lambda line: None)
    assert reason == ""
    assert price.plan == chosen
    assert price.step_seconds > 0
    assert asked == [(2, True), ([facts.samples], 2)]
