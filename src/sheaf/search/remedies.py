"""What makes a plan fit that does not: changes of it alone, by how long a step then takes."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from sheaf.cost import Price
from sheaf.errors import PlanError
from sheaf.graph.facts import ModelFacts
from sheaf.plans import Plan
from sheaf.plans.offload import OPTIMIZER
from sheaf.plans.shares import BALANCED
from sheaf.search import rules, space
from sheaf.search.bounds import Bounds
from sheaf.search.fewest import fewest
from sheaf.search.measured import facts_for
from sheaf.search.question import Question
from sheaf.search.ranking import Remedy

MOST_ZERO = 3
SAID = 3  # remedies that a refusal names


class Remedies:
    """Finds remedies for the plans of one question; what several of them lead to is priced once.

    ``priced`` are plans that fit, each the best of those that differ in the microbatch only; the ``bounds`` are the
    question's.
    """

    def __init__(self, question: Question, priced: Sequence[Price], bounds: Bounds) -> None:
        self._question = question
        self._bounds = bounds
        self._priced = priced
        self._fewer: dict[Plan, Price | None] = {}
        self._known: dict[Plan, Price | None] = {_open(one.plan): one for one in reversed(priced)}

    def of(self, plan: Plan) -> tuple[Remedy, ...]:
        """The same plan with recomputation, a higher stage of ZeRO, its optimizer in the hosts' memory, equal shards,
        or several of these, where that fits: the fastest first. The fastest that recomputes all blocks is there with
        the fewest that do, too.

        Where the task leaves the microbatch open, each has the one that suits it best: it may be a smaller one. Where
        no change of the plan is enough, the fastest plan that fits, with as many workers if there is one.
        """
        there = self._question.timed(plan).step_seconds
        found = [one for change in self._changes(plan) if (one := self._needed(plan, change)) is not None]
        if not found:
            same = [one for one in self._priced if one.plan.workers == plan.workers]
            found = sorted(same or self._priced, key=lambda one: one.step_seconds)[:1]
        found += self._of_fewer(plan, found)
        found.sort(key=lambda one: one.step_seconds)
        return tuple(Remedy(str(one.plan), one.step_seconds, one.step_seconds / there) for one in found)

    def _needed(self, plan: Plan, change: Plan) -> Price | None:
        """The price of a change that fits; None too where it has no need of the hosts' memory to fit."""
        without = replace(change, offload=plan.offload)
        if without not in (change, plan) and self._fitting(without) is not None:
            return None
        return self._fitting(change)

    def _changes(self, plan: Plan) -> Iterator[Plan]:
        again = (plan.recompute, "full") if self._question.may_repeat(plan) else (plan.recompute,)
        stages = range(plan.zero, MOST_ZERO + 1) if plan.alike > 1 else (plan.zero,)
        hosts = (plan.offload, OPTIMIZER) if self._question.offloadable else (plan.offload,)
        # dealt by speed too, shards of equal size
        even = ((BALANCED if ":" in plan.shares else plan.shares, ""),) if plan.pp == 1 and not plan.even_shards else ()
        for zero, recompute, offload in product(stages, dict.fromkeys(again), dict.fromkeys(hosts)):
            for shares, shards in ((plan.shares, plan.shards), *(even if zero else ())):
                try:
                    change = replace(
                        plan, zero=zero, recompute=recompute, offload=offload, shares=shares, shards=shards
                    )
                except PlanError:
                    continue
                if change != plan:
                    yield change

    def _of_fewer(self, plan: Plan, found: Sequence[Price]) -> list[Price]:
        """The fastest of these that recompute all blocks, with as few of them as will do."""
        full = [one for one in found if one.plan.recompute == "full" and plan.recompute == "none"]
        if not full:
            return []
        fastest = min(full, key=lambda one: one.step_seconds).plan
        if fastest not in self._fewer:
            better = fewest(self._question, replace(fastest, recompute="none"))
            self._fewer[fastest] = None if better is None else self._question.timed(better)
        less = self._fewer[fastest]
        return [] if less is None else [less]

    def _fitting(self, plan: Plan) -> Price | None:
        """The price of the plan with the microbatch with which it is fastest, of those that fit."""
        key = _open(plan)
        if key not in self._known:
            fitting = [one for one in self._sized(plan) if self._may_run(one)]
            prices = [self._question.timed(one) for one in fitting]
            self._known[key] = min(prices, key=lambda one: one.step_seconds, default=None)
        return self._known[key]

    def _sized(self, plan: Plan) -> list[Plan]:
        question = self._question
        if question.microbatch is not None:
            return [plan]
        several = plan.workers > plan.dp
        sizes = (
            space.mesh_microbatches(question.batch, plan.dp, plan.pp)
            if several
            else space.microbatch_choices(question.batch, plan.dp)
        )
        return [plan.with_microbatch(size) for size in sizes]

    def _may_run(self, plan: Plan) -> bool:
        question = self._question
        if not self._bounds.fits(plan):
            return False
        broken = rules.broken(
            plan,
            facts=self._facts(plan),
            workers=question.available,
            batch=question.batch,
            microbatch=question.microbatch,
            elementwise=question.elementwise,
        )
        return not broken and rules.too_large(question.held(plan), question.cluster) is None

    def _facts(self, plan: Plan) -> ModelFacts:
        return facts_for(self._question.facts, self._question.size(plan))


def told(remedies: Sequence[Remedy]) -> str:
    """The first of them in words, each with how much longer its step takes than the plan's would, were there room.

    >>> told([Remedy("dp=2,zero=1", 1.03, 1.03), Remedy("dp=2,recompute=full", 1.3, 1.3)])
    'use dp=2,zero=1 (3 % slower than it would be), or dp=2,recompute=full (30 % slower)'
    """
    first, *others = (f"{one.plan} ({_slower(one.times)}" for one in remedies[:SAID])
    than = " as it would be" if " as " in first else " than it would be"
    return "use " + ", or ".join([f"{first}{than})", *(f"{one})" for one in others)])


def _slower(times: float) -> str:
    """How a step takes longer, or less long.

    >>> _slower(1.004), _slower(1.26), _slower(3.21), _slower(0.8), _slower(0.2)
    ('no slower', '26 % slower', '3.2 times as slow', '25 % faster', '5.0 times as fast')
    """
    most = max(times, 1 / times)
    if most >= 2:
        return f"{most:.1f} times as {'slow' if times > 1 else 'fast'}"
    percent = round(100 * (most - 1))
    return "no slower" if percent == 0 else f"{percent} % {'slower' if times > 1 else 'faster'}"


def _open(plan: Plan) -> Plan:
    """The plan whatever its microbatch and its cut are."""
    return replace(plan, microbatch=None, stages="")
