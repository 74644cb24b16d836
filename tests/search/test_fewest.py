"""Where some blocks must run again, no more do than must: as trying all sets of them finds."""

from dataclasses import replace
from itertools import combinations

import made
import pytest

from sheaf.cost.memory import MARGIN
from sheaf.plans import Plan
from sheaf.plans.again import AGAIN, is_again
from sheaf.search import Question, search
from sheaf.search.fewest import fewest
from sheaf.search.rules import too_large

BLOCKS = 5


def question(memory_bytes: float, **changes) -> Question:
    given = {"batch": 32, "facts": {4: made.facts(BLOCKS)}, "microbatch": 4, "workers": 2} | changes
    return Question(**given, cluster=made.cluster(2, memory_bytes=round(memory_bytes)))


def between(text: str, share: float) -> tuple[Question, Plan]:
    """A memory between what a plan needs where all blocks run again and where none does."""
    plan, roomy = Plan.parse(text), question(2**34)
    most, least = (roomy.held(replace(plan, recompute=one)).peak_bytes for one in ("none", "full"))
    return question(MARGIN * (least + share * (most - least))), plan


def named(plan: Plan, blocks: tuple[str, ...]) -> Plan:
    return replace(plan, parts=tuple((block, AGAIN) for block in blocks))


@pytest.mark.parametrize("text", ["serial", "dp=2,zero=1", "pp=2", "pp=2:interleaved,virtual=2"])
@pytest.mark.parametrize("share", [0.35, 0.8])
def test_no_more_blocks_run_again_than_must(text, share):
    asked, plan = between(text, share)
    names = [f"b{number}" for number in range(BLOCKS)]
    least = next(
        count
        for count in range(BLOCKS + 1)
        if any(
            too_large(asked.held(named(plan, chosen)), asked.cluster) is None for chosen in combinations(names, count)
        )
    )
    found = fewest(asked, plan)
    assert 0 < least < BLOCKS
    assert found is not None
    assert too_large(asked.held(found), asked.cluster) is None
    assert sum(is_again(found, name) for name in names) == least
    none, some, full = (asked.rough(one) for one in (plan, found, replace(plan, recompute="full")))
    assert none.step_seconds < some.step_seconds < full.step_seconds


def test_none_where_none_need_be_or_all_must():
    plan = Plan()
    assert fewest(question(2**34), plan) is None
    assert fewest(question(1_000_000), plan) is None
    assert fewest(question(2**34), Plan.parse("recompute=full")) is None


def test_blocks_are_counted_for_the_replica_that_is_dealt_most():
    plan = Plan.parse("dp=2,pp=2:gpipe,shares=balanced")

    def within(memory_bytes: float) -> Question:  # the second of two workers is a third as fast
        machines = made.cluster(1, speeds=(1.0, 0.3, 1.0, 0.3), memory_bytes=round(memory_bytes))
        return Question(batch=32, facts={4: made.facts(BLOCKS)}, microbatch=4, cluster=machines)

    most, least = (within(2**34).held(replace(plan, recompute=one)).peak_bytes for one in ("none", "full"))
    even = within(2**34).held(replace(plan, shares="equal")).peak_bytes
    assert even < most, "the faster replica keeps more than half of the microbatches"
    asked = within(MARGIN * (least + 0.5 * (most - least)))
    found = fewest(asked, plan)
    assert found is not None
    assert too_large(asked.held(found), asked.cluster) is None
    fewer = fewest(asked, replace(plan, shares="equal"))
    again = [sum(is_again(one, f"b{number}") for number in range(BLOCKS)) for one in (fewer or plan, found)]
    assert again[0] < again[1] < BLOCKS


def test_the_search_finds_it_and_refusals_name_it():
    asked, plan = between("serial", 0.5)
    asked = replace(asked, workers=1)
    ranking = search(asked)
    some = fewest(asked, plan)
    assert some is not None
    entry, full = ranking.entry(some), ranking.entry(Plan.parse("recompute=full"))
    assert entry is not None
    assert full is not None
    assert entry.price.step_seconds < full.price.step_seconds
    serial = next(one for one in ranking.refused if one.plan == "serial")
    assert serial.remedies[0].step_seconds <= entry.price.step_seconds
    assert str(some) in [one.plan for one in serial.remedies]
