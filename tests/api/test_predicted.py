"""One plan's predicted step, from what its own number of workers measured."""

from dataclasses import replace

import pytest
import small
import torch
from torch import nn

from sheaf.api import plan as module
from sheaf.api.choice import _heard, _told, checked, choose, foretold, promised
from sheaf.cluster import read
from sheaf.errors import PlanError
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


def two_layers():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


@pytest.mark.parametrize("plan", ["dp=2", "tp=2", "pp=2", "dp=2,0=tp"])
@pytest.mark.parametrize("settings", [{"microbatch": 2}, {}, {"batch": 40}])
def test_only_the_plans_own_workers_are_measured_and_only_its_microbatch(monkeypatch, settings, plan):
    asked = []

    def measured_profiles(given, facts, workers, *, source):
        asked.append(([one.samples for one in facts], workers))
        return []

    def measure(workers, *, quick):
        asked.append((workers, quick))
        return read("cpu-1gbit:4")

    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module, "measured_profiles", measured_profiles)
    given = task(model=two_layers, **settings)
    found = checked(given, Plan.parse(plan))
    price, reason = promised(given, found, world=None, source=None, note=lambda line: None)
    assert reason == ""
    assert price.plan == found.plan
    assert price.step_seconds > 0
    assert asked == [(2, True), ([found.facts.samples], 2)]
    assert sum(price.stages) == (3 if plan == "pp=2" else 0)
    assert _heard(_told(price)) == price, "as every worker hears it"


@pytest.mark.parametrize(
    ("plan", "settings", "why"),
    [
        ("pp=4", {}, "has 4 stages, and the model has 3 blocks"),
        ("pp=2,stages=1:1", {}, "places 2 blocks, the model has 3"),
        ("tp=2", {"optimizer": lambda parameters: torch.optim.Adafactor(parameters, lr=0.1)}, "not elementwise"),
        ("dp=2,head=tp", {}, "head=tp matches no module"),
        (
            "dp=2,zero=1",
            {"model": lambda: nn.Sequential(nn.Embedding(4, 2, sparse=True)), "microbatch": 2},
            "sparse gradients",
        ),
    ],
)
def test_what_cannot_be_built_is_refused_before_any_worker_starts(plan, settings, why):
    given = task(**{"model": two_layers} | settings)
    if "sparse" in why:
        given = task(**settings, data=[(torch.ones(2, dtype=torch.int64), torch.ones(2, 2))] * 12)
    with pytest.raises(PlanError, match=why):
        checked(given, Plan.parse(plan))


def test_the_plan_that_runs_names_its_microbatch_and_its_cut():
    found = checked(task(model=two_layers, batch=8), Plan.parse("dp=1,pp=2"))
    assert str(found.plan) == "pp=2,stages=1:2,microbatch=1" or str(found.plan) == "pp=2,stages=2:1,microbatch=1"
    assert found.facts.samples == 1
    assert checked(task(model=two_layers, batch=8), found.plan).plan == found.plan


@pytest.mark.parametrize("given", ["pp=2", "pp=2,microbatch=1", None])
def test_a_resumed_run_is_cut_as_before(tmp_path, given):
    kept = Plan.parse("pp=2,stages=2:1,microbatch=1")
    (tmp_path / "plan.toml").write_text(kept.to_toml())
    chosen, _ = choose(
        task(), given, world=None, workers=2, resumed=tmp_path, allow_relaxed=False, source=None, note=print
    )
    assert chosen == kept


def test_a_pipeline_that_was_ranked_behind_others_gets_its_timeline(monkeypatch):
    monkeypatch.setattr(module, "measure", lambda workers, *, quick: read("cpu-1gbit:4"))
    monkeypatch.setattr(module, "measured_profiles", lambda *_, **__: [])
    given = task(model=two_layers, microbatch=2)
    price, _ = promised(given, checked(given, Plan.parse("pp=2")), world=None, source=None, note=lambda line: None)
    bare = replace(price, timeline=(), seconds={**price.seconds, "compute": 5.0})
    found, _ = foretold(given, None, bare, world=None, source=None, note=lambda line: None)
    assert found.timeline == price.timeline != ()
    assert found.seconds == bare.seconds, "what was ranked stays"
    monkeypatch.setattr(module, "measure", lambda workers, *, quick: 1 / 0)
    assert foretold(given, None, price, world=None, source=None, note=lambda line: None) == (price, "")
    kept, reason = foretold(given, None, bare, world=None, source=None, note=lambda line: None)
    assert kept == bare
    assert "ZeroDivisionError" in reason


@pytest.mark.parametrize("plan", ["cp=2", "cp=2,pp=2"])
def test_split_sequences_are_priced(monkeypatch, plan):
    monkeypatch.setattr(module, "measure", lambda workers, *, quick: read("cpu-1gbit:4"))
    monkeypatch.setattr(module, "measured_profiles", lambda *_, **__: [])
    given = replace(small.SMALL["gpt"](), precision="fp32")
    price, reason = promised(given, checked(given, Plan.parse(plan)), world=None, source=None, note=lambda line: None)
    assert reason == ""
    assert price.seconds["tensor"] > 0
    assert price.seconds["all_reduce"] > 0
