"""How large ZeRO's shards are: as the plan says, in proportion to weighted shares of the batch, or equal.

A worker at half speed that computes half as much would need as long as the others for half of the update. Where shares
are ``stolen`` or ``balanced`` they are not known when state is cut: shards are equal unless the plan gives ``shards``.
"""

from sheaf.plans.plan import Plan


def shard(plan: Plan, whole: float, weight: float | None = None) -> float:
    """What one worker holds of ``whole`` where it is sharded; of a replica with that ``weight``, or the fullest.

    >>> shard(Plan.parse("dp=4,zero=1"), 12), shard(Plan.parse("dp=3,zero=1,shares=3:1:2"), 12)
    (3.0, 6.0)
    >>> shard(Plan.parse("dp=2,cp=2,zero=1,shares=2:1"), 12, weight=1)
    2.0
    >>> shard(Plan.parse("dp=2,shares=stolen,zero=1,shards=3:1"), 12)
    9.0
    """
    if plan.even_shards:  # the same, quicker for many
        return whole * (1 if weight is None else weight) / plan.alike
    return whole * (max(plan.shard_weights) if weight is None else weight) / (sum(plan.shard_weights) * plan.cp)
