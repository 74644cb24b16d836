"""Price every plan worth it, refuse what cannot run, rank the rest, and say why."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from sheaf.cluster.cluster import Cluster
from sheaf.cost import Price, microbatch_sizes, price, worker_seconds
from sheaf.cost.placement import seats
from sheaf.graph.facts import GLUE, LOSS, ModelFacts, Profile
from sheaf.plans import Plan
from sheaf.plans.plan import EQUAL
from sheaf.search import rules, space, words
from sheaf.search.measured import Profiles, facts_for, profile_for
from sheaf.search.ranking import Entry, Ranking, Refusal


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a search is asked.

    ``facts`` by samples per microbatch: one size where the task fixes it (``microbatch``), else those worth trying
    or a few of them. ``profiles`` by (samples, busy workers per host); none: a roofline prices. ``elementwise`` says
    whether the optimizer may step flat slices.
    """

    batch: int
    facts: Mapping[int, ModelFacts]
    cluster: Cluster
    microbatch: int | None = None
    workers: int | None = None
    profiles: Profiles = field(default_factory=dict)
    elementwise: bool = True
    precision: str = "fp32"

    @property
    def available(self) -> int:
        """Workers that a plan may use."""
        return self.cluster.workers if self.workers is None else min(self.workers, self.cluster.workers)

    def size(self, plan: Plan) -> int:
        """Samples per microbatch under a plan."""
        return self.microbatch or plan.microbatch or -(-self.batch // plan.workers)

    @property
    def recomputable(self) -> bool:
        """Whether any block keeps more than its input, so that running it again would save memory."""
        blocks = next(iter(self.facts.values())).blocks
        return any(block.composite for block in blocks if block.name not in (GLUE, LOSS))

    def price(self, plan: Plan) -> Price:
        """The price of one plan."""
        size = self.size(plan)
        return price(
            plan,
            facts_for(self.facts, size),
            self.cluster,
            self.profile(plan),
            microbatches=microbatch_sizes(self.batch, size),
            precision=self.precision,
        )

    def profile(self, plan: Plan) -> Profile | None:
        """Measured times under as much company as the plan's workers have."""
        busy = max(seat.busy for seat in seats(self.cluster, plan.workers))
        return profile_for(self.profiles, self.size(plan), busy)


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
        priced = [question.price(plan) for plan in legal]
        fitting = [one for one in priced if rules.too_large(one, question.cluster) is None]
        if fitting:
            prices.append(_ordered(fitting)[0])
        else:
            leanest = min(priced, key=lambda one: one.peak_bytes)
            starved.append((leanest, rules.too_large(leanest, question.cluster) or ""))
    refused.extend(Refusal(str(one.plan), why, rules.memory_remedy(one, prices)) for one, why in starved)
    return Ranking(
        ranked=_explained(_ordered(prices)),
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
            if strategy.recompute != "none" and not question.recomputable:
                continue
            same = [replace(strategy, microbatch=size) for size in sizes]
            yield same
            if workers > 1 and not strategy.stolen:
                weighted = [plan for one in same if (plan := _weighted(question, one)) is not None]
                if weighted:
                    yield weighted


def _weighted(question: Question, plan: Plan) -> Plan | None:
    size = question.size(plan)
    seconds = worker_seconds(
        plan,
        facts_for(question.facts, size),
        question.cluster,
        question.profile(plan),
        size=size,
        precision=question.precision,
    )
    shares = space.weighted_shares(seconds, -(-question.batch // size))
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
    leader = Entry(best, reason=words.reason(best, serial, others[0] if others else None))
    return (leader, *(Entry(other, loses_on=words.loses_on(other, best)) for other in others))
