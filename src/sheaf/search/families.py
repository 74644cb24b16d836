"""Plans worth pricing: families that differ in the microbatch only, and for large clusters groups of them by mesh."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from sheaf.cost import worker_seconds
from sheaf.cost.pipeline import measured_stages
from sheaf.plans import Plan
from sheaf.plans.plan import BALANCED, EQUAL
from sheaf.plans.split import holders
from sheaf.plans.stages import placed
from sheaf.search import rules, space
from sheaf.search.measured import facts_for
from sheaf.search.question import Question
from sheaf.search.tables import table_plans


def candidates(question: Question) -> Iterator[Plan]:
    """Every plan that a search looks at, legal for the task or not."""
    for choices in families(question):
        yield from choices


def families(question: Question) -> Iterator[list[Plan]]:
    """Plans that differ in the microbatch only, together."""
    for workers in space.degrees(question.available, question.batch):
        sizes = [None] if question.microbatch else list(space.microbatch_choices(question.batch, workers))
        for strategy in space.strategies(workers):
            yield from _with_shares(question, strategy, sizes)
        yield from _meeting_families(question, workers, sizes)
    yield from _mesh_families(question)
    yield from _part_families(question)
    yield from _expert_families(question)
    yield from _table_families(question)
    yield from _sequence_families(question)


def _meeting_families(question: Question, workers: int, sizes: Sequence[int | None]) -> Iterator[list[Plan]]:
    """Other ways for gradients to meet than an all-reduce; fp16's loss scale goes with none of them."""
    if question.precision == "fp16":
        return
    for strategy in space.served(workers, question.available - workers):
        yield from _with_shares(question, strategy, sizes)
    if question.allow_relaxed:
        for strategy in space.relaxed(workers):
            yield from _with_shares(question, strategy, sizes)


def _mesh_families(question: Question) -> Iterator[list[Plan]]:
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
            for strategy in space.mesh_strategies(dp, tp, pp, sequences, most_stages):
                yield from _with_shares(question, strategy, sizes)
                if forbidden:
                    break
                if question.allow_relaxed and question.precision != "fp16":
                    for relaxed in space.relaxed_replicas(strategy):
                        yield from _with_shares(question, relaxed, sizes)


def _part_families(question: Question) -> Iterator[list[Plan]]:
    """Replicas that split the part in which most parameters are."""
    facts = facts_for(question.facts, 1)
    name = space.heavy_part(facts)
    if name is None:
        return
    for workers in space.degrees(question.available, question.batch):
        split = question.splits.get((workers, 0))
        if workers > 1 and split is not None and any(f"{one}.".startswith(f"{name}.") for one in split.slices):
            sizes = [None] if question.microbatch else list(space.microbatch_choices(question.batch, workers))
            for strategy in space.part_plans(workers, name):
                yield from _with_shares(question, strategy, sizes)


def _expert_families(question: Question) -> Iterator[list[Plan]]:
    """Replicas that hold experts for each other."""
    for (workers, kind), split in sorted(question.splits.items(), key=lambda pair: pair[0]):
        if kind == 2 and workers in space.degrees(question.available, question.batch):
            sizes = [None] if question.microbatch else list(space.microbatch_choices(question.batch, workers))
            for strategy in space.expert_plans(workers, holders(split.slices)):
                if strategy.recompute == "none" or question.may_repeat(strategy):
                    yield from _with_shares(question, strategy, sizes)


def _table_families(question: Question) -> Iterator[list[Plan]]:
    """Replicas whose tables travel as rows."""
    for plan, sizes in table_plans(question):
        yield from _with_shares(question, plan, sizes)


def _sequence_families(question: Question) -> Iterator[list[Plan]]:
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
            for strategy in space.sequence_strategies(dp, cp, pp):
                yield from _with_shares(question, strategy, sizes)


