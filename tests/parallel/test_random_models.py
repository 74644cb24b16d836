"""Random small models under random legal plans compute what plain PyTorch computes.

``SHEAF_EXAMPLES`` says how many are tried; the few of ``make test`` are always the same ones.
"""

import os

import pytest
from hypothesis import HealthCheck, assume, given, note, settings
from plain import Run, assert_same, plain, planned
from random_models import Spec, cases, task_of

from sheaf.errors import PlanError
from sheaf.plans import Plan

EXAMPLES = int(os.environ.get("SHEAF_EXAMPLES", "25"))
STEPS = 2
TOLERANCE = 1e-9  # of float64: a few layers of norms over two samples make much of a rounding
REFUSED = ("runs again after blocks of stage", "stages need a block each")  # what a random pipeline may run into


def trained(spec: Spec, plan: str) -> Run | str | None:
    """The run under a plan, or why the plan is refused."""
    try:
        return planned(task_of(spec), plan, STEPS)
    except PlanError as error:
        return str(error)


@pytest.mark.timeout(0 if EXAMPLES > 25 else 180)
@settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES <= 25,
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
@given(case=cases())
def test_a_random_model_under_a_random_plan_is_exact(pool, case):
    spec, plan = case
    found = pool(trained, Plan.parse(plan).workers, spec, plan)[0]
    if isinstance(found, str):
        note(found)
        assume(not any(reason in found for reason in REFUSED))
    assert isinstance(found, Run), found
    assert_same(found, plain(task_of(spec), STEPS), TOLERANCE)
