"""A pipeline: its stages, what each of its workers computes and holds, and where its model is cut."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np

from sheaf.cost.basis import Basis
from sheaf.cost.clock import kept
from sheaf.cost.compute import Pace
from sheaf.cost.overheads import microbatch_seconds, stage_seconds
from sheaf.cost.portion import Portion
from sheaf.cost.step import backward_seconds
from sheaf.graph.facts import ModelFacts, within
from sheaf.plans import Plan
from sheaf.plans.layout import apportion
from sheaf.plans.mesh import Mesh
from sheaf.plans.stages import balanced, dealable, default_costs, passed_on, placed, separable, slowest, stages_of

WORTH_SAYING = 0.01  # a cut by measured times is written down where its slowest stage is faster by more
ABOVE = 1 + 1e-9  # sums in another order differ by less


@dataclass(frozen=True)
class Pipeline:
    """A plan's stages: their portions, and by replica how fast each goes."""

    plan: Plan
    names: tuple[tuple[str, ...], ...]
    portions: tuple[Portion, ...]
    paces: tuple[tuple[Pace, ...], ...]  # [replica][stage]
    workers: tuple[Portion, ...]  # what each pipeline rank computes and holds: its stages together

    @classmethod
    def of(cls, plan: Plan, basis: Basis) -> "Pipeline":
        """The pipeline of a plan; raises PlanError where its stages do not fit the model."""
        names, portions = _stages(plan, basis)
        mesh, seats = Mesh.of(plan), basis.seats(plan.workers)
        fabric = basis.fabric(plan, "tp")
        crossings = [basis.crossing(portion, fabric) for portion in portions]

        def adding(stage: int, speed: float) -> float:
            beside = microbatch_seconds(basis.profile, plan, speed=speed) / len(names)
            return stage_seconds(basis.profile, plan, first=not stage, speed=speed) + beside

        def pace(replica: int, stage: int) -> Pace:
            ranks = (mesh.rank(pp=stage % plan.pp, dp=replica, tp=part) for part in range(mesh.tp))
            there = {seats[rank]: basis.pace(portions[stage], seats[rank]) for rank in ranks}
            size = basis.facts.samples
            paced = max(
                there.values(),
                key=lambda one: (
                    one.forward.seconds(size) + one.backward.seconds(size),
                    one.optimizer_seconds_per_byte,
                ),
            )
            slowest = min(seat.speed for seat in there)
            return replace(paced, crossing=crossings[stage], dispatch_seconds=adding(stage, slowest))

        if basis.alike(plan.workers):
            first = {id(portion): stage for stage, portion in reversed(list(enumerate(portions)))}
            known = {stage: pace(0, stage) for stage in first.values()}
            paces = (tuple(known[first[id(portion)]] for portion in portions),) * plan.dp
        else:
            kinds = seats.numbers[: mesh.workers].reshape(mesh.pp, mesh.dp, mesh.tp)
            rows = [kinds[:, replica].tobytes() for replica in range(plan.dp)]
            numbers = {row: replica for replica, row in reversed(list(enumerate(rows)))}
            made = {row: tuple(pace(one, stage) for stage in range(len(names))) for row, one in numbers.items()}
            paces = tuple(made[row] for row in rows)
        return cls(plan, names, portions, paces, workers(plan, basis))

    @cached_property
    def outputs(self) -> list[int]:
        """Bytes that cross behind each stage but the last for one microbatch of the facts: skips over it too."""
        return [passed_on(placed(portion.facts)[-1]) for portion in self.portions[:-1]]

    def stages_on(self, worker: int) -> range:
        """The stages of one pipeline rank."""
        return range(worker, len(self.names), self.plan.pp)

    def forward_seconds(self, replica: int, stage: int, size: int) -> float:
        """One forward; each worker fetches a microbatch before the first of its stages."""
        pace = self.paces[replica][stage]
        fetch = pace.fetch.seconds(size) if stage < self.plan.pp else 0.0
        return pace.forward.seconds(size) + pace.crossing.forward(size) + fetch + pace.dispatch_seconds / 2

    def backward_seconds(self, replica: int, stage: int, size: int) -> float:
        """One backward, recomputation included."""
        pace = self.paces[replica][stage]
        again = self.plan.again
        computing = backward_seconds(self.plan, pace, size) + pace.dispatch_seconds / 2
        return computing + pace.crossing.backward(size, again=again)

    def busy_seconds(self, replica: int, worker: int, share: Sequence[int]) -> float:
        """What one pipeline rank computes, fetches and tells those who split its layers."""
        counted = Counter(share).items()
        return sum(
            times * (self.forward_seconds(replica, stage, size) + self.backward_seconds(replica, stage, size))
            for stage in self.stages_on(worker)
            for size, times in counted
        )

    def unlike_workers(self, replica: int) -> tuple[int, ...]:
        """Of a replica's workers the first of each kind, in order: those with the same paces take as long."""
        paces, first = self.paces[replica], dict[tuple[int, ...], int]()
        for worker in range(self.plan.pp):
            first.setdefault(tuple(id(paces[stage]) for stage in self.stages_on(worker)), worker)
        return tuple(first.values())