def _with_shares(question: Question, strategy: Plan, sizes: Sequence[int | None]) -> Iterator[list[Plan]]:
    if strategy.recompute != "none" and not question.recomputable:
        return
    same = [_staged(question, strategy if size is None else replace(strategy, microbatch=size)) for size in sizes]
    yield same
    if strategy.dp > 1 and not strategy.stolen and strategy.meets_locally.steps != "speed":
        weighted = [plan for one in same if (plan := _weighted(question, one)) is not None]
        if weighted:
            yield weighted
        if weighted and strategy.zero and strategy.pp == 1:  # as many microbatches each, and shards of equal size
            yield [replace(plan, shares=BALANCED) for plan in weighted]


def _staged(question: Question, plan: Plan) -> Plan:
    """The plan with its stages written in where measured times ask for others than the default."""
    if plan.pp == 1:
        return plan
    stages = measured_stages(plan, question.basis(plan))
    return replace(plan, stages=stages) if stages else plan


def _weighted(question: Question, plan: Plan) -> Plan | None:
    basis, size = question.basis(plan), question.size(plan)
    if basis.alike(plan.workers):
        return None
    shares = space.weighted_shares(worker_seconds(plan, basis, size), -(-question.batch // size))
    return None if shares in (EQUAL, "") else replace(plan, shares=shares)


@dataclass(frozen=True)
class Group:
    """Families of plans on one mesh.

    No plan of them computes less than the fastest of ``examples``, one for each microbatch and way to split layers, and
    none holds less for its parameters than the ``leanest``. Without examples nothing is known before they are priced.
    """

    examples: tuple[Plan, ...]
    leanest: tuple[Plan, ...]
    families: Callable[[], Iterator[list[Plan]]]


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
    yield Group((), (), lambda: _part_families(question))
    yield Group((), (), lambda: _expert_families(question))
    yield Group((), (), lambda: _table_families(question))


def _replicas(question: Question, workers: int) -> Group:
    sizes = [None] if question.microbatch else list(space.microbatch_choices(question.batch, workers))

    def families() -> Iterator[list[Plan]]:
        alike = question.seating.alike(workers)
        for strategy in space.strategies(workers):
            if not (strategy.stolen and alike):
                yield from _with_shares(question, strategy, sizes)
        yield from _meeting_families(question, workers, sizes)

    relaxed = (Plan(dp=workers),) if question.allow_relaxed else ()
    return Group(
        tuple(Plan(dp=workers, microbatch=size) for size in sizes),
        (Plan(dp=workers, zero=3 if workers > 1 else 0), *relaxed),
        families,
    )


def _mesh(question: Question, mesh: tuple[int, int, int], kinds: Sequence[int], most_stages: int) -> Group:
    dp, tp, pp = mesh
    sizes = [None] if question.microbatch else list(space.mesh_microbatches(question.batch, dp, pp))
    sequences = kinds if tp > 1 else (0,)

    def families() -> Iterator[list[Plan]]:
        for strategy in space.mesh_strategies(dp, tp, pp, kinds, most_stages):
            yield from _with_shares(question, strategy, sizes)

    return Group(
        tuple(Plan(dp=dp, tp=tp, pp=pp, sequence=kind, microbatch=size) for kind in sequences for size in sizes),
        (Plan(dp=dp, tp=tp, pp=pp, zero=(1 if pp > 1 else 3) if dp > 1 else 0),),
        families,
    )


def _sequences(question: Question, mesh: tuple[int, int, int]) -> Group:
    dp, cp, pp = mesh
    sizes = [None] if question.microbatch else list(space.mesh_microbatches(question.batch, dp, pp))

    def families() -> Iterator[list[Plan]]:
        for strategy in space.sequence_strategies(dp, cp, pp):
            yield from _with_shares(question, strategy, sizes)

    return Group(
        tuple(Plan(dp=dp, cp=cp, pp=pp, microbatch=size) for size in sizes),
        (Plan(dp=dp, cp=cp, pp=pp, zero=1 if pp > 1 else 3),),
        families,
    )
