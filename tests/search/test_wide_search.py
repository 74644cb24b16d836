"""A search that leaves plans out must end with the plan that pricing every one of them ends with."""

import itertools
from dataclasses import replace

import made
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheaf.cluster.cluster import Tier
from sheaf.cost.clock import kept
from sheaf.cost.memory import needed_bytes
from sheaf.cost.seating import Seating
from sheaf.graph.facts import TableFact
from sheaf.plans import Plan
from sheaf.plans.mesh import Mesh
from sheaf.plans.schedule import actions, held
from sheaf.search import Question, broken, search
from sheaf.search.bounds import Bounds
from sheaf.search.families import groups
from sheaf.search.offloads import offloaded
from sheaf.search.rules import too_large


@st.composite
def questions(draw) -> dict:
    """Descriptions of small questions; made into facts and clusters in the test."""
    return {
        "blocks": draw(st.integers(1, 6)),
        "elements": draw(st.sampled_from((5_000, 250_000, 2_000_000))),
        "flops": draw(st.sampled_from((1e7, 1e9, 5e10))),
        "saved_bytes": draw(st.sampled_from((10_000, 4_000_000))),
        "workers": draw(st.integers(1, 4)),
        "hosts": draw(st.integers(1, 3)),
        "speeds": draw(st.sampled_from(((), (), (1.0, 0.4), (0.4, 1.0)))),
        "memory": draw(st.sampled_from((8_000_000, 40_000_000, 2**34))),
        "inside": draw(st.sampled_from((1e7, 1e9, 1e12))),
        "between": draw(st.sampled_from((1e6, 1e8, 1e11))),
        "overlap": draw(st.sampled_from((-0.5, 0.0, 0.9))),
        "batch": draw(st.integers(1, 24)),
        "microbatch": draw(st.sampled_from((None, 1, 4))),
        "split": draw(st.booleans()),
        "profile": draw(st.booleans()),
    }


def asked(drawn: dict) -> Question:
    facts = made.facts(drawn["blocks"], drawn["elements"], flops=drawn["flops"], saved_bytes=drawn["saved_bytes"])
    cluster = made.cluster(
        drawn["workers"], hosts=drawn["hosts"], speeds=drawn["speeds"], memory_bytes=drawn["memory"],
        bytes_per_second=drawn["inside"], inter_bytes_per_second=drawn["between"], overlap=drawn["overlap"],
    )  # fmt: skip
    degrees = range(2, drawn["workers"] + 1)
    splits = {(degree, 0): made.split(facts, degree) for degree in degrees} if drawn["split"] else {}
    splits |= {(degree, 3): made.sequences(facts, degree) for degree in degrees} if drawn["split"] else {}
    size = drawn["microbatch"] and min(drawn["microbatch"], drawn["batch"])
    profiles = {(4, 1): made.profile(facts)} if drawn["profile"] else {}
    return Question(
        batch=drawn["batch"], facts={4: facts}, cluster=cluster, microbatch=size, splits=splits, profiles=profiles
    )


@settings(max_examples=25, deadline=None)
@given(drawn=questions())
def test_the_best_of_a_search_that_leaves_plans_out_is_the_best_of_all(drawn):
    question = asked(drawn)
    bounds = Bounds(question.batch, question.basis, question.size)
    fitting = []
    for group, choices in (
        (one, choices) for one in groups(question) for kind in one.strategies() for choices in kind.families(question)
    ):
        legal = [
            plan for plan in choices if not broken(
                plan, facts=question.facts[4], workers=question.available, batch=question.batch,
                microbatch=question.microbatch, elementwise=True,
            )
        ]  # fmt: skip
        leanest = group.leanest
        if all(too_large(question.held(plan), question.cluster) for plan in legal):  # then with the hosts' memory
            variants = (plan.with_text("offload=optimizer") for plan in legal if not plan.server)
            legal += [plan for plan in variants if question.offloadable]
            leanest += tuple(offloaded(question, leanest))
        for plan in legal:
            price = question.rough(plan)
            least = bounds.seconds(plan) + bounds.meeting(plan)
            assert least <= price.step_seconds * (1 + 1e-9), f"{plan} takes less than its bound"
            if group.examples:
                assert min(bounds.seconds(one, cut=False) for one in group.examples) <= price.step_seconds * (1 + 1e-9)
            if too_large(price, question.cluster) is None:
                assert bounds.fits(plan)
                assert not leanest or any(bounds.fits(one, cut=False) for one in leanest)
                fitting.append(price)
    found = search(question, everything=False)
    if not fitting:
        assert not found.ranked
        return
    fastest = min(price.step_seconds for price in fitting)
    assert found.least_seconds is None, "nothing that is left could win"
    assert found.best.step_seconds <= fastest * 1.01 * (1 if question.microbatch else 1.01)
    tied = [price for price in fitting if price.step_seconds <= fastest * 1.01]
    if question.microbatch:
        assert found.best.plan.workers == min(price.plan.workers for price in tied)


