"""Executors are rehearsed once, and planning goes on where they cannot be."""

from dataclasses import replace

import made
import pytest
import small

from sheaf.api import plan as planning
from sheaf.api import rehearsals
from sheaf.api.rehearsals import Rehearsals, kept_rehearsals
from sheaf.errors import WorkerFailed
from sheaf.plans import Plan
from sheaf.search import Question

FACTS = made.facts(4)
PROFILE = made.profile(FACTS, concurrency=2)
PLANS = [Plan.parse(text) for text in ("dp=2", "dp=2,zero=1", "tp=2")]


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """The plans that workers were asked to rehearse, call by call."""
    calls = []

    def run(function, workers, given, facts, profile, plans, **_):
        calls.append((workers, [str(plan) for plan in plans]))
        taken = {str(plan): 0.5 for plan in plans if plan.tp == 1}
        return [Rehearsals(profile, taken, tuple(str(plan) for plan in plans if plan.tp > 1))] * workers

    monkeypatch.setenv("SHEAF_CACHE", str(tmp_path))
    monkeypatch.setattr(rehearsals.launch, "run", run)
    return calls


def test_what_was_rehearsed_or_refused_before_is_remembered(asked):
    task = small.SMALL["mlp"]()
    first = kept_rehearsals(task, FACTS, PROFILE, PLANS[1:])
    again = kept_rehearsals(task, FACTS, PROFILE, PLANS)
    assert asked == [(2, ["dp=2,zero=1", "tp=2"]), (2, ["dp=2"])]
    assert again.seconds == {"dp=2,zero=1": 0.5, "dp=2": 0.5}
    assert again.refused == first.refused == ("tp=2",)
    assert kept_rehearsals(task, FACTS, PROFILE, PLANS) == again
    assert len(asked) == 2
    kept_rehearsals(task, FACTS, PROFILE, PLANS, fresh=True)
    assert asked[-1] == (2, ["dp=2", "dp=2,zero=1", "tp=2"])


def test_what_a_busy_machine_rehearsed_is_rehearsed_again_once_it_is_quiet(asked, monkeypatch):
    task, disturbed = small.SMALL["mlp"](), replace(PROFILE, cores_taken=1.0)
    monkeypatch.setattr(rehearsals.others, "quiet", lambda: False)
    for _ in range(2):
        kept_rehearsals(task, FACTS, disturbed, PLANS[:1])
    assert len(asked) == 1, "it would be no better"
    monkeypatch.setattr(rehearsals.others, "quiet", lambda: True)
    for _ in range(2):
        kept_rehearsals(task, FACTS, PROFILE, PLANS[:1])
    assert len(asked) == 2


def test_a_model_that_does_not_fit_twice_is_not_rehearsed(asked):
    large = made.facts(4, 40_000_000)
    assert kept_rehearsals(small.SMALL["mlp"](), large, made.profile(large), PLANS) is None
    assert asked == []


def test_planning_goes_on_when_a_rehearsal_fails(asked, monkeypatch):
    def failing(*_, **__):
        raise WorkerFailed("worker 1 died\nof this")

    said = []
    monkeypatch.setattr(rehearsals.launch, "run", failing)
    question = Question(batch=8, facts={4: FACTS}, cluster=made.cluster(2), microbatch=4)
    found = planning._with_overheads(
        small.SMALL["mlp"](), question, {(4, 2): PROFILE}, PLANS, source=None, say=said.append
    )
    assert found == {(4, 2): PROFILE}
    assert said == ["nothing was rehearsed: worker 1 died"]
