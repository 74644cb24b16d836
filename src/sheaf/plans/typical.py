"""What a step of a plan takes, of many that were timed."""

from collections.abc import Callable, Sequence
from statistics import fmean, median

from sheaf.plans.plan import Plan


def typical(plan: Plan) -> Callable[[Sequence[float]], float]:
    """The median, which a hiccup does not move; the mean where only some steps meet or wait, as in a prediction.

    >>> typical(Plan.parse("dp=2"))([1.0, 1.0, 1.0, 9.0])
    1.0
    >>> typical(Plan.parse("dp=2,local=4"))([1.0, 1.0, 1.0, 9.0])
    3.0
    """
    return fmean if plan.meets_locally.every > 1 or not plan.serves.exact else median
