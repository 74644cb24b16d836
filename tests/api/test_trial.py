"""Time to a loss: steps of a trial times predicted seconds."""

from dataclasses import replace

import pytest
from click.testing import CliRunner
from tiny import tiny

from sheaf.api.plan import plan
from sheaf.api.train import train
from sheaf.api.trial import Tried, read_trial, time_to_loss
from sheaf.cli.plan import plan as command
from sheaf.errors import RunError
from sheaf.plans import Plan

TRIAL = (Tried(Plan(dp=2), (5.0, 4.0, 3.0, 2.0)), Tried(Plan.parse("dp=2,local=4"), (5.0, 4.5, 4.0, 3.5)))


@pytest.fixture(scope="module")
def ranking():
    return plan(tiny(), cluster="h100-dgx", workers=2, allow_relaxed=True, explain=False)


def test_a_plan_takes_the_steps_of_its_like_times_its_own_seconds(ranking):
    found = time_to_loss(ranking, TRIAL, 4.0)
    rows = {one.plan: one for one in found.plans}
    price = {str(entry.plan): entry.price.step_seconds for entry in ranking.ranked}
    assert rows["dp=2"].steps == 2
    assert rows["dp=2"].seconds == 2 * price["dp=2"]
    assert all(one.tried == "dp=2" for one in found.plans if one.exact)
    seconds = [one.seconds for one in found.plans]
    assert seconds == sorted(seconds)
    assert "dp=2,server=2:async" in found.untried
    assert set(rows) | set(found.untried) == set(price)


def test_a_way_that_was_tried_and_did_not_get_there_comes_last(ranking):
    like = next(entry for entry in ranking.ranked if entry.plan.local)
    found = time_to_loss(ranking, (TRIAL[0], replace(TRIAL[1], plan=like.plan)))
    assert found.loss == 2.0
    assert found.plans[-1].seconds is None
    assert Plan.parse(found.plans[-1].plan).local == like.plan.local


def test_a_loss_that_no_run_reached_is_refused_with_the_lowest(ranking):
    with pytest.raises(RunError, match="lowest is 2"):
        time_to_loss(ranking, TRIAL, 1.0)


def test_a_trial_is_read_from_its_runs_and_refused_for_another_task(tmp_path):
    train(tiny(), "serial", steps=3, out=tmp_path / "serial", quiet=True, predict=False)
    (one,) = read_trial(tiny(), tmp_path)
    assert (one.plan, len(one.losses)) == (Plan(), 3)
    with pytest.raises(RunError, match="parameters: saved 93, given 113"):
        read_trial(tiny(width=11), tmp_path)
    with pytest.raises(RunError, match="holds no runs"):
        read_trial(tiny(), tmp_path / "serial")


def test_a_loss_without_a_trial_and_a_trial_without_relaxed_plans_are_refused(tmp_path):
    with pytest.raises(RunError, match="--target-loss needs --trial"):
        CliRunner().invoke(command, ["task.py", "--target-loss", "2"], catch_exceptions=False)
    with pytest.raises(RunError, match="add --allow-relaxed"):
        CliRunner().invoke(command, ["task.py", "--trial", str(tmp_path)], catch_exceptions=False)
