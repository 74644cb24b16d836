"""Steps of replicas that split some parts of the model among each other: in those, all work on each microbatch."""

from collections.abc import Sequence
from dataclasses import replace

from sheaf.cost.basis import Basis
from sheaf.cost.communication import ALL_REDUCE, BROADCAST
from sheaf.cost.deals import dealt, own_seconds, total_seconds
from sheaf.cost.overheads import microbatch_seconds
from sheaf.cost.portion import Portion, in_part, together
from sheaf.cost.rows import kept
from sheaf.cost.step import StepTimes, backward_seconds, own_terms, reduced, told
from sheaf.graph.facts import BlockFact
from sheaf.plans import Plan
from sheaf.plans.split import Move
from sheaf.plans.stages import placed


def part_times(plan: Plan, basis: Basis, sizes: Sequence[int]) -> StepTimes:
    """Seconds of one step: round by round, each replica computes its own microbatch outside the parts, all inside."""
    times = StepTimes()
    outside, inside = basis.parts(plan)
    crossing = basis.crossing(inside, basis.fabric(plan, "dp"), boundary_moves(plan, basis))
    placed_there = basis.seats(plan.workers)
    paces = [basis.pace(outside, seat) for seat in placed_there]
    # Data is fetched, and the host's work done, once: outside.
    adding = microbatch_seconds(basis.profile, plan)
    shared = [
        replace(basis.pace(inside, seat), crossing=crossing, dispatch_seconds=adding / plan.dp) for seat in placed_there
    ]
    shared = [replace(pace, fetch=replace(pace.fetch, work_seconds=0.0), host_seconds=0.0) for pace in shared]
    shares = dealt(plan, sizes)
    totals = [total_seconds(plan, pace, share) for pace, share in zip(paces, shares, strict=True)]
    first, slowest = totals.index(min(totals)), totals.index(max(totals))
    own_terms(times, plan, paces[first], shares[first])
    own_terms(times, plan, shared[first], sizes)
    lockstep = sum(max(own_seconds(plan, pace, size) for pace in shared) for size in sizes)
    for number in range(max(len(share) for share in shares)):
        here = [(pace, share[number]) for pace, share in zip(paces, shares, strict=True) if number < len(share)]
        lockstep += max(own_seconds(plan, pace, size) for pace, size in here)
    own = totals[first] + total_seconds(plan, shared[first], sizes)
    times.seconds["wait"] = max(0.0, lockstep - own)
    size = shares[slowest][-1]
    window = sum(backward_seconds(plan, pace, size) for pace in (paces[slowest], shared[slowest]))
    replicas = basis.fabric(plan, "dp")
    summed = kept(plan, outside, basis.facts)
    reduced(times, plan, summed, replicas, window, basis.cluster.overlap)
    stepped = summed.trainable_bytes + inside.trainable_bytes
    times.seconds["optimizer"] = stepped * max(pace.optimizer_seconds_per_byte for pace in paces)
    times.seconds["host"] += max(pace.host_seconds for pace in paces)
    told(times, plan, outside, replicas, len(sizes))
    return times


def held(plan: Plan, basis: Basis) -> Portion:
    """What one replica holds: in the parts, its share of what every microbatch of a round keeps."""
    outside, inside = basis.parts(plan)
    blocks = tuple(
        replace(
            block,
            saved_bytes=block.saved_bytes * plan.dp,
            saved_input_bytes=block.saved_input_bytes * plan.dp,
            fresh_input_bytes=block.fresh_input_bytes * plan.dp,
        )
        for block in inside.facts.blocks
    )
    return together([outside, replace(inside, facts=replace(inside.facts, blocks=blocks))], basis.facts)


def boundary_moves(plan: Plan, basis: Basis) -> tuple[Move, ...]:
    """What enters and leaves the parts for one microbatch of the facts.

    Who owns a microbatch sends a run of split blocks its input, and backward the gradient of its output; gradients of
    the input are summed, where splitting the first layers does not do that already.
    """
    blocks = placed(basis.facts)
    runs: list[list[BlockFact]] = []
    before = False
    for block in blocks:
        inside = in_part(plan, block) == "tp"
        if inside and not before:
            runs.append([])
        if inside:
            runs[-1].append(block)
        before = inside
    moves: list[Move] = []
    for run in runs:
        first, last = run[0], run[-1]
        moves.append(
            Move(first.name, BROADCAST, first.input_bytes, backward=False, why="the owner's input of the part")
        )
        if last is not blocks[-1]:
            moves.append(Move(last.name, BROADCAST, last.output_bytes, backward=True, why="the gradient of its output"))
        if first is not blocks[0] and not _summed(basis, {block.name for block in run}, first.input_bytes):
            moves.append(
                Move(first.name, ALL_REDUCE, first.input_bytes, backward=True, why="the gradient of its input")
            )
    return tuple(moves)


def _summed(basis: Basis, run: set[str], size_bytes: int) -> bool:
    if basis.split is None:
        return False
    here = round(size_bytes * basis.split.samples / basis.facts.samples)
    return any(
        move.backward and move.operation == ALL_REDUCE and move.size_bytes == here and move.block in run
        for move in basis.split.moves
    )
