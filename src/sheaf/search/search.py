"""Price every plan worth it, refuse what cannot run, rank the rest, and say why."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sheaf.cluster.cluster import Cluster
from sheaf.cost import Price, microbatch_sizes, priced, worker_seconds
from sheaf.cost.basis import Basis
from sheaf.cost.pipeline import measured_stages
from sheaf.cost.placement import seats
from sheaf.graph.facts import GLUE, LOSS, ModelFacts, Profile
from sheaf.plans import Plan
from sheaf.plans.plan import EQUAL
from sheaf.plans.split import SplitFacts, holders
from sheaf.plans.stages import default_microbatch, placed
from sheaf.search import rules, space, words
from sheaf.search.measured import Profiles, facts_for, profile_for
from sheaf.search.ranking import Entry, Ranking, Refusal


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a search is asked.

    ``facts`` by samples per microbatch: one size where the task fixes it (``microbatch``), else those worth trying
    or a few of them. ``profiles`` by (samples, busy workers per host); none: a roofline prices. ``elementwise`` says
    whether the optimizer may step flat slices, ``allow_relaxed`` whether plans count that are not exact. ``splits`` by
    (workers that split a layer, sequence 0 or 1; see ``Plan.split_kind``): what is not there is not proposed.
    """

    batch: int
    facts: Mapping[int, ModelFacts]
    cluster: Cluster
    microbatch: int | None = None
    workers: int | None = None
    profiles: Profiles = field(default_factory=dict)
    elementwise: bool = True
    precision: str = "fp32"
    splits: Mapping[tuple[int, int], SplitFacts] = field(default_factory=dict)
    allow_relaxed: bool = False
    _bases: dict[object, Basis] = field(default_factory=dict[object, Basis], init=False, repr=False, compare=False)

    @property
    def available(self) -> int:
        """Workers that a plan may use."""
        return self.cluster.workers if self.workers is None else min(self.workers, self.cluster.workers)

    def size(self, plan: Plan) -> int:
        """Samples per microbatch under a plan."""
        return self.microbatch or plan.microbatch or default_microbatch(plan, self.batch)

    @property
    def recomputable(self) -> bool:
        """Whether any block keeps more than its input, so that running it again would save memory."""
        blocks = next(iter(self.facts.values())).blocks
        return any(block.composite for block in blocks if block.name not in (GLUE, LOSS))

    def price(self, plan: Plan) -> Price:
        """The price of one plan, with a pipeline's timeline.

        Raises ValueError for a plan that splits layers in a way that ``splits`` does not hold.
        """
        return priced(plan, self.basis(plan), microbatch_sizes(self.batch, self.size(plan)), drawn=True)

    def rough(self, plan: Plan) -> Price:
        """The price without timeline."""
        return priced(plan, self.basis(plan), microbatch_sizes(self.batch, self.size(plan)))

    def basis(self, plan: Plan) -> Basis:
        """What the price of this plan has in common with others."""
        size = self.size(plan)
        facts = facts_for(self.facts, size)
        split = self.split_key(plan)
        measured = (size, self._busy(plan)) if self.profiles else None
        key = (facts.samples, measured, split, plan.parts)
        if key not in self._bases:
            self._bases[key] = Basis.of(
                plan, facts, self.profile(plan), self.cluster, precision=self.precision, split=self.splits.get(split)
            )
        return self._bases[key]

    def split_key(self, plan: Plan) -> tuple[int, int]:
        """Where in ``splits`` stands how a plan splits layers."""
        return plan.split_kind

    def profile(self, plan: Plan) -> Profile | None:
        """Measured times under as much company as the plan's workers have."""
        return profile_for(self.profiles, self.size(plan), self._busy(plan))

    def _busy(self, plan: Plan) -> int:
        return max(seat.busy for seat in seats(self.cluster, plan.workers))


