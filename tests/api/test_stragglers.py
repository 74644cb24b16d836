"""What a run tells about its workers and its steps."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from sheaf.api.run import Run
from sheaf.plans import Plan
from sheaf.record import StepReport
from sheaf.task import Task

TASK = Task(model=lambda: nn.Linear(1, 1), loss=lambda o, b: o.sum(), optimizer=torch.optim.SGD, data=[1], batch=1)


def run(*steps):
    report = StepReport(step=0, loss=1.0, weight=1.0, samples=1, seconds=1.0)
    reports = tuple(
        replace(report, step=index, microbatches=counts, computed=seconds)
        for index, (counts, seconds) in enumerate(steps)
    )
    return Run(directory=Path("."), plan=Plan(dp=2), reports=reports, task=TASK)


def test_who_takes_longer_for_a_microbatch_is_named():
    warming, step = ((4, 4), (9.0, 1.0)), ((4, 2), (1.0, 1.0))
    assert run(warming, step, step, step).stragglers == {1: 2.0}


def test_more_microbatches_do_not_make_a_straggler():
    assert run(((1, 1), (1.0, 1.0)), *[((6, 3), (2.0, 1.0))] * 3).stragglers == {}


def test_old_records_tell_nothing():
    assert run(*[((4, 4), ())] * 3).stragglers == {}


def test_a_step_takes_its_mean_where_only_some_meet():
    steps = run(*[((4, 4), ())] * 6)
    some = replace(steps, reports=tuple(replace(one, seconds=5.0 if one.step == 4 else 1.0) for one in steps.reports))
    assert some.seconds_per_step == 1.0
    for plan in ("dp=2,local=4", "dp=2,server=1:staleness=2"):
        assert replace(some, plan=Plan.parse(plan)).seconds_per_step == 1.8
