"""Plans worth pricing: families that differ in the microbatch only, and for large clusters groups of them by mesh."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from sheaf.cost import update_rates, worker_seconds
from sheaf.cost.pipeline import measured_stages
from sheaf.plans import Plan
from sheaf.plans.shares import BALANCED
from sheaf.plans.split import holders
from sheaf.plans.stages import placed
from sheaf.search import rules, space
from sheaf.search.measured import facts_for
from sheaf.search.question import Question
from sheaf.search.tables import table_plans

SHARDS_OF = 12  # parts of a shard of average size to which shards are rounded


def candidates(question: Question) -> Iterator[Plan]:
    """Every plan that a search looks at, legal for the task or not."""
    for choices in families(question):
        yield from choices


@dataclass(frozen=True)
class Strategy:
    """A plan whose shares, microbatch and stages are open, and the microbatches to try (None: the task's)."""

    plan: Plan
    sizes: Sequence[int | None]

    @cached_property
    def open(self) -> tuple[Plan, ...]:
        """The plan with each microbatch; its stages are those that it has by default."""
        return _sized(self.plan, self.sizes)

    def families(self, question: Question) -> Iterator[list[Plan]]:
        """Plans that differ in the microbatch only, together: with equal shares, and where workers differ others."""
        if self.plan.recompute != "none" and not question.recomputable:
            return
        same = [_staged(question, plan) for plan in self.open]
        yield same
        if question.seating.alike(self.plan.workers):
            return
        if self.plan.dp > 1 and not self.plan.stolen and self.plan.meets_locally.steps != "speed":
            weighted = [plan for one in same if (plan := _weighted(question, one)) is not None]
            if weighted:
                yield weighted
            if weighted and self.plan.zero and self.plan.pp == 1:  # as many microbatches each, shards of equal size
                yield [replace(plan, shares=BALANCED) for plan in weighted]
        if self.plan.stolen and self.plan.zero and (shards := _sharded(question, self.plan)):
            yield [replace(plan, shards=shards) for plan in same]


def families(question: Question) -> Iterator[list[Plan]]:
    """Plans that differ in the microbatch only, together."""
    for strategy in _strategies(question):
        yield from strategy.families(question)


def _strategies(question: Question) -> Iterator[Strategy]:
    for workers in space.degrees(question.available, question.batch):
        sizes = [None] if question.microbatch else list(space.microbatch_choices(question.batch, workers))
        for plan in space.strategies(workers):
            yield Strategy(plan, sizes)
        yield from _meetings(question, workers, sizes)
    yield from _meshes(question)
    yield from _parts(question)
    yield from _experts(question)
    yield from _tables(question)
    yield from _split_sequences(question)


def _meetings(question: Question, workers: int, sizes: Sequence[int | None]) -> Iterator[Strategy]:
    """Other ways for gradients to meet than an all-reduce; fp16's loss scale goes with none of them."""
    if question.precision == "fp16":
        return
    for plan in space.served(workers, question.available - workers):
        yield Strategy(plan, sizes)
    if question.allow_relaxed:
        for plan in space.relaxed(workers):
            yield Strategy(plan, sizes)


def _meshes(question: Question) -> Iterator[Strategy]:
    """Plans with split layers or stages, where each replica gets a microbatch.

    Splitting a layer talks all the time: never between machines that hold several workers. Where the task allows
    neither, one plan of each mesh stands for all.
    """
    facts = facts_for(question.facts, 1)
    most_stages = len(placed(facts))
    forbidden = not question.elementwise or bool(rules.unmergeable(facts))
    per_machine = max(host.workers for host in question.cluster.hosts)
    layers = [(degree, sequence) for degree, sequence in question.splits if sequence < 2]
    tps = {tp for tp, _ in layers if per_machine == 1 or tp <= per_machine}
    count = -(-question.batch // question.microbatch) if question.microbatch else question.batch
    for workers in space.mesh_degrees(question.available):
        for dp, tp, pp in space.meshes(workers, sorted(tps), most_stages):
            if dp > count:
                continue
            sequences = sorted(sequence for degree, sequence in layers if degree == tp)
            sizes = [None] if question.microbatch else list(space.mesh_microbatches(question.batch, dp, pp))
            for plan in space.mesh_strategies(dp, tp, pp, sequences, most_stages):
                yield Strategy(plan, sizes)
                if forbidden:
                    break
                if question.allow_relaxed and question.precision != "fp16":
                    for relaxed in space.relaxed_replicas(plan):
                        yield Strategy(relaxed, sizes)


def _parts(question: Question) -> Iterator[Strategy]:
    """Replicas that split the part in which most parameters are."""
    facts = facts_for(question.facts, 1)
    name = space.heavy_part(facts)
    if name is None:
        return
    for workers in space.degrees(question.available, question.batch):
        split = question.splits.get((workers, 0))
        if workers > 1 and split is not None and any(f"{one}.".startswith(f"{name}.") for one in split.slices):
            sizes = [None] if question.microbatch else list(space.microbatch_choices(question.batch, workers))
            for plan in space.part_plans(workers, name):
                yield Strategy(plan, sizes)


def _experts(question: Question) -> Iterator[Strategy]:
    """Replicas that hold experts for each other."""
    for (workers, kind), split in sorted(question.splits.items(), key=lambda pair: pair[0]):
        if kind == 2 and workers in space.degrees(question.available, question.batch):
            sizes = [None] if question.microbatch else list(space.microbatch_choices(question.batch, workers))
            for plan in space.expert_plans(workers, holders(split.slices)):
                if plan.recompute == "none" or question.may_repeat(plan):
                    yield Strategy(plan, sizes)


def _tables(question: Question) -> Iterator[Strategy]:
    """Replicas whose tables travel as rows."""
    for plan, sizes in table_plans(question):
        yield Strategy(plan, sizes)


def _split_sequences(question: Question) -> Iterator[Strategy]:
    """Replicas, or pipelines of them, whose sequences are split among workers."""
    facts = facts_for(question.facts, 1)
    most_stages = len(placed(facts))
    per_machine = max(host.workers for host in question.cluster.hosts)
    cps = sorted(cp for cp, kind in question.splits if kind == 3 and (per_machine == 1 or cp <= per_machine))
    count = -(-question.batch // question.microbatch) if question.microbatch else question.batch
    for workers in space.mesh_degrees(question.available) if cps else ():
        for dp, cp, pp in space.meshes(workers, cps, most_stages):
            if cp == 1 or dp > count:
                continue
            sizes = [None] if question.microbatch else list(space.mesh_microbatches(question.batch, dp, pp))
            for plan in space.sequence_strategies(dp, cp, pp):
                yield Strategy(plan, sizes)


def _staged(question: Question, plan: Plan) -> Plan:
    """The plan with its stages written in where measured times ask for others than the default."""
    if plan.pp == 1:
        return plan
    stages = measured_stages(plan, question.basis(plan))
    return replace(plan, stages=stages) if stages else plan


def _weighted(question: Question, plan: Plan) -> Plan | None:
    basis, size = question.basis(plan), question.size(plan)
    seconds, begins = worker_seconds(plan, basis, size)
    shares = space.weighted_shares(seconds, -(-question.batch // size), begins)
    return replace(plan, shares=shares) if shares else None


def _sharded(question: Question, plan: Plan) -> str | None:
    """Shards with which all are done with their updates at once; none where equal ones do as well."""
    return space.weighted_shares(update_rates(plan, question.basis(plan)), SHARDS_OF * plan.dp)


@dataclass(frozen=True)
class Group:
    """Strategies on one mesh.

    No plan of them computes less than the fastest of ``examples``, one for each microbatch and way to split layers, and
    none holds less for its parameters than the ``leanest``. Without examples nothing is known before they are priced.
    """

    leanest: tuple[Plan, ...]
    strategies: Callable[[], Iterator[Strategy]]
    made: Callable[[], tuple[Plan, ...]] = tuple  # the examples

    @cached_property
    def examples(self) -> tuple[Plan, ...]:
        """See above."""
        return self.made()


def groups(question: Question) -> Iterator[Group]:
    """The plans worth pricing on a large cluster.

    Stealing from workers that are all alike gains nothing, and is left out.
    """
    count = -(-question.batch // question.microbatch) if question.microbatch else question.batch
    for workers in space.degrees(question.available, question.batch):
        if workers <= count:
            yield _replicas(question, workers)
    facts = facts_for(question.facts, 1)
    most_stages = len(placed(facts))
    forbidden = not question.elementwise or bool(rules.unmergeable(facts))
    per_machine = max(host.workers for host in question.cluster.hosts)
    layers = [(degree, kind) for degree, kind in question.splits if kind < 2]
    tps = sorted({1} | {tp for tp, _ in layers if per_machine == 1 or tp <= per_machine})
    for dp, tp, pp in space.wide_meshes(question.available, count, tps, most_stages):
        yield _mesh(question, (dp, tp, pp), sorted(kind for degree, kind in layers if degree == tp), most_stages)
        if forbidden:
            return
    cps = sorted(cp for cp, kind in question.splits if kind == 3 and (per_machine == 1 or cp <= per_machine))
    for dp, cp, pp in space.wide_meshes(question.available, count, cps, most_stages):
        yield _sequences(question, (dp, cp, pp))
    yield Group((), lambda: _parts(question))
    yield Group((), lambda: _experts(question))
    yield Group((), lambda: _tables(question))


def _replicas(question: Question, workers: int) -> Group:
    sizes = [None] if question.microbatch else list(space.microbatch_choices(question.batch, workers))

    def strategies() -> Iterator[Strategy]:
        alike = question.seating.alike(workers)
        for plan in space.strategies(workers):
            if not (plan.stolen and alike):
                yield Strategy(plan, sizes)
        yield from _meetings(question, workers, sizes)

    relaxed = (Plan(dp=workers),) if question.allow_relaxed else ()
    leanest = Plan(dp=workers, zero=3 if workers > 1 else 0)
    return Group((leanest, *relaxed), strategies, lambda: _sized(leanest, sizes))


def _mesh(question: Question, mesh: tuple[int, int, int], kinds: Sequence[int], most_stages: int) -> Group:
    dp, tp, pp = mesh
    sizes = [None] if question.microbatch else list(space.mesh_microbatches(question.batch, dp, pp))
    sequences = kinds if tp > 1 else (0,)

    def strategies() -> Iterator[Strategy]:
        for plan in space.mesh_strategies(dp, tp, pp, kinds, most_stages):
            yield Strategy(plan, sizes)

    leanest = Plan(dp=dp, tp=tp, pp=pp, zero=(1 if pp > 1 else 3) if dp > 1 else 0)

    def examples() -> tuple[Plan, ...]:
        split = (replace(leanest, sequence=kind) if kind else leanest for kind in sequences)
        return tuple(sized for plan in split for sized in _sized(plan, sizes))

    return Group((leanest,), strategies, examples)


def _sequences(question: Question, mesh: tuple[int, int, int]) -> Group:
    dp, cp, pp = mesh
    sizes = [None] if question.microbatch else list(space.mesh_microbatches(question.batch, dp, pp))

    def strategies() -> Iterator[Strategy]:
        for plan in space.sequence_strategies(dp, cp, pp):
            yield Strategy(plan, sizes)

    leanest = Plan(dp=dp, cp=cp, pp=pp, zero=1 if pp > 1 else 3)
    return Group((leanest,), strategies, lambda: _sized(leanest, sizes))


def _sized(plan: Plan, sizes: Sequence[int | None]) -> tuple[Plan, ...]:
    """The plan with each of these microbatches; None is the task's."""
    return tuple(plan if size is None else plan.with_microbatch(size) for size in sizes)
