"""The cut into stages must be the best there is, and always the same."""

from dataclasses import replace
from itertools import combinations, pairwise

import made
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheaf.errors import PlanError
from sheaf.plans import Plan
from sheaf.plans.stages import balanced, default_costs, placed, slowest, stages_of


def cuts(count, stages, legal=None):
    """Every way to cut so many blocks."""
    for ends in combinations(range(1, count), stages - 1):
        if legal is None or all(legal[end - 1] for end in ends):
            bounds = (0, *ends, count)
            yield tuple(stop - start for start, stop in pairwise(bounds))


def squares(costs, counts, speeds):
    starts = [sum(counts[:stage]) for stage in range(len(counts))]
    return sum(
        (sum(costs[start : start + count]) / speed) ** 2
        for start, count, speed in zip(starts, counts, speeds, strict=True)
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_cut_is_better_than_the_balanced_one(data):
    costs = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=9))
    stages = data.draw(st.integers(1, len(costs)))
    speeds = data.draw(st.lists(st.sampled_from([1, 2, 4]), min_size=stages, max_size=stages))
    legal = data.draw(st.none() | st.lists(st.booleans(), min_size=len(costs) - 1, max_size=len(costs) - 1))
    known = list(cuts(len(costs), stages, legal))
    if not known:
        with pytest.raises(PlanError, match="places to cut at"):
            balanced(costs, stages, legal, speeds=speeds)
        return
    # Powers of two divide whole numbers exactly, so ties are ties.
    best = min(known, key=lambda counts: (slowest(costs, counts, speeds), squares(costs, counts, speeds), counts))
    assert balanced(costs, stages, legal, speeds=speeds) == best


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1e12), min_size=2, max_size=40), st.integers(2, 8))
def test_every_stage_has_a_block_and_every_block_a_stage(costs, stages):
    if len(costs) < stages:
        with pytest.raises(PlanError, match=rf"the model has {len(costs)}: use at most pp={len(costs)}"):
            balanced(costs, stages)
        return
    counts = balanced(costs, stages)
    assert len(counts) == stages
    assert min(counts) >= 1
    assert sum(counts) == len(costs)
    assert slowest(costs, counts) >= max(*costs, sum(costs) / stages) * (1 - 1e-9)


def test_a_lone_expensive_block_keeps_to_itself():
    assert balanced((1, 1, 9, 1, 1), 3) == (2, 1, 2)
    assert balanced((1, 1, 1, 1), 2, (False, False, True)) == (3, 1)


def test_only_called_blocks_are_placed_and_the_loss_costs_the_last_stage():
    facts = made.facts(4)
    facts = replace(facts, blocks=(replace(facts.blocks[0], calls=0), *facts.blocks[1:]))
    assert [block.name for block in placed(facts)] == ["b1", "b2", "b3"]
    first, second, last = default_costs(facts)
    assert first == second < last


def test_operations_or_bytes_whichever_takes_longer():
    facts = made.facts(2, flops=1.0)
    assert default_costs(facts)[0] == pytest.approx(10 * 3e6)


def test_stages_are_as_the_plan_says_or_balanced():
    facts = made.facts(6)
    assert stages_of(Plan.parse("pp=2"), facts) == (("b0", "b1", "b2"), ("b3", "b4", "b5"))
    assert stages_of(Plan.parse("pp=2,stages=1:5"), facts)[0] == ("b0",)
    assert len(stages_of(Plan.parse("pp=2:interleaved"), facts)) == 4
    with pytest.raises(PlanError, match="stages=1:2 places 3 blocks, the model has 6"):
        stages_of(Plan.parse("pp=2,stages=1:2"), facts)
    with pytest.raises(PlanError, match="use at most pp=6"):
        stages_of(Plan.parse("pp=7"), facts)
