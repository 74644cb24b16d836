"""Workers that are here already measure themselves, and all of them hear the same."""

from dataclasses import replace

import made
import pytest
import small

from sheaf.api.here import combined, paced
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


def test_a_slower_worker_is_a_slower_host_in_the_times_of_the_first():
    fast = made.profile(FACTS)
    found, speeds = combined([fast, slower(fast, 2.0, 0.01)])
    assert speeds == (1.0, 0.5)
    assert found.exposed_seconds == 0.01, "the slower one waits for nothing but the network"
    for name, time in fast.blocks.items():
        assert found.blocks[name].forward_seconds == pytest.approx(time.forward_seconds)
    cluster = paced(made.cluster(1, hosts=2), speeds)
    assert [(host.count, host.speed) for host in cluster.hosts] == [(1, 1.0), (1, 0.5)]
    backwards, speeds = combined([slower(fast, 2.0, 0.01), fast])
    assert speeds == (1.0, 2.0)
    assert backwards.host_seconds == pytest.approx(2 * fast.host_seconds)


def test_workers_that_differ_by_noise_are_equal():
    fast = made.profile(FACTS)
    found, speeds = combined([fast, slower(fast, 1.03, 0.02), slower(fast, 0.98, 0.04)])
    assert speeds == (1.0, 1.0, 1.0)
    assert found.exposed_seconds == 0.02
    assert paced(made.cluster(3), speeds) == made.cluster(3)


def asked(plans):
    import torch

    from sheaf.api.here import measured_again, question_here
    from sheaf.graph import trace

    torch.set_num_threads(1)
    task = small.SMALL["mlp"]()
    before = question_here(
        task, trace(task, task.microbatch), plans=[Plan.parse(text) for text in plans], budget_seconds=0.3
    )
    question = measured_again(before, task, budget_seconds=0.1)
    (first,), (second,) = before.profiles.values(), question.profiles.values()
    assert first.overheads == second.overheads
    assert first.blocks != second.blocks
    assert first.overheads.keys() == {"dp=2", "dp=2,zero=3", "pp=2", "dp=2,local=2"}
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
    from sheaf.api.here import question_here
    from sheaf.graph import trace

    task = small.SMALL["gpt"]()
    plans = [Plan.parse("serial"), Plan.parse("recompute=full")]
    question = question_here(task, trace(task, task.microbatch), plans=plans, budget_seconds=0.1)
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
