"""Random small models under random legal plans compute what plain PyTorch computes.

``SHEAF_EXAMPLES`` says how many are tried; the few of ``make test`` are always the same ones.
"""

import os

import pytest
from hypothesis import HealthCheck, assume, given, note, settings
from plain import assert_same, plain, planned
from random_models import cases, task_of

from pool import RankRaised
from sheaf.errors import PlanError
from sheaf.plans import Plan

EXAMPLES = int(os.environ.get("SHEAF_EXAMPLES", "15"))
STEPS = 2
TOLERANCE = 1e-9  # of float64: a few layers of norms over two samples make much of a rounding
REFUSED = ("runs again after blocks of stage", "stages need a block each")  # what a random pipeline may run into


@pytest.mark.timeout(0 if EXAMPLES > 15 else 600)
@settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES <= 15,
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
@given(case=cases())
def test_a_random_model_under_a_random_plan_is_exact(pool, case):
    spec, plan = case
    try:
        found = pool(planned, Plan.parse(plan).workers, task_of(spec), plan, STEPS)[0]
    except RankRaised as error:
        note(str(error.exception))
        assume(not (isinstance(error.exception, PlanError) and any(why in str(error.exception) for why in REFUSED)))
        raise
    assert_same(found, plain(task_of(spec), STEPS), TOLERANCE)
