"""Where a model is cut into the stages of a pipeline: runs of blocks, the most expensive as cheap as can be."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np

from sheaf.errors import PlanError, nearest
from sheaf.graph.facts import LOSS, BlockFact, ModelFacts, within
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


def default_cost(flops: float, moved_bytes: float) -> float:
    """What one direction of a block costs, in operations: the roofline of a common device.

    >>> default_cost(100.0, 5.0), default_cost(100.0, 20.0)
    (100.0, 200.0)
    """
    return max(flops, OPERATIONS_PER_BYTE * moved_bytes)


def stages_of(plan: Plan, facts: ModelFacts) -> tuple[tuple[str, ...], ...]:
    """The names of each stage's blocks, in forward order: as the plan says, else balanced by ``default_costs``.

    Raises PlanError where there are fewer blocks than stages, where the plan's stages name more or fewer blocks than
    there are, and where no stage can begin with a module that they name. ``facts`` are traced for what the plan names
    (``begins``).
    """
    names = [block.name for block in placed(facts)]
    broken = misplaced(plan, names)
    if broken:
        raise PlanError(broken)
    if plan.begins:
        starts = [0, *(_place(name, names) or 0 for name in plan.begins), len(names)]
        return tuple(tuple(names[start:stop]) for start, stop in pairwise(starts))
    counts = plan.stage_blocks or balanced(default_costs(facts), plan.num_stages)
    if sum(counts) != len(names):
        raise PlanError(
            f"stages={plan.stages} places {sum(counts)} blocks, the model has {len(names)}: make them add up to that, "
            "or drop stages to have them balanced"
        )
    return tuple(tuple(names[start:stop]) for start, stop in pairwise([0, *accumulate(counts)]))


def separable(pieces: ModelFacts, whole: ModelFacts) -> tuple[bool, ...]:
    """Whether each placed piece may be the last of its stage: a block's last may, and one inside of a block where what
    crosses behind it is no more than what crosses at the block's edges.

    ``pieces`` are facts of what the blocks of ``whole`` are made of. Nothing is cut inside of a block that runs more
    than once, of whose pieces one with parameters does, or that holds parameters beside those of its pieces.
    """
    called = placed(pieces)
    homes = [_home(piece.name, whole) for piece in called]
    first = {home: place for place, home in reversed([*enumerate(homes)])}
    last = {home: place for place, home in enumerate(homes)}
    sound: dict[str, bool] = {}
    for block in placed(whole):
        inside = [piece for piece, home in zip(called, homes, strict=True) if home == block.name]
        held = {name for piece in inside for name in piece.parameters}
        once = all(piece.calls == 1 for piece in inside if piece.parameters)
        sound[block.name] = block.calls == 1 and once and held >= set(block.parameters)

    def legal(place: int) -> bool:
        home = homes[place]
        if home != homes[place + 1]:
            return True
        entering = passed_on(called[first[home] - 1]) if first[home] else 0
        edges = max(entering, passed_on(called[last[home]]))
        return sound.get(home, False) and passed_on(called[place]) <= edges

    return (*(legal(place) for place in range(len(called) - 1)), True)


def passed_on(block: BlockFact) -> int:
    """Bytes that a stage which ends with this block passes on to later ones, for one microbatch of the facts."""
    return block.output_bytes if block.crossing_bytes is None else block.crossing_bytes


def _home(piece: str, whole: ModelFacts) -> str:
    """The block that a piece is, or is of."""
    return next((one.name for one in whole.called if piece == one.name or within(piece, one.name)), piece)


def misplaced(plan: Plan, names: Sequence[str]) -> list[str]:
    """Why no stages begin with the modules that the plan names, where ``names`` are the blocks in forward order.

    >>> misplaced(Plan.parse("pp=2,stages=b.1"), ["a", "b.0", "b.1"])
    []
    >>> misplaced(Plan.parse("pp=2,stages=a"), ["a", "b"])
    ['stages=a: the model begins with a, which leaves the first stage nothing: begin the second with b or a later one']
    """
    places = {name: _place(name, names) for name in plan.begins}
    broken = [f"stages={plan.stages}: {_unknown(name, names)}" for name, place in places.items() if place is None]
    if broken or not places:
        return broken
    found = {name: place for name, place in places.items() if place is not None}
    ordered = sorted(found, key=found.__getitem__)
    if not found[ordered[0]]:
        return [
            f"stages={plan.stages}: the model begins with {ordered[0]}, which leaves the first stage nothing: "
            + (f"begin the second with {names[1]} or a later one" if len(names) > 1 else "use dp in place of pp")
        ]
    if len(set(found.values())) < len(found):
        return [f"stages={plan.stages}: two of these begin at one place: name one module for each stage but the first"]
    if ordered != list(found):
        said = ":".join(ordered)
        return [f"stages={plan.stages}: forward comes to these modules in another order: write stages={said}"]
    return []


def _place(name: str, names: Sequence[str]) -> int | None:
    """Where a module begins among the blocks, which it may be made of; None where it does nowhere."""
    return next((place for place, one in enumerate(names) if one == name or within(one, name)), None)


def _unknown(name: str, names: Sequence[str]) -> str:
    around = next((one for one in names if within(name, one)), None)
    if around is not None:
        said = around or "the model"
        return f"{name} is inside of {said}, whose forward is not seen to call it: name {said}, or what it calls"
    return f"{name} is no module that the model's forward calls: {nearest(name, names[1:])}"


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
    ends = np.ones(count + 1, dtype=bool)
    if legal is not None:
        ends[1:count] = np.asarray(legal, dtype=bool)[: count - 1]
        if ends[1:count].sum() < stages - 1:
            raise PlanError(
                f"{stages} stages need {stages - 1} places to cut at, the model has {int(ends[1:count].sum())}: use at "
                f"most pp={int(ends[1:count].sum()) + 1}"
            )
    pace = (1.0,) * stages if speeds is None else speeds
    paced = {speed: np.where(ends[None, :], _spans(costs) / speed, np.inf) for speed in set(pace)}
    each = [paced[speed] for speed in pace]
    room = count - stages + 1  # a stage begins with one of so many blocks: others need theirs before and after it
    best = each[-1][stages - 1 : count, count]  # by where the last stage begins; then of the last two, and so on
    for stage, cost in reversed(list(enumerate(each[:-1]))):
        cost = cost[stage : stage + room, stage + 1 : stage + 1 + room]
        best = np.min(np.maximum(cost, best[None, :]), axis=1)
    limit = best[0] * ROUNDING
    # Among the cuts within the limit: rest[stage][i] is the least sum of squares of this stage and all later ones.
    squared = {speed: np.where(cost <= limit, cost**2, np.inf) for speed, cost in paced.items()}
    squares = [squared[speed] for speed in pace]
    rest = [squares[-1][stages - 1 : count, count]]
    for stage, square in reversed(list(enumerate(squares[:-1]))):
        square = square[stage : stage + room, stage + 1 : stage + 1 + room]
        rest.append(np.min(square + rest[-1][None, :], axis=1))
    rest.reverse()
    cut: list[int] = []
    start = 0
    for stage in range(stages - 1):
        through = squares[stage][start, stage + 1 : stage + 1 + room] + rest[stage + 1]
        stop = stage + 1 + int(np.argmax(through <= through.min() * ROUNDING))
        cut.append(stop - start)
        start = stop
    return (*cut, count - start)


@lru_cache(maxsize=64)
def _spans(costs: tuple[float, ...]) -> np.ndarray:
    """What blocks i to j - 1 cost as one stage, at [i, j]; infinite where that is no stage."""
    sums, edges = np.concatenate(([0.0], np.cumsum(np.asarray(costs, dtype=float)))), np.arange(len(costs) + 1)
    return np.where(edges[None, :] > edges[:, None], sums[None, :] - sums[:, None], np.inf)


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


def dealable(costs: Sequence[float], most: float, speeds: Sequence[float]) -> bool:
    """Whether stages at these speeds can share the blocks so that none costs more than ``most``, empty ones allowed.

    Each takes as many as it can: then those after it have least to do.

    >>> dealable((1, 2, 3), 3, (1, 1)), dealable((1, 2, 3), 2.9, (1, 1)), dealable((4, 1), 2, (1, 2))
    (True, False, False)
    """
    sums, taken = [0.0, *accumulate(costs)], 0
    for speed in speeds:
        taken = bisect_right(sums, sums[taken] + most * speed) - 1
    return taken == len(costs)


def _operations(block: BlockFact) -> float:
    return default_cost(block.forward_flops, block.forward_bytes) + default_cost(
        block.backward_flops, block.backward_bytes
    )
