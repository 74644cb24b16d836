"""Executors are rehearsed once, and planning goes on where they cannot be."""

from dataclasses import replace

import made
import pytest
import small

from sheaf.api import plan as planning
from sheaf.api import rehearsals
from sheaf.api.rehearsals import Rehearsals, kept_rehearsals
from sheaf.errors import WorkerFailed
from sheaf.graph import BlockTime
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


@pytest.fixture
def rehearse(tmp_path, monkeypatch):
    """What is known after workers rehearsed plans while others took so many cores, so many times as slow as PROFILE."""

    def rehearsed(plans, cores, slower, seconds, *, quiet):
        def run(function, workers, given, facts, profile, missing, **_):
            taken = {str(plan): seconds for plan in missing}
            blocks = {name: BlockTime(slower * 1.0, slower * 2.0) for name in profile.blocks}
            now = replace(profile, cores_taken=cores, blocks=blocks)
            return [Rehearsals(now, taken, (), dict.fromkeys(taken, 2 * seconds))] * workers

        monkeypatch.setattr(rehearsals.launch, "run", run)
        monkeypatch.setattr(rehearsals.others, "quiet", lambda: quiet)
        return kept_rehearsals(small.SMALL["mlp"](), FACTS, PROFILE, plans)

    monkeypatch.setenv("SHEAF_CACHE", str(tmp_path))
    return rehearsed


def test_what_a_calmer_machine_rehearsed_stays(rehearse):
    first = rehearse(PLANS[:1], 1.0, 2.0, 0.8, quiet=False)
    assert (first.seconds, first.profile.cores_taken) == ({"dp=2": 0.8}, 1.0)
    busier = rehearse(PLANS[:1], 1.5, 4.0, 3.0, quiet=True)
    assert busier == first, "it was quiet when the workers were started, and busier than ever once they ran"
    calmer = rehearse(PLANS[:1], 0.0, 1.0, 0.5, quiet=True)
    assert (calmer.seconds, calmer.processor_seconds, calmer.profile.cores_taken) == ({"dp=2": 0.5}, {"dp=2": 1.0}, 0.0)
    assert rehearse(PLANS[:1], 1.5, 4.0, 3.0, quiet=True) == calmer, "nothing is left to be rehearsed"


@pytest.mark.parametrize("later_is_calmer", [True, False])
def test_plans_of_a_busier_time_are_told_beside_the_blocks_of_the_calmer(rehearse, later_is_calmer):
    busy, calm = (1.5, 4.0, 3.0), (0.0, 1.0, 0.5)
    rehearse(PLANS[:1], *(busy if later_is_calmer else calm), quiet=False)
    both = rehearse(PLANS[:2], *(calm if later_is_calmer else busy), quiet=False)
    slowed = "dp=2" if later_is_calmer else "dp=2,zero=1"
    assert both.seconds == {"dp=2": 0.5, "dp=2,zero=1": 0.5} | {slowed: 3.0 / 4}
    assert {one.forward_seconds for one in both.profile.blocks.values()} == {1.0}
    assert both.profile.cores_taken == 1.5, "so that it is rehearsed again once the machine is quiet"


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
    assert said == ["rehearsing executors on 2 workers", "nothing was rehearsed: worker 1 died"]
