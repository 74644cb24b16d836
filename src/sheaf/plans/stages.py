"""Where a model is cut into the stages of a pipeline: runs of blocks, the most expensive as cheap as can be."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from sheaf.errors import PlanError
from sheaf.graph.facts import LOSS, BlockFact, ModelFacts
from sheaf.plans.plan import Plan

OPERATIONS_PER_BYTE = 10.0  # what a common device computes while it moves a byte of memory
MICROBATCHES_PER_WORKER = 4  # of a pipeline, where nobody says: fewer leave it mostly idle
ROUNDING = 1 + 1e-12  # sums of the same costs in another order differ by less


def default_microbatch(plan: Plan, batch: int) -> int:
    """Samples per microbatch where neither task nor plan says: one per replica, and as many as fill a pipeline.

    >>> default_microbatch(Plan.parse("dp=2,tp=2"), 64), default_microbatch(Plan.parse("dp=2,pp=2"), 64)
    (32, 4)
    """
    return -(-batch // (plan.dp * (MICROBATCHES_PER_WORKER * plan.pp if plan.pp > 1 else 1)))


def placed(facts: ModelFacts) -> tuple[BlockFact, ...]:
    """The blocks that stages are made of: all that the model calls, in forward order, without glue and loss."""
    return facts.called


def default_costs(facts: ModelFacts) -> tuple[float, ...]:
    """What each placed block costs where nothing was measured, in operations; the loss counts with the last block.

    The roofline of a common device: the larger of a block's operations and of what its memory traffic keeps the device
    from computing, forward and backward.
    """
    costs = [_operations(block) for block in placed(facts)]
    if costs:
        costs[-1] += sum(_operations(block) for block in facts.blocks if block.name == LOSS)
    return tuple(costs)


def stages_of(plan: Plan, facts: ModelFacts) -> tuple[tuple[str, ...], ...]:
    """The names of each stage's blocks, in forward order: as the plan says, else balanced by ``default_costs``.

    Raises PlanError where there are fewer blocks than stages, and where the plan's stages name more or fewer blocks
    than there are.
    """
    names = [block.name for block in placed(facts)]
    counts = plan.stage_blocks or balanced(default_costs(facts), plan.num_stages)
    if sum(counts) != len(names):
        raise PlanError(
            f"stages={plan.stages} places {sum(counts)} blocks, the model has {len(names)}: make them add up to that, "
            "or drop stages to have them balanced"
        )
    starts = [sum(counts[:stage]) for stage in range(len(counts))]
    return tuple(tuple(names[start : start + count]) for start, count in zip(starts, counts, strict=True))


def balanced(
    costs: Sequence[float],
    stages: int,
    legal: Sequence[bool] | None = None,
    *,
    speeds: Sequence[float] | None = None,
) -> tuple[int, ...]:
    """Blocks per stage such that the most expensive stage is as cheap as possible; every stage has a block.

    ``legal[i]`` says whether block *i* may be the last of its stage (all may where it is not given; the last block
    always is). ``speeds`` are those of the stages' workers, all alike where not given: a stage costs its blocks' sum
    over its speed. Of the cuts that are as good, the one whose stages have the least sum of squares, and then the one
    with fewer blocks in earlier stages. Exact, by dynamic programming.

    Raises PlanError where there are fewer blocks, or legal places to cut at, than stages need.

    >>> balanced((1, 1, 1, 1, 4), 2), balanced((3, 1, 1, 1), 3), balanced((1, 1, 1, 1), 2, speeds=(3, 1))
    ((4, 1), (1, 1, 2), (3, 1))
    """
    ends, pace = (None if given is None else tuple(given) for given in (legal, speeds))
    return _balanced(tuple(costs), stages, ends, pace)


@lru_cache(maxsize=4096)
def _balanced(
    costs: tuple[float, ...], stages: int, legal: tuple[bool, ...] | None, speeds: tuple[float, ...] | None
) -> tuple[int, ...]:
    count = len(costs)
    if stages < 1 or count < stages:
        raise PlanError(f"{stages} stages need a block each, the model has {count}: use at most pp={max(count, 1)}")
    sums = np.concatenate(([0.0], np.cumsum(np.asarray(costs, dtype=float))))
    ends = np.ones(count + 1, dtype=bool)
    if legal is not None:
        ends[1:count] = np.asarray(legal, dtype=bool)[: count - 1]
        if ends[1:count].sum() < stages - 1:
            raise PlanError(
                f"{stages} stages need {stages - 1} places to cut at, the model has {int(ends[1:count].sum())}: use at "
                f"most pp={int(ends[1:count].sum()) + 1}"
            )
    # spans[i, j]: blocks i to j - 1 as one stage; infinite where that is no stage.
    spans = sums[None, :] - sums[:, None]
    possible = (np.arange(count + 1)[None, :] > np.arange(count + 1)[:, None]) & ends[None, :]
    pace = (1.0,) * stages if speeds is None else speeds
    paced = {speed: np.where(possible, spans / speed, np.inf) for speed in set(pace)}
    each = [paced[speed] for speed in pace]
    best = each[-1][:, count]  # by where the last stage begins; then of the last two, and so on
    for cost in reversed(each[:-1]):
        best = np.min(np.maximum(cost, best[None, :]), axis=1)
    limit = best[0] * ROUNDING
    # Among the cuts within the limit: rest[stage][i] is the least sum of squares of this stage and all later ones.
    squared = {speed: np.where(cost <= limit, cost**2, np.inf) for speed, cost in paced.items()}
    squares = [squared[speed] for speed in pace]
    rest = [squares[-1][:, count]]
    for square in reversed(squares[:-1]):
        rest.insert(0, np.min(square + rest[0][None, :], axis=1))
    cut: list[int] = []
    start = 0
    for stage in range(stages - 1):
        through = squares[stage][start] + rest[stage + 1]
        stop = int(np.argmax(through <= through.min() * ROUNDING))
        cut.append(stop - start)
        start = stop
    return (*cut, count - start)


def slowest(costs: Sequence[float], counts: Sequence[int], speeds: Sequence[float] | None = None) -> float:
    """What the most expensive stage of such a cut costs.

    >>> slowest((1, 2, 3), (2, 1))
    3.0
    """
    start, most = 0, 0.0
    for stage, count in enumerate(counts):
        most = max(most, sum(costs[start : start + count]) / (speeds[stage] if speeds else 1.0))
        start += count
    return most


def _operations(block: BlockFact) -> float:
    return max(block.forward_flops, OPERATIONS_PER_BYTE * block.forward_bytes) + max(
        block.backward_flops, OPERATIONS_PER_BYTE * block.backward_bytes
    )