def test_a_table_that_travels_as_rows_does_not_count_as_travelling_whole():
    plain = made.facts(4, 1_280_000, saved_bytes=10_000)
    first = replace(plain.parameters[0], shape=(20_000, 64))
    table = TableFact("b0.weight", 20_000, 4 * 64, 4, (100.0, 180.0, 250.0))
    facts = replace(plain, parameters=(first, *plain.parameters[1:]), tables=(table,))
    plan = Plan.parse("dp=2,b0=sparse")

    def within(memory_bytes: int) -> Question:
        machines = made.cluster(2, bytes_per_second=1e7, overlap=0.0, memory_bytes=memory_bytes)
        return Question(batch=8, facts={4: facts}, cluster=machines, microbatch=4)

    price = within(2**34).rough(plan)
    question = within(needed_bytes(price.peak_bytes, "cuda"))
    assert too_large(price, question.cluster) is None
    bounds = Bounds(question.batch, question.basis, question.size)
    assert bounds.fits(plan)
    assert bounds.seconds(plan) + bounds.meeting(plan) <= price.step_seconds * (1 + 1e-9)


def test_what_meets_faster_than_priced_is_bounded_as_it_is_priced():
    facts, least = made.facts(4), dict[float, float]()
    for added in (0.0, -100.0):
        profile = replace(made.profile(facts, concurrency=2), overheads={"dp=2": added})
        question = Question(
            batch=8, facts={4: facts}, cluster=made.cluster(2, bytes_per_second=1e6), microbatch=4,
            profiles={(4, 2): profile},
        )  # fmt: skip
        bounds = Bounds(question.batch, question.basis, question.size)
        least[added] = bounds.seconds(Plan(dp=2)) + bounds.meeting(Plan(dp=2))
        assert least[added] <= question.rough(Plan(dp=2)).step_seconds * (1 + 1e-9)
    assert least[-100.0] < least[0.0]


def test_a_bound_is_of_as_many_busy_workers_as_the_plan_has():
    there = made.cluster(4, hosts=2)
    host = there.hosts[0]
    cpus = replace(there, backend="gloo", hosts=(replace(host, device=replace(host.device, kind="cpu")),))
    question = Question(batch=32, facts={4: made.facts()}, cluster=cpus, microbatch=4)
    bounds = Bounds(question.batch, question.basis, question.size)
    for plan in (Plan(dp=4), Plan()):  # who is alone on a host has all its cores: what four take is too much
        assert bounds.seconds(plan) <= question.rough(plan).step_seconds * (1 + 1e-9)


def test_where_nobody_waits_a_microbatch_too_many_for_one_binds_nobody():
    question = Question(batch=5, facts={4: made.facts()}, cluster=made.cluster(2), microbatch=1)
    bounds, plan = Bounds(question.batch, question.basis, question.size), Plan.parse("dp=2,server=2:async")
    assert bounds.seconds(plan) <= question.rough(plan).step_seconds * (1 + 1e-9)
    waiting = plan.with_text("server=2")
    assert bounds.seconds(plan) < bounds.seconds(waiting) <= question.rough(waiting).step_seconds * (1 + 1e-9)


def test_a_search_that_is_cut_short_says_what_it_found_and_what_is_left():
    question = asked(
        {"blocks": 4, "elements": 250_000, "flops": 1e9, "saved_bytes": 10_000, "workers": 4, "hosts": 2, "speeds": (),
         "memory": 2**34, "inside": 1e9, "between": 1e8, "overlap": 0.5, "batch": 24, "microbatch": 1, "split": True,
         "profile": False}
    )  # fmt: skip
    whole, heard = search(question, everything=False), []
    early = search(question, everything=False, seconds=0.0, heard=heard.append)
    assert early.ranked
    assert early.least_seconds is not None
    assert early.least_seconds <= whole.best.step_seconds <= early.best.step_seconds
    assert early.looked_at < whole.looked_at
    assert [one.best.step_seconds for one in heard] == sorted((one.best.step_seconds for one in heard), reverse=True)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zero-bubble", "interleaved"])
def test_what_a_pipeline_keeps_is_what_carrying_its_lists_out_finds(schedule):
    for workers, count, virtual in itertools.product(range(1, 6), range(1, 12), (2, 3)):
        stages = workers * virtual if schedule == "interleaved" else workers
        listed = actions(schedule, workers=workers, stages=stages, microbatches=count)
        assert kept(schedule, workers, stages, count) == held(listed)


def test_links_of_tiers_are_those_of_the_smallest_that_holds_both():
    cluster = replace(
        made.cluster(4, hosts=4),
        tiers=(
            Tier(name="socket", workers=2, latency_seconds=0.0, bytes_per_second=4e9),
            Tier(name="rack", workers=8, latency_seconds=0.0, bytes_per_second=5e8),
        ),
    )
    seating = Seating(cluster)
    names = [
        {link.name for link in seating.fabric(Mesh.of(Plan.parse(text)), kind).links}
        for text, kind in (
            ("dp=8,tp=2", "tp"), ("dp=4,tp=4", "tp"), ("dp=4,tp=4", "dp"), ("dp=2,tp=8", "dp"), ("dp=2,tp=4", "dp"),
        )
    ]  # fmt: skip
    assert names == [{"socket"}, {"socket", "inside"}, {"rack", "between"}, {"between"}, {"rack"}]
