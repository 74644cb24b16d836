"""How large ZeRO's shards are: equal, or in proportion to weighted shares of the batch, so that updates take as long.

A worker at half speed that computes half as much would need as long as the others for half of the update. Where shares
are ``stolen`` or ``balanced`` nobody knows them when state is cut, and shards are equal.
"""

from sheaf.plans.plan import Plan


def shard(plan: Plan, whole: float, weight: float | None = None) -> float:
    """What one worker holds of ``whole`` where it is sharded; of a replica with that ``weight``, or the fullest.

    >>> shard(Plan.parse("dp=4,zero=1"), 12), shard(Plan.parse("dp=3,zero=1,shares=3:1:2"), 12)
    (3.0, 6.0)
    >>> shard(Plan.parse("dp=2,cp=2,zero=1,shares=2:1"), 12, weight=1)
    2.0
    """
    if ":" not in plan.shares:  # the same, quicker for many
        return whole * (1 if weight is None else weight) / plan.alike
    return whole * (max(plan.weights) if weight is None else weight) / (sum(plan.weights) * plan.cp)
