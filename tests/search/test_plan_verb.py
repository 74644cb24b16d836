"""The verb that ranks plans: what it asks of a task, what it refuses, and one whole ranking on this machine."""

import json
from dataclasses import replace

import made
import pytest
import torch
from torch import nn

from sheaf.api.plan import check, plan, resolve
from sheaf.api.profiles import median
from sheaf.api.splits import told
from sheaf.errors import PlanError, TaskError
from sheaf.graph import trace
from sheaf.plans import Plan
from sheaf.task import Task


@pytest.fixture(autouse=True)
def _nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("SHEAF_CACHE", str(tmp_path))


def task(model=lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)), **changes) -> Task:
    data = [(torch.full((8,), float(index)), torch.zeros(2)) for index in range(24)]
    values = {
        "model": model,
        "loss": lambda output, batch: nn.functional.mse_loss(output, batch[1]),
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        "data": data,
        "batch": 12,
    }
    return Task(**{**values, **changes})


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 2), nn.Dropout(0.5))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 2), nn.BatchNorm1d(2))


@pytest.mark.parametrize(("model", "name", "what"), [(dropping, "1", "draws"), (normed, "1", "statistics")])
def test_an_open_microbatch_is_refused_where_the_answer_depends_on_it(model, name, what):
    with pytest.raises(TaskError, match=rf"microbatch open, but {name} .*{what}.*give the task a microbatch, such as"):
        plan(task(model), cluster=made.cluster(2))
    assert plan(task(model, microbatch=4), cluster=made.cluster(2)).ranked


def test_split_layers_and_stages_are_ranked_and_told():
    ranking = plan(task(microbatch=4), cluster=made.cluster(2))
    assert {"tp=2", "pp=2"} <= {str(replace(entry.plan, stages="")) for entry in ranking.ranked}
    split = ranking.split(Plan(tp=2))
    assert (split["workers"], split["matrices"], split["split"]) == (2, 2, 2)
    assert (split["by_output"], split["by_input"], split["sums"], split["gathered"]) == (1, 1, 1, [])
    assert told(split) == [
        "2 of 2 weight matrices split among 2 (1 by outputs, 1 by inputs), 1 sum of 32 B per microbatch",
        "nothing is gathered",
    ]
    assert ranking.split(Plan(dp=2)) is None
    assert json.loads(json.dumps(ranking.to_dict()))["splits"][0]["slices"]["2.weight"]["dim"] == 1


def test_a_rehearsal_that_fails_refuses_its_number_of_workers_only(monkeypatch):
    def rehearse(given, number, **_):
        raise PlanError(f"{number} is no good") if number == 2 else ValueError("odd\nindeed")

    monkeypatch.setattr("sheaf.api.splits.rehearse", rehearse)
    ranking = plan(task(microbatch=4), cluster=made.cluster(3))
    assert ranking.ranked
    told = {refusal.plan: refusal.reason for refusal in ranking.refused}
    assert (told["tp=2"], told["tp=3"]) == ("2 is no good", "ValueError: odd")


def test_an_optimizer_that_is_not_elementwise_splits_nothing():
    ranking = plan(task(microbatch=4, optimizer=torch.optim.LBFGS), cluster=made.cluster(2))
    assert not ranking.splits
    assert any(refusal.plan == "tp=2" and "not elementwise" in refusal.reason for refusal in ranking.refused)


def test_resolve_writes_the_microbatch_in():
    facts = trace(task(), 12)
    assert resolve(task(), Plan.parse("dp=5"), facts).microbatch == 3
    assert resolve(task(), Plan.parse("dp=2,tp=2"), facts).microbatch == 6
    assert resolve(task(), Plan.parse("pp=2"), facts).microbatch == 2
    assert resolve(task(), Plan.parse("dp=2,microbatch=2"), facts).microbatch == 2
    assert resolve(task(microbatch=4), Plan.parse("dp=2"), facts).microbatch is None
    with pytest.raises(PlanError, match="the task says microbatch=4"):
        resolve(task(microbatch=4), Plan.parse("microbatch=3"), facts)


def test_a_plan_by_hand_is_checked_before_anything_starts():
    given = task(microbatch=4, optimizer=torch.optim.LBFGS)
    facts = trace(given, 4)
    with pytest.raises(PlanError) as caught:
        check(given, Plan.parse("dp=4,zero=1"), facts, workers=2)
    assert len(caught.value.broken) == 3
    assert check(given, Plan.parse("dp=2"), facts, workers=2) == Plan.parse("dp=2")


def test_a_known_cluster_is_priced_without_measuring():
    ranking = plan(task(microbatch=4), cluster="cpu-1gbit")
    assert ranking.best.plan.serial, "a model this small is not worth a network"
    assert json.loads(json.dumps(ranking.to_dict()))["cluster"] == "cpu-1gbit"


def test_the_open_microbatch_is_in_every_plan():
    ranking = plan(task(), cluster=made.cluster(2))
    assert all(entry.plan.microbatch for entry in ranking.ranked)


def test_the_median_of_workers_that_measured_together():
    facts = made.facts(blocks=1)
    combined = median([made.profile(facts, block_seconds=seconds) for seconds in (0.1, 0.3, 0.2)])
    assert combined.blocks["b0"].forward_seconds == 0.2


@pytest.mark.whole
def test_this_machine_is_measured_and_the_second_time_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("SHEAF_CACHE", str(tmp_path))
    first = plan(task(microbatch=4), workers=2, quick=True)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path.is_file()}
    measured = [path.stem for path in kept if path.parent.name == "profiles"]
    rehearsed = [name for name in measured if name.endswith("-rehearsed")]
    assert len(measured) - len(rehearsed) == 2, "one profile per number of workers"
    assert len(rehearsed) == 1, "executors, on two workers"
    assert len([path for path in kept if path.parent.name == "splits"]) == 3, "plain, along the sequence, and cp"
    second = plan(task(microbatch=4), workers=2, quick=True)
    assert second.to_dict() | {"search_seconds": 0} == first.to_dict() | {"search_seconds": 0}
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path.is_file()} == kept
