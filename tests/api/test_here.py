"""Workers that are here already measure themselves, and all of them hear the same."""

import json
from dataclasses import replace

import made
import pytest
import small

from sheaf.api.heard import Heard, Pair, combined, paced, question_from, relative, slowest
from sheaf.api.rehearsals import alone
from sheaf.graph.facts import BlockTime
from sheaf.plans import Plan

FACTS = made.facts(3)


def slower(profile, factor, exposed_seconds):
    return replace(
        profile,
        blocks={
            name: BlockTime(time.forward_seconds * factor, time.backward_seconds * factor)
            for name, time in profile.blocks.items()
        },
        host_seconds=profile.host_seconds * factor,
        fetch_seconds=profile.fetch_seconds * factor,
        optimizer_seconds_per_byte=profile.optimizer_seconds_per_byte * factor,
        exposed_seconds=exposed_seconds,
    )


def combined_alone(*profiles):
    speeds = relative(profiles)
    return combined(profiles, slowest(speeds)), speeds


def test_a_slower_worker_is_a_slower_host_in_the_times_of_the_first():
    fast = made.profile(FACTS)
    found, speeds = combined_alone(fast, slower(fast, 2.0, 0.01))
    assert speeds == (1.0, 0.5)
    assert found.exposed_seconds == 0.01, "the slower one waits for nothing but the network"
    for name, time in fast.blocks.items():
        assert found.blocks[name].forward_seconds == pytest.approx(time.forward_seconds)
    cluster = paced(made.cluster(1, hosts=2), speeds)
    assert [(host.count, host.speed) for host in cluster.hosts] == [(1, 1.0), (1, 0.5)]
    backwards, speeds = combined_alone(slower(fast, 2.0, 0.01), fast)
    assert speeds == (1.0, 2.0)
    assert backwards.host_seconds == pytest.approx(2 * fast.host_seconds)


def test_a_slower_workers_own_times_count_for_what_everyone_waits_for_at_a_steps_end():
    fast = made.profile(FACTS)
    slow = replace(
        slower(fast, 2.0, 0.01), optimizer_seconds_per_byte=1.5 * fast.optimizer_seconds_per_byte, uneven_seconds=0.001
    )
    found, speeds = combined_alone(replace(fast, uneven_seconds=0.2), slow)
    assert found.optimizer_seconds_per_byte / speeds[1] == pytest.approx(slow.optimizer_seconds_per_byte)
    assert found.host_seconds / speeds[1] == pytest.approx(slow.host_seconds)
    assert found.uneven_seconds == 0.001, "the fast one waits for the slow one, which is priced"


def test_a_step_takes_as_long_whichever_worker_is_slow():
    fast = replace(made.profile(FACTS), exposed_seconds=0.4, uneven_seconds=0.2)  # most of it spent waiting
    slow = replace(slower(fast, 2.0, 0.01), host_seconds=3 * fast.host_seconds, uneven_seconds=0.001)
    task, priced = replace(small.SMALL["mlp"](), batch=2 * FACTS.samples), list[float]()
    for everyone in ((fast, slow), (slow, fast)):
        question = question_from(task, FACTS, made.cluster(1, hosts=2), Heard((everyone,)), {})
        priced.append(question.price(Plan(dp=2)).step_seconds)
    assert priced == pytest.approx([priced[0]] * 2)


def test_who_is_slow_at_one_moment_only_is_not_waited_for():
    fast = replace(made.profile(FACTS), exposed_seconds=0.04)
    slow = slower(fast, 2.0, 0.01)
    heard = Heard(((fast, fast, slow), (fast, slow, fast), (slow, fast, fast)))
    (profile,) = question_from(small.SMALL["mlp"](), FACTS, made.cluster(1, hosts=3), heard, {}).profiles.values()
    assert profile.exposed_seconds == 0.04


def test_more_workers_than_rehearsed_take_longer_by_as_much_as_their_blocks():
    pair = replace(made.profile(FACTS, concurrency=2), overheads={"dp=2": 0.1, "dp=2,zero=1": 0.4, "pp=2": 0.2})
    four = slower(made.profile(FACTS, concurrency=4), 1.5, 0.0)
    task = small.SMALL["mlp"]()
    (profile,) = question_from(
        task, FACTS, made.cluster(4), Heard(((four,) * 4,), pair=Pair(pair.overheads, pair)), {}
    ).profiles.values()
    assert profile.overheads == pytest.approx({"dp=2,zero=1": 1.5 * 0.3, "pp=2": 1.5 * 0.2})


