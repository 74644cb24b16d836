"""Recomputing only as many blocks as make a plan fit: of each worker those that keep most, until it has room."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from sheaf.cost import Price, microbatch_sizes
from sheaf.cost.basis import Basis
from sheaf.cost.estimate import holding
from sheaf.cost.memory import MARGIN, PROCESS_BYTES, memory
from sheaf.cost.piped import dealt_counts
from sheaf.cost.pipeline import kept_stages, stage_names, workers
from sheaf.cost.portion import Portion
from sheaf.graph.facts import GLUE, LOSS, BlockFact
from sheaf.plans import Plan
from sheaf.plans.again import AGAIN, globs
from sheaf.plans.stages import placed
from sheaf.search import rules, words
from sheaf.search.question import Question

LOOKED_AT = 3  # plans that recompute all, of those that would be fastest with fewer, for which these are priced
SPARE_BYTES = 1024  # sums of whole numbers are a few bytes off


def fewest(question: Question, plan: Plan) -> Plan | None:
    """The plan with the fewest blocks recomputed with which it fits; None where none need be, or fewer than all do
    not do.

    ``plan`` recomputes none, and its microbatch is known. Of blocks that keep as much the first ones count.
    """
    found = _needed(question, plan)
    if found is None:
        return None
    written = globs(found[0], [block.name for block in question.basis(plan).facts.blocks])
    better = replace(plan, parts=(*plan.parts, *((glob, AGAIN) for glob in written)))
    return better if rules.too_large(question.held(better), question.cluster) is None else None


def _needed(question: Question, plan: Plan) -> tuple[set[str], float] | None:
    """The names of those blocks, and which share they are of all that might be recomputed; None as for ``fewest``."""
    if plan.again or plan.split_parts:
        return None
    basis, sizes = question.basis(plan), microbatch_sizes(question.batch, question.size(plan))
    room = min(_room(seat.available_bytes, seat.device_kind) for seat in basis.seating.kinds(plan.workers))
    scale = sizes.largest / basis.facts.samples
    chosen, able = set[str](), 0
    for names, part, kept, held in _each(plan, basis, sizes):
        mine = [one for one in part.facts.blocks if one.name not in (GLUE, LOSS) and one.calls]
        known = {name: one for name, one in zip(names, mine, strict=True) if one.composite}
        able += len(known)
        found = _chosen(known, held - room, kept * scale, scale)
        if found is None:
            return None
        chosen |= found
    return (chosen, len(chosen) / able) if 0 < len(chosen) < able else None


def instead(question: Question, prices: Sequence[Price]) -> list[Price]:
    """Plans that recompute all blocks with only the fewest, where such a plan may come first: the likeliest of them."""
    if not prices:
        return []
    best = min(one.step_seconds for one in prices)
    likely: list[tuple[float, Plan]] = []
    for one in prices:
        spared = one.seconds["recompute"] if one.plan.recompute == "full" else 0.0
        if spared and one.step_seconds - spared <= best * (1 + words.TIE):
            plan = replace(one.plan, recompute="none")
            needed = _needed(question, plan)
            likely += [(one.step_seconds - spared * (1 - needed[1]), plan)] if needed is not None else []
    likely.sort(key=lambda pair: pair[0])
    better = [fewest(question, plan) for _, plan in likely[:LOOKED_AT]]
    return [question.rough(plan) for plan in better if plan is not None]


def _room(available_bytes: int, device_kind: str) -> float:
    """The largest peak that fits: what ``needed_bytes`` of it stays below."""
    return (available_bytes - (PROCESS_BYTES if device_kind == "cpu" else 0)) / MARGIN - SPARE_BYTES


def _each(plan: Plan, basis: Basis, sizes: Sequence[int]) -> Iterator[tuple[list[str], Portion, float, int]]:
    """By worker: the names of its blocks, what it computes, the microbatches it keeps at once, and its peak."""
    if plan.pp == 1:
        names = [block.name for block in placed(basis.whole.facts)]
        yield names, basis.whole, 1.0, sum(holding(plan, basis, sizes).values())
        return
    stages = stage_names(plan, basis)
    counts = kept_stages(plan, len(sizes), dealt_counts(plan, basis, sizes))
    for worker, (part, count) in enumerate(zip(workers(plan, basis), counts, strict=True)):
        names = [name for stage in stages[worker :: plan.pp] for name in stage]
        kept = count / plan.virtual
        yield names, part, kept, sum(memory(plan, part, basis.profile, sizes, kept=kept).values())


def _chosen(blocks: dict[str, BlockFact], over: float, kept: float, scale: float) -> set[str] | None:
    """The fewest of these that spare so many bytes, each for the microbatches that are kept; None where all do not.

    The one that runs again keeps what it did for as long.
    """
    chosen, most = set[str](), 0.0
    if over <= 0:
        return chosen
    spared = {name: one.saved_bytes + one.saved_input_bytes - one.fresh_input_bytes for name, one in blocks.items()}
    for name in sorted(blocks, key=lambda one: -spared[one]):
        chosen.add(name)
        over -= spared[name] * kept
        most = max(most, (blocks[name].saved_bytes + blocks[name].saved_input_bytes) * scale)
        if over + most <= 0:
            return chosen
    return None