def search(question: Question) -> Ranking:
    """Every plan that can run, best first, and every one that cannot.

    Where the task leaves the microbatch open, each strategy is ranked with the microbatch that suits it best, and
    refused only when none does. Plans within 1 % of each other go by fewer workers, less memory, shorter text.
    """
    prices: list[Price] = []
    refused: list[Refusal] = []
    starved: list[tuple[Price, str]] = []
    for choices in _families(question):
        legal, faults = _legal(question, choices)
        if not legal:
            refused.append(faults[0])
            continue
        found = [question.rough(plan) for plan in legal]
        fitting = [one for one in found if rules.too_large(one, question.cluster) is None]
        if fitting:
            prices.append(_ordered(fitting)[0])
        else:
            leanest = min(found, key=lambda one: one.peak_bytes)
            starved.append((leanest, rules.too_large(leanest, question.cluster) or ""))
    refused.extend(Refusal(str(one.plan), why, rules.memory_remedy(one, prices)) for one, why in starved)
    ordered = _ordered(prices)
    drawn = set[int]()
    for place, found in enumerate(ordered):  # torchrun takes the best plan for as many workers as it started
        if found.plan.workers not in drawn and found.plan.pp > 1:
            ordered[place] = question.price(found.plan)
        drawn.add(found.plan.workers)
    return Ranking(
        ranked=_explained(ordered),
        refused=tuple(refused),
        cluster=question.cluster.name,
        batch=question.batch,
        microbatch=question.microbatch,
    )


def candidates(question: Question) -> Iterator[Plan]:
    """Every plan that a search looks at, legal for the task or not."""
    for choices in _families(question):
        yield from choices


def _families(question: Question) -> Iterator[list[Plan]]:
    """Plans that differ in the microbatch only, together."""
    for workers in space.degrees(question.available, question.batch):
        sizes = [None] if question.microbatch else list(space.microbatch_choices(question.batch, workers))
        for strategy in space.strategies(workers):
            yield from _with_shares(question, strategy, sizes)
        if question.allow_relaxed and question.precision != "fp16":
            for strategy in space.relaxed(workers):
                yield from _with_shares(question, strategy, sizes)
    yield from _mesh_families(question)
    yield from _part_families(question)
    yield from _expert_families(question)
    yield from _sequence_families(question)


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
                yield from _with_shares(question, strategy, sizes)


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
    same = [_staged(question, replace(strategy, microbatch=size)) for size in sizes]
    yield same
    if strategy.dp > 1 and not strategy.stolen:
        weighted = [plan for one in same if (plan := _weighted(question, one)) is not None]
        if weighted:
            yield weighted


def _staged(question: Question, plan: Plan) -> Plan:
    """The plan with its stages written in where measured times ask for others than the default."""
    if plan.pp == 1:
        return plan
    return replace(plan, stages=measured_stages(plan, question.basis(plan)))


def _weighted(question: Question, plan: Plan) -> Plan | None:
    basis, size = question.basis(plan), question.size(plan)
    if len(set(basis.seats(plan.workers))) == 1:
        return None
    shares = space.weighted_shares(worker_seconds(plan, basis, size), -(-question.batch // size))
    return None if shares in (EQUAL, "") else replace(plan, shares=shares)


def _legal(question: Question, choices: list[Plan]) -> tuple[list[Plan], list[Refusal]]:
    legal: list[Plan] = []
    faults: list[Refusal] = []
    for plan in choices:
        found = rules.broken(
            plan,
            facts=facts_for(question.facts, question.size(plan)),
            workers=question.available,
            batch=question.batch,
            microbatch=question.microbatch,
            elementwise=question.elementwise,
        )
        faults.extend(found)
        if not found:
            legal.append(plan)
    return legal, faults


def _ordered(prices: list[Price]) -> list[Price]:
    """By time; of what is left, all within 1 % of the fastest go by workers, memory, text."""
    rest = sorted(prices, key=lambda one: one.step_seconds)
    ordered: list[Price] = []
    while rest:
        limit = rest[0].step_seconds * (1 + words.TIE)
        tied = [one for one in rest if one.step_seconds <= limit]
        ordered += sorted(
            tied, key=lambda one: (one.plan.workers, words.memory_class(one), len(str(one.plan)), str(one.plan))
        )
        rest = rest[len(tied) :]
    return ordered


def _explained(ordered: list[Price]) -> tuple[Entry, ...]:
    if not ordered:
        return ()
    best, *others = ordered
    serials = [one for one in ordered if one.plan.serial]
    serial = min(serials, key=lambda one: one.step_seconds) if serials else None
    reason = words.reason(best, serial, others[0] if others else None)
    leader = Entry(best, reason=reason, caution=words.caution(best.plan))
    rest = (Entry(one, loses_on=words.loses_on(one, best), caution=words.caution(one.plan)) for one in others)
    return (leader, *rest)
