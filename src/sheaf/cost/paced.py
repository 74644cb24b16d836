"""When a meeting is over that nobody waits for beyond its quorum, and how many steps each worker makes by then."""

from collections import Counter
from collections.abc import Sequence

from sheaf.plans import Plan
from sheaf.plans.layout import in_turn


def until_met(plan: Plan, seconds: Sequence[float]) -> tuple[list[float], float]:
    """What each worker computes for a step, and when the next may begin, both as means over a meeting's steps.

    ``seconds`` are those of an equal share of a step, by worker. Of steps dealt by speed a faster worker has more.

    >>> until_met(Plan.parse("dp=3,local=4:quorum=2:grace=2"), (1.0, 1.2, 4.0))
    ([1.0, 1.2, 4.0], 1.7)
    >>> until_met(Plan.parse("dp=2,local=3:steps=speed"), (1.0, 2.0))
    ([1.3333333333333333, 1.3333333333333333], 1.3333333333333333)
    """
    local, computed = plan.meets_locally, list(seconds)
    if local.steps == "speed":
        dealt = Counter(in_turn(local.every * len(computed), computed))
        computed = [dealt[worker] * each / local.every for worker, each in enumerate(computed)]
    enough = sorted(computed)[(local.quorum or len(computed)) - 1]
    return computed, min(max(computed), enough + local.grace / local.every)
