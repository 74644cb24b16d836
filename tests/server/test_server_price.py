"""What a plan with a server is predicted to cost: shards share the load, and it moves what it says."""

import made

from sheaf.cost import SECONDS_TERMS, microbatch_sizes, price
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
    assert abs(four.traffic_bytes - 3 * whole) <= 4
    assert four.memory["workspace"] > 2 * whole


def test_staleness_costs_no_more_than_lock_step():
    assert priced("dp=4,server=2:async").step_seconds <= priced("dp=4,server=2").step_seconds