def workers(plan: Plan, basis: Basis) -> tuple[Portion, ...]:
    """What each pipeline rank computes and holds; raises PlanError where its stages do not fit the model."""
    _, portions = _stages(plan, basis)
    return tuple(basis.together(portions[worker :: plan.pp]) for worker in range(plan.pp))


def _stages(plan: Plan, basis: Basis) -> tuple[tuple[tuple[str, ...], ...], tuple[Portion, ...]]:
    """The names of each stage's blocks, and what they are."""

    def made() -> tuple[tuple[tuple[str, ...], ...], tuple[Portion, ...]]:
        names = stage_names(plan, basis)
        portions = (basis.stage(one, number, len(names), number // plan.pp) for number, one in enumerate(names))
        return names, tuple(portions)

    return basis.once(("stages", plan.stages, plan.num_stages, plan.virtual), made)


def stage_names(plan: Plan, basis: Basis) -> tuple[tuple[str, ...], ...]:
    """The names of each stage's blocks, as ``stages_of`` gives them."""
    if plan.stages:
        return basis.once(("names", plan.stages, plan.num_stages), lambda: stages_of(plan, basis.facts))
    blocks = basis.once("placed", lambda: tuple(block.name for block in placed(basis.facts)))
    starts = [0, *accumulate(_default_cut(basis, plan.num_stages))]
    return tuple(blocks[start:stop] for start, stop in pairwise(starts))


def _default_cut(basis: Basis, count: int) -> tuple[int, ...]:
    costs = basis.once("default costs", lambda: default_costs(basis.facts))
    return basis.once(("default", count), lambda: balanced(costs, count))


def kept_stages(plan: Plan, num_microbatches: int, dealt: Collection[int] = ()) -> tuple[int, ...]:
    """The most microbatches each pipeline rank keeps at once, each of its stages counted.

    Replicas are ``dealt`` so many, where that is known: shares dealt by speed count as equal otherwise. Under
    ``interleaved`` a replica that is dealt fewer may keep more.
    """
    if not dealt and ":" in plan.shares:
        dealt = apportion(num_microbatches, plan.weights)
    counts = set(dealt) or {num_microbatches // plan.dp, -(-num_microbatches // plan.dp)}
    if plan.schedule != "interleaved":
        counts = {max(counts)}
    each = [kept(plan.schedule, plan.pp, plan.num_stages, max(1, count)) for count in counts]
    return each[0] if len(each) == 1 else tuple(max(ranks) for ranks in zip(*each, strict=True))


def measured_stages(plan: Plan, basis: Basis) -> str:
    """The cut balanced by what blocks take on this plan's seats, as a plan writes it.

    Empty where the default cut is as good within 1 %. Raises PlanError where there are fewer blocks than stages.
    """
    where = (id(basis.fabric(plan, "tp")), basis.seats(plan.workers)[0]) if basis.alike(plan.workers) else Mesh.of(plan)
    key = ("cut", where, plan.num_stages, plan.recompute)
    return basis.once(key, lambda: ":".join(str(count) for count in _measured_cut(plan, basis)))


def cut_seconds(plan: Plan, basis: Basis) -> float:
    """What a microbatch takes forward and backward in the slowest of the plan's stages."""
    counts = [len(names) for names in stage_names(plan, basis)]
    return slowest(basis.block_seconds(plan), counts, _speeds(plan, basis))


def perfect_seconds(plan: Plan, basis: Basis) -> float:
    """What a microbatch would take in every stage, if each took its share of the whole."""
    return sum(basis.block_seconds(plan)) / sum(_speeds(plan, basis))


def finer_stages(plan: Plan, basis: Basis, whole: ModelFacts) -> str:
    """The cut balanced by what the pieces of blocks take, as a plan writes it: empty where it is one in whole blocks.

    ``basis`` is of facts of pieces, ``whole`` of the blocks that these are pieces of. A stage may begin with a piece
    where no more crosses than at the edges of its block. Raises PlanError where there are too few of such places.
    """
    names = [block.name for block in placed(basis.facts)]
    legal = separable(basis.facts, whole)
    counts = balanced(basis.block_seconds(plan), plan.num_stages, legal, speeds=_speeds(plan, basis))
    firsts = {
        next((name for name in names if name == block.name or within(name, block.name)), ""): block.name
        for block in placed(whole)
    }
    begins = [names[stop] for stop in accumulate(counts[:-1])]
    inside = any(name not in firsts for name in begins)
    return ":".join(firsts.get(name, name) for name in begins) if inside else ""


def _measured_cut(plan: Plan, basis: Basis) -> tuple[int, ...]:
    return _worth_writing(basis, basis.block_seconds(plan), plan.num_stages, _speeds(plan, basis))


def _speeds(plan: Plan, basis: Basis) -> list[float]:
    """How fast each stage's worker is, beside the first one's."""
    mesh, seats, count = Mesh.of(plan), basis.seats(plan.workers), plan.num_stages
    if basis.alike(plan.workers):
        return [1.0] * count
    known = np.array([seat.flops_per_second if basis.profile is None else seat.speed for seat in seats.kinds])
    speeds = known[seats.numbers[: mesh.workers]].reshape(plan.pp, -1).min(axis=1).tolist()  # of the slowest there
    return [speeds[stage % plan.pp] / speeds[0] for stage in range(count)]


def _worth_writing(basis: Basis, costs: Sequence[float], count: int, speeds: Sequence[float]) -> tuple[int, ...]:
    """The cut balanced by these costs; empty where the default one is as good."""
    default = _default_cut(basis, count)
    said = slowest(costs, default, speeds)
    if not dealable(costs, said / (1 + WORTH_SAYING) * ABOVE, speeds):
        return ()  # whatever the best cut is, which takes longer to find
    found = balanced(costs, count, speeds=speeds)
    return () if said <= slowest(costs, found, speeds) * (1 + WORTH_SAYING) else found


def slowest_of_any(costs: Sequence[float], count: int) -> float:
    """What the most expensive of so many stages costs at least, however the blocks are dealt out to them.

    Of any so many of the largest blocks, one stage has its share or more.

    >>> slowest_of_any((1, 1, 1, 1, 1), 2), slowest_of_any((5, 1, 1), 2)
    (3, 5)
    """
    largest = sorted(costs, reverse=True)[::count]
    return max(sum(costs) / count, *(share * cost for share, cost in enumerate(largest, start=1)))