def test_workers_that_differ_by_noise_are_equal():
    fast = made.profile(FACTS)
    found, speeds = combined_alone(fast, slower(fast, 1.03, 0.02), slower(fast, 0.98, 0.04))
    assert speeds == (1.0, 1.0, 1.0)
    assert found.exposed_seconds == 0.02
    assert paced(made.cluster(3), speeds) == made.cluster(3)


def asked(plans):
    import torch

    from sheaf.api.here import heard_again, heard_here
    from sheaf.api.measure import measure_here
    from sheaf.graph import trace

    torch.set_num_threads(1)
    task = small.SMALL["mlp"]()
    facts, cluster = trace(task, task.microbatch), measure_here(quick=True)
    once = heard_here(task, facts, plans=[Plan.parse(text) for text in plans], budget_seconds=0.1)
    twice = heard_again(once, task, facts, budget_seconds=0.1)
    before, question = (question_from(task, facts, cluster, heard, {}) for heard in (once, twice))
    (first,), (second,) = before.profiles.values(), question.profiles.values()
    assert first.overheads == second.overheads
    assert first.blocks != second.blocks
    assert first.overheads.keys() == {"dp=2", "dp=2,zero=3", "pp=2", "dp=2,local=2"}
    kept = question_from(task, facts, cluster, Heard.from_dict(json.loads(json.dumps(twice.to_dict()))), {})
    for text in plans:  # what was heard can be kept, and predicted from again
        assert kept.price(Plan.parse(text)).step_seconds == pytest.approx(
            question.price(Plan.parse(text)).step_seconds, rel=0.01
        )
    return {text: question.price(Plan.parse(text)).seconds for text in plans}, question.cluster


def test_two_workers_price_plans_alike_from_what_they_measured_and_rehearsed(ranks):
    plans = ["dp=2", "dp=2,zero=3", "pp=2", "dp=2,local=4"]
    (first, cluster), (second, other) = ranks(asked, 2, plans)
    assert first == second
    assert cluster == other
    assert cluster.workers == 2
    assert len(cluster.hosts) == 1
    assert {timing.workers for timing in cluster.intra.timings} == {2}
    assert all(seconds["compute"] > 0 for seconds in first.values())
    assert first["dp=2"]["dispatch"] == 0


def test_one_worker_rehearses_recomputation_and_knows_it_as_that_of_two():
    from sheaf.api.here import heard_here
    from sheaf.graph import trace

    task = small.SMALL["gpt"]()
    plans = [Plan.parse("serial"), Plan.parse("recompute=full")]
    facts = trace(task, task.microbatch)
    heard = heard_here(task, facts, plans=plans, budget_seconds=0.1)
    question = question_from(task, facts, made.cluster(1), heard, {})
    (profile,) = question.profiles.values()
    again = profile.overheads["dp=2,recompute=full"]
    told = question.price(plans[1]).seconds
    assert told["dispatch"] == pytest.approx(max(0.0, again) * -(-task.batch // task.microbatch))
    assert alone([Plan(), Plan(dp=2)]) == []


def some_work_alone():
    """What each of three workers sees of companies of one, two and three."""
    import torch
    import torch.distributed as dist
    from bench.company import Company

    company, seen = Company(), []
    for workers in (1, 2, 3):
        with company.of(workers) as mine:
            total = torch.ones(1)
            if dist.is_initialized():
                dist.all_reduce(total)
            seen.append((mine, int(total)))
    dist.all_reduce(total := torch.ones(1))
    return seen, int(total)


def test_the_first_of_some_workers_are_all_there_are_for_a_while(ranks):
    found = ranks(some_work_alone, 3)
    assert found[0] == ([(True, 1), (True, 2), (True, 3)], 3)
    assert found[1] == ([(False, 1), (True, 2), (True, 3)], 3)
    assert found[2] == ([(False, 1), (False, 1), (True, 3)], 3)
