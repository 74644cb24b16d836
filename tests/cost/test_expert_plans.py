"""Plans whose replicas hold experts for each other: what they hold, what travels, and when that is worth it."""

from dataclasses import replace

import made
import pytest

from sheaf.cost import BYTES_TERMS, SECONDS_TERMS, microbatch_sizes, price
from sheaf.cost.basis import Basis
from sheaf.cost.experts import replicated
from sheaf.errors import PlanError
from sheaf.plans import Plan
from sheaf.plans.split import Cut, Move, Slice, SplitFacts
from sheaf.search import Question, search

EXPERTS, PER_EXPERT, TOKENS = 5, 4_000_000, 200_000


def mixture():
    """Four blocks, the last with five experts that hold nearly all of the parameters."""
    facts = made.facts(4)
    parameters = [
        replace(one, shape=(EXPERTS, 2000, PER_EXPERT // 2000)) if one.name == "b3.weight" else one
        for one in facts.parameters
    ]
    return replace(facts, parameters=tuple(parameters))


def split(facts, degree):
    cut = Cut.even(EXPERTS, degree)
    moves = [
        Move("b3", "all_to_all", TOKENS, backward=backward, why="tokens") for backward in (False, False, True, True)
    ]
    return SplitFacts(
        degree=degree,
        samples=facts.samples,
        slices={"b3.weight": Slice(0, cut)},
        moves=tuple(moves),
        work={"b3": degree * cut.sizes[0] / EXPERTS},
        activations={"b3": 1.2},
    )


def priced(text, sizes=None, cluster=None):
    plan, facts = Plan.parse(text), mixture()
    sizes = sizes or microbatch_sizes(32, 4)
    facts_of_split = split(facts, plan.dp) if plan.expert_parts else None
    return price(plan, facts, cluster or made.cluster(8), None, microbatches=sizes, split=facts_of_split)


@pytest.mark.parametrize("text", ["dp=2,b3=ep", "dp=4,b3=ep", "dp=3,b*=ep,recompute=full", "dp=2,shares=3:1,b3=ep"])
def test_terms_add_up(text):
    found = priced(text)
    assert tuple(found.seconds) == SECONDS_TERMS
    assert tuple(found.memory) == BYTES_TERMS
    assert min(*found.seconds.values(), *found.memory.values()) >= 0
    assert found.seconds["all_to_all"] > 0 == found.seconds["tensor"]


def test_a_worker_holds_its_own_experts_and_all_of_the_rest():
    rest = 4 * 3 * 250_000
    for text, own in (("dp=2,b3=ep", 3), ("dp=4,b3=ep", 2), ("dp=5,b3=ep", 1)):
        assert priced(text).memory["parameters"] == rest + own * PER_EXPERT * 4
    assert priced("dp=2").memory["parameters"] == rest + EXPERTS * PER_EXPERT * 4


def test_tokens_travel_in_place_of_the_experts_gradients():
    whole, dealt = priced("dp=2"), priced("dp=2,b3=ep")
    assert dealt.seconds["all_reduce"] < 0.2 * whole.seconds["all_reduce"]
    microbatches_each, share = 4, 1 / 2
    tokens = microbatches_each * 4 * TOKENS * share
    gradients = 2 * share * 4 * 3 * 250_000
    assert dealt.traffic_bytes == pytest.approx(tokens + gradients)
    again = priced("dp=2,b3=ep,recompute=full")
    assert again.seconds["all_to_all"] == pytest.approx(1.5 * dealt.seconds["all_to_all"]), "forward's trips come twice"


def test_the_worker_with_most_experts_sets_the_pace():
    even, odd = priced("dp=5,b3=ep", sizes=[4] * 5), priced("dp=4,b3=ep", sizes=[4] * 4)
    assert odd.seconds["compute"] > even.seconds["compute"]


def test_who_has_fewer_microbatches_waits_round_by_round():
    found = priced("dp=2,b3=ep", sizes=[4] * 3)
    assert found.seconds["wait"] == pytest.approx(found.seconds["compute"] + found.seconds["all_to_all"], rel=0.2)


def test_facts_of_other_replicas_are_refused():
    with pytest.raises(ValueError, match="those given are of 3"):
        price(
            Plan.parse("dp=2,b3=ep"),
            mixture(),
            made.cluster(8),
            None,
            microbatches=[4] * 4,
            split=split(mixture(), 3),
        )


def test_what_replicas_share_is_all_but_experts():
    basis = Basis.of(Plan.parse("dp=2,b3=ep"), mixture(), None, made.cluster(8), split=split(mixture(), 2))
    assert [one.name for one in replicated(basis).facts.parameters] == ["b0.weight", "b1.weight", "b2.weight"]


def question(**changes):
    facts = mixture()
    splits = {(degree, 2): split(facts, degree) for degree in (2, 4)}
    given = {"batch": 32, "facts": {4: facts}, "cluster": made.cluster(4), "microbatch": 4, "splits": splits}
    return Question(**{**given, **changes})


def test_experts_are_found_by_search_and_win_where_gradients_are_slow_to_travel():
    ranking = search(question(cluster=made.cluster(4, bytes_per_second=2e8)))
    without_stages = [entry.plan for entry in ranking.ranked if entry.plan.pp == 1]
    assert str(without_stages[0]) == "dp=4,b3=ep"
    other = ranking.entry("dp=4")
    assert other is not None
    assert "all-reduce" in other.loses_on
    assert all(entry.plan.tp == 1 for entry in ranking.ranked), "no layers were rehearsed as split"


def test_they_fit_where_replicas_do_not():
    ranking = search(question(cluster=made.cluster(4, memory_bytes=250_000_000)))
    assert ranking.entry("dp=4") is None
    assert ranking.entry("dp=4,b3=ep") is not None


def test_without_stacks_none_is_proposed():
    assert not any(entry.plan.expert_parts for entry in search(question(splits={})).ranked)
    with pytest.raises(PlanError):
        Plan.parse("dp=2,zero=3,b3=ep")
