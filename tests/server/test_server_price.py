"""What a plan with a server is predicted to cost: shards share the load, and it moves what it says."""

import made
import pytest

from sheaf.cost import SECONDS_TERMS, microbatch_sizes, price
from sheaf.errors import PlanError
from sheaf.plans import Plan


def priced(text):
    return price(Plan.parse(text), made.facts(), made.cluster(), None, microbatches=microbatch_sizes(30, 4))


def test_more_shards_share_the_load_and_nothing_is_all_reduced_but_small_things():
    one, four, ring = priced("dp=4,server=1"), priced("dp=4,server=4"), priced("dp=4")
    assert tuple(one.seconds) == SECONDS_TERMS
    assert one.seconds["server"] > 2 * four.seconds["server"] > 0
    assert four.seconds["all_reduce"] < ring.seconds["all_reduce"]
    assert ring.seconds["server"] == 0
    whole = made.facts().trainable_bytes
    assert four.traffic_bytes == (1 / 4 + 3 / 2) * whole, "a sum to the backup; three quarters pushed, as much given"
    assert one.traffic_bytes == (1 + 3) * whole, "of the worker with the shard"
    assert priced("dp=4,server=4:async").traffic_bytes == (1 + 3 / 2) * whole, "every push to the backup"
    assert priced("dp=4,server=4,shares=stolen").traffic_bytes == (1 + 3 / 2) * whole
    assert four.memory["workspace"] > 2 * whole


def test_nobody_waits_for_a_straggler_without_a_bound():
    def on(speeds, text):
        cluster = made.cluster(1, speeds=speeds)
        return price(Plan.parse(text), made.facts(), cluster, None, microbatches=microbatch_sizes(32, 4))

    alike, unlike = (1.0, 1.0), (1.0, 0.5)
    in_step, late = on(alike, "dp=2,server=2"), on(alike, "dp=2,server=2:async")
    assert late.seconds | {"server": 0} == pytest.approx(in_step.seconds | {"server": 0})
    assert late.seconds["server"] > in_step.seconds["server"], "its backups are given every push, not their sum"
    lock_step, bounded, free = (on(unlike, f"dp=2,server=2{how}") for how in ("", ":staleness=4", ":async"))
    assert bounded.seconds["wait"] == lock_step.seconds["wait"] > 0, "in the end all go at the slowest's pace"
    own = lock_step.seconds["compute"]  # of the faster; the slower needs twice that for as many samples
    assert free.seconds["wait"] == pytest.approx(own / 3, rel=0.02), "a batch takes both together 4/3 of its time"


def test_replicas_of_several_workers_push_what_each_holds():
    facts = made.facts()

    def seconds(text):
        plan, sizes = Plan.parse(text), microbatch_sizes(32, 4)
        split = made.split(facts, plan.tp) if plan.tp > 1 else None
        return price(plan, facts, made.cluster(8), None, microbatches=sizes, split=split)

    for mesh in ("tp=2", "pp=2"):
        whole, part = seconds("dp=4,server=4"), seconds(f"dp=4,{mesh},server=4")
        assert 0.4 * whole.seconds["server"] < part.seconds["server"] < 0.7 * whole.seconds["server"], mesh
        assert part.memory["optimizer_state"] < 0.6 * whole.memory["optimizer_state"], mesh
        assert part.seconds["optimizer"] == 0, mesh
        late = seconds(f"dp=4,{mesh},server=4:async")
        assert 0 < late.seconds["server"] - part.seconds["server"] < 1e-2, "they tell each other what they saw"


def test_apart_a_worker_sends_its_gradient_only_and_holds_no_optimizer_state():
    whole = made.facts().trainable_bytes

    def on_eight(text):
        return price(Plan.parse(text), made.facts(), made.cluster(8), None, microbatches=microbatch_sizes(30, 4))

    beside, apart, many = on_eight("dp=4,server=4"), on_eight("dp=4,server=4:apart"), on_eight("dp=3,server=5:apart")
    assert apart.traffic_bytes == many.traffic_bytes == whole < beside.traffic_bytes
    assert apart.memory["optimizer_state"] == 0 < beside.memory["optimizer_state"]
    assert beside.seconds["server"] < apart.seconds["server"] < 2 * beside.seconds["server"], "nothing stays at home"
    one = on_eight("dp=4,server=1:apart")  # which holds it all, and nothing of the rest
    assert one.memory["optimizer_state"] == sum(one.memory.values()) > whole
    assert one.seconds["server"] > 2 * apart.seconds["server"]
    with pytest.raises(PlanError, match="needs 8 workers and made has 4"):
        priced("dp=4,server=4:apart")


def test_with_steps_between_meetings_a_step_has_its_share_of_one():
    for server in ("4", "4:async", "2:staleness=2"):
        often, seldom = priced(f"dp=4,server={server}"), priced(f"dp=4,server={server},local=8:diloco")
        assert seldom.seconds["server"] == pytest.approx(often.seconds["server"] / 8)
        assert seldom.traffic_bytes == pytest.approx(often.traffic_bytes / 8)
        assert seldom.seconds["optimizer"] == priced("dp=4").seconds["optimizer"] > 0
        assert seldom.memory["optimizer_state"] > priced("dp=4").memory["optimizer_state"]
        assert seldom.memory["workspace"] > often.memory["workspace"]
