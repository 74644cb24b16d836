"""What a plan costs must move the right way when the world changes, and its terms must add up."""

import random
import tracemalloc
from dataclasses import replace

import made
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheaf.cost import BYTES_TERMS, SECONDS_TERMS, clock, microbatch_sizes, price
from sheaf.cost.communication import COUNTER_SECONDS, buckets, exposed, units
from sheaf.cost.placement import contention, seats
from sheaf.cost.seating import Seating
from sheaf.errors import PlanError
from sheaf.graph.facts import BlockTime
from sheaf.parallel.shares import Balanced, Stolen
from sheaf.plans import Plan

PLANS = (
    "serial", "recompute=full", "dp=2", "dp=3", "dp=4", "dp=4,zero=1", "dp=4,zero=2", "dp=4,zero=3",
    "dp=4,zero=3,recompute=full", "dp=4,shares=stolen", "dp=3,shares=3:2:1", "dp=3,shares=3:2:1,zero=2",
)  # fmt: skip
plans = st.sampled_from(PLANS)
SIZES = microbatch_sizes(30, 4)


def priced(text, facts=None, cluster=None, profile=None, sizes=SIZES):
    plan = Plan.parse(text) if isinstance(text, str) else text
    return price(plan, facts or made.facts(), cluster or made.cluster(), profile, microbatches=sizes)


@pytest.mark.parametrize("text", PLANS)
def test_terms_are_the_known_ones_never_negative_and_add_up(text):
    found = priced(text)
    assert tuple(found.seconds) == SECONDS_TERMS
    assert tuple(found.memory) == BYTES_TERMS
    assert min(found.seconds.values()) >= 0
    assert min(found.memory.values()) >= 0
    assert found.step_seconds == pytest.approx(sum(found.seconds.values()))
    assert found.peak_bytes == sum(found.memory.values())


@settings(max_examples=15, deadline=None)
@given(plans, st.floats(1e7, 1e10), st.floats(1.0, 100.0))
def test_more_bandwidth_is_never_slower(plan, bandwidth, factor):
    slow = priced(plan, cluster=made.cluster(bytes_per_second=bandwidth))
    fast = priced(plan, cluster=made.cluster(bytes_per_second=bandwidth * factor))
    assert fast.step_seconds <= slow.step_seconds * (1 + 1e-9)


@settings(max_examples=15, deadline=None)
@given(plans, st.floats(0, 1), st.floats(0, 1))
def test_more_overlap_is_never_slower_and_only_moves_time_into_hiding(plan, low, high):
    low, high = sorted((low, high))
    less, more = (priced(plan, cluster=made.cluster(overlap=overlap)) for overlap in (low, high))
    assert more.step_seconds <= less.step_seconds * (1 + 1e-9)
    assert more.step_seconds + more.hidden_seconds == pytest.approx(less.step_seconds + less.hidden_seconds)


@settings(max_examples=15, deadline=None)
@given(blocks=st.integers(8, 16), workers=st.integers(2, 16), elements=st.integers(200_000, 3_000_000))
def test_each_zero_stage_holds_no_more_than_the_one_before(blocks, workers, elements):
    facts, cluster = made.facts(blocks, elements), made.cluster(16)
    bucket = 4 * elements  # one block's worth: what is in flight is small beside what is sharded
    peaks = [
        priced(Plan(dp=workers, zero=zero, bucket_bytes=bucket), facts, cluster, sizes=(4,) * workers).peak_bytes
        for zero in (0, 1, 2, 3)
    ]
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize("text", ["dp=2", "dp=2,zero=1", "dp=2,zero=2", "dp=2,zero=3"])
def test_recomputing_takes_time_and_saves_activations(text):
    without, with_it = priced(text), priced(text + ",recompute=full")
    assert with_it.seconds["recompute"] > 0 == without.seconds["recompute"]
    assert with_it.memory["activations"] < without.memory["activations"]


def test_a_serial_step_is_the_profile_added_up():
    facts = made.facts(blocks=3)
    profile = made.profile(facts)
    found = priced("serial", facts, profile=profile, sizes=(4, 4, 2))
    blocks = len(facts.blocks) * 0.03
    assert found.seconds["compute"] == pytest.approx(2.5 * blocks)
    assert found.seconds["host"] == pytest.approx(2.5 * 1e-3 + 2e-3)
    assert found.seconds["optimizer"] == pytest.approx(facts.trainable_bytes * 1e-9)
    again = priced("recompute=full", facts, profile=profile, sizes=(4, 4, 2))
    assert again.seconds["recompute"] == pytest.approx(2.5 * 3 * 0.01), "glue and loss do not run again"
    assert found.traffic_bytes == 0


def test_the_slowest_worker_sets_the_pace_and_the_first_one_waits():
    facts = made.facts()
    cluster = made.cluster(1, speeds=(1.0, 0.5))
    found = priced("dp=2", facts, cluster, made.profile(facts), sizes=(4,) * 8)
    one = len(facts.blocks) * 0.03
    assert found.seconds["compute"] == pytest.approx(4 * one)
    assert found.seconds["optimizer"] > 0, "the slow worker begins its next step when its own update is done, later"
    assert found.seconds["wait"] == pytest.approx(4 * (one + 1e-3) + found.seconds["optimizer"])
    fair = priced("dp=2,shares=5:3", facts, cluster, made.profile(facts), sizes=(4,) * 8)
    stolen = priced("dp=2,shares=stolen", facts, cluster, made.profile(facts), sizes=(4,) * 8)
    assert fair.step_seconds < found.step_seconds
    assert stolen.step_seconds == pytest.approx(fair.step_seconds, rel=0.01), "stealing finds the fair shares by itself"


def test_weighted_shards_take_each_worker_as_long_and_fill_one_more():
    cluster = made.cluster(1, speeds=(1.0, 0.5))
    profile = made.profile(made.facts())
    even, weighted = (priced(f"dp=2,zero=1{more}", cluster=cluster, profile=profile) for more in ("", ",shares=2:1"))
    assert weighted.seconds["optimizer"] == pytest.approx(2 / 3 * even.seconds["optimizer"])
    assert weighted.seconds["all_gather"] > even.seconds["all_gather"]
    assert weighted.traffic_bytes == pytest.approx(even.traffic_bytes), "between two one sends what the other does not"
    stolen, cut = (
        priced(f"dp=2,zero=1,shares=stolen{more}", cluster=cluster, profile=profile) for more in ("", ",shards=2:1")
    )
    assert cut.seconds["optimizer"] == pytest.approx(2 / 3 * stolen.seconds["optimizer"])
    assert cut.memory["optimizer_state"] == pytest.approx(4 / 3 * stolen.memory["optimizer_state"])
    for zero in (1, 2, 3):
        half, most = (priced(f"dp=2,zero={zero}{more}").memory for more in (",shares=balanced", ",shares=2:1"))
        assert most["optimizer_state"] == pytest.approx(4 / 3 * half["optimizer_state"])
        assert most["gradients"] > half["gradients"]
        assert (most["parameters"] > half["parameters"]) == (zero == 3)


@pytest.mark.parametrize(("speeds", "count"), [((1.0, 0.45), 4), ((1.0, 0.45), 9), ((1.0, 0.3, 0.7), 13)])
def test_stolen_microbatches_go_to_whom_the_dealer_gives_them(speeds, count):
    facts = made.facts()
    cluster = made.cluster(1, speeds=speeds)
    found = priced(f"dp={len(speeds)},shares=stolen", facts, cluster, made.profile(facts), sizes=(4,) * count)
    profile = made.profile(facts)
    forward = sum(time.forward_seconds for time in profile.blocks.values()) + profile.fetch_seconds
    backward = sum(time.backward_seconds for time in profile.blocks.values())
    updating = sum(one.size_bytes for one in facts.parameters) * profile.optimizer_seconds_per_byte

    class Counted:
        def __init__(self):
            self.number = 0

        def add(self, _key, amount):
            self.number += amount
            return self.number

    counter, clock, waiting = Counted(), [0.0] * len(speeds), []

    each = [(forward + backward) / speed + COUNTER_SECONDS for speed in speeds]

    def working(rank):
        dealer = Stolen(counter, "test", len(speeds), rank)
        dealer.learn(each, [1] * len(speeds))
        clock[rank] += updating / speeds[rank]  # which nobody waits for
        yield
        for _, last in dealer.deal(0, range(count)):
            clock[rank] += forward / speeds[rank]
            yield
            last()
            clock[rank] += (backward + COUNTER_SECONDS * speeds[rank]) / speeds[rank]
            yield

    for rank in range(len(speeds)):
        worker = working(rank)
        next(worker, None)
        waiting.append((clock[rank], rank, worker))
    while waiting:  # whoever is first asks first
        waiting.sort(key=lambda one: one[:2])
        _, rank, worker = waiting.pop(0)
        try:
            next(worker)
            waiting.append((clock[rank], rank, worker))
        except StopIteration:
            pass
    bookkeeping = profile.host_seconds / min(speeds)
    own = sum(found.seconds[term] for term in ("compute", "wait", "host", "optimizer")) - bookkeeping
    assert max(clock) == pytest.approx(own)


def test_rounds_of_zero_2_wait_for_the_longest_share():
    facts = made.facts()
    found = priced("dp=3,zero=2", facts, profile=made.profile(facts), sizes=(4,) * 4)
    assert found.seconds["wait"] == pytest.approx(len(facts.blocks) * 0.03 + 1e-3)


def test_a_ring_all_reduce_sends_twice_what_is_not_ones_own():
    facts = made.facts()
    found = priced("dp=4", facts)
    assert found.traffic_bytes == pytest.approx(2 * 3 / 4 * facts.trainable_bytes)
    assert priced("dp=4,zero=1", facts).traffic_bytes == pytest.approx(found.traffic_bytes)
    rounds = 2  # 8 microbatches among 4 workers
    zero2 = priced("dp=4,zero=2", facts)
    assert zero2.traffic_bytes == pytest.approx((rounds + 1) * 3 / 4 * facts.trainable_bytes)
    gathers = rounds * (4 + 3) / 4  # before forward, and before backward all blocks but the last
    assert priced("dp=4,zero=3", facts).traffic_bytes == pytest.approx(
        (rounds + gathers) * 3 / 4 * facts.trainable_bytes
    )


def test_workers_on_several_machines_use_the_link_between_them():
    cluster = made.cluster(2, hosts=2)
    inside, between = (Seating(cluster).between(tuple(range(count))) for count in (2, 4))
    assert inside.links == (cluster.intra,)
    assert cluster.inter in between.links
    assert between.seconds("all_reduce", 10**8) > 5 * inside.seconds("all_reduce", 10**8)
    lone = made.cluster(1, hosts=2)
    assert Seating(lone).between((0, 1)).links == (lone.inter,)


def test_the_last_piece_has_nothing_to_hide_behind():
    assert exposed([1.0, 1.0, 1.0], 100.0, 1.0) == 1.0
    assert exposed([1.0, 1.0, 1.0], 0.5, 1.0) == 2.5
    assert exposed([1.0, 1.0, 1.0], 100.0, 0.5) == 2.0
    assert exposed([], 1.0, 1.0) == 0.0


def test_shared_and_uncalled_parameters_stay_gathered_under_zero_3():
    facts = made.facts(blocks=3, block_elements=100, glue_elements=10)
    tied = replace(facts.parameters[0], aliases=("head.weight",))
    uncalled = replace(facts.blocks[1], calls=0)
    facts = replace(
        facts,
        parameters=(tied, *facts.parameters[1:]),
        blocks=(facts.blocks[0], uncalled, *facts.blocks[2:]),
    )
    held = units(facts, 1024)
    assert held.block_bytes == (400,)
    assert held.glue_bytes == 400 + 400 + 40


def test_buckets_hold_every_trained_byte_once():
    facts = made.facts(blocks=5, block_elements=1000)
    frozen = replace(facts.parameters[2], requires_grad=False)
    facts = replace(facts, parameters=(*facts.parameters[:2], frozen, *facts.parameters[3:]))
    assert sum(buckets(facts, 8000)) == facts.trainable_bytes == 16000


def test_cpu_workers_share_the_machine():
    cluster = made.cluster(4)
    device = replace(cluster.hosts[0].device, kind="cpu")
    host = replace(cluster.hosts[0], device=device, cores=4)
    cluster = replace(cluster, hosts=(host,), contention={2: 0.9, 4: 0.6})
    lone, four = seats(cluster, 1)[0], seats(cluster, 4)[3]
    assert four.flops_per_second == pytest.approx(0.6e11)
    assert lone.flops_per_second == pytest.approx(4 * 0.6e11), "a lone worker keeps all cores busy with its threads"
    assert four.available_bytes == host.memory_bytes // 4
    assert contention(cluster, 3, 4) == pytest.approx(0.75)
    assert contention(cluster, 8, 4) == pytest.approx(0.3)


@pytest.mark.parametrize("text", ["", ",shares=1:0", ",shares=balanced", ",shares=stolen", ",compress=topk:0.01"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_who_has_nothing_to_compute_still_updates(text, count):
    facts = made.facts(block_elements=20_000_000)
    cluster = made.cluster(1, speeds=(1.0, 0.05))
    found = priced(f"dp=2{text}", facts, cluster, made.profile(facts), sizes=(4,) * count)
    updating = sum(one.size_bytes for one in facts.parameters) * made.profile(facts).optimizer_seconds_per_byte
    assert found.step_seconds >= updating / 0.05


def test_balanced_shares_are_priced_as_they_are_dealt():
    facts = made.facts(block_elements=20_000_000)
    cluster = made.cluster(1, speeds=(1.0, 0.05))
    dealer = Balanced(2, 0)
    profile = made.profile(facts)
    updating = sum(one.size_bytes for one in facts.parameters) * profile.optimizer_seconds_per_byte
    one = sum(time.forward_seconds + time.backward_seconds for time in profile.blocks.values()) + profile.fetch_seconds
    dealer.learn([one, one / 0.05], [1, 1], [updating, updating / 0.05])
    assert dealer.counts(8) == (7, 1), "nobody goes without"
    found = priced("dp=2,shares=balanced", facts, cluster, profile, sizes=(4,) * 8)
    given = priced("dp=2,shares=7:1", facts, cluster, profile, sizes=(4,) * 8)
    assert found.seconds == pytest.approx(given.seconds)


def test_a_profile_of_a_slower_host_is_slower():
    facts = made.facts()
    cluster = made.cluster(1, speeds=(1.0, 0.25))
    profile = replace(made.profile(facts), blocks={"b0": BlockTime(0.1, 0.2)}, fetch_seconds=0.0)
    found = priced("dp=2", facts, cluster, profile, sizes=(4, 4))
    assert found.seconds["wait"] == pytest.approx((0.3 + found.seconds["optimizer"]) * 3)


def test_more_workers_than_seats_are_refused_in_words():
    with pytest.raises(PlanError, match=r"needs 4 workers and made has 2: lower dp"):
        priced("dp=4", cluster=made.cluster(2))


def test_a_pipelines_balanced_shares_are_those_of_its_replicas_speeds():
    unlike, sizes = made.cluster(1, speeds=(1.0, 0.5, 1.0, 0.5)), [4] * 6  # two stages of a fast and a slow replica
    for schedule in ("gpipe", "1f1b"):
        balanced, weighted, equal = (
            priced(f"dp=2,pp=2:{schedule}{shares}", cluster=unlike, sizes=sizes)
            for shares in (",shares=balanced", ",shares=2:1", "")
        )
        assert balanced.memory == weighted.memory
        assert balanced.step_seconds == pytest.approx(weighted.step_seconds)
        assert balanced.step_seconds < equal.step_seconds
        more = balanced.memory["activations"] - equal.memory["activations"]
        # GPipe keeps all four microbatches of the fast replica in place of three; each is of two blocks of four
        assert more == pytest.approx(2_100_000 if schedule == "gpipe" else 0, rel=0.1)
    alike = (priced(f"dp=2,pp=2:gpipe{shares}", sizes=sizes) for shares in (",shares=balanced", ""))
    assert next(alike).memory == next(alike).memory


def test_leaping_over_waves_holds_little_and_changes_no_bit(monkeypatch):
    monkeypatch.setattr(clock, "HELD", 96 * 96 * 7)
    draw = random.Random(0)
    wave = np.array([[draw.choice((-np.inf, draw.random())) for _ in range(96)] for _ in range(96)])
    whole = (wave[:, :, None] + wave[None, :, :]).max(axis=1)
    tracemalloc.start()
    try:
        twice = clock._twice(wave)
        held_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (twice == whole).all()
    assert held_bytes < 8 * 96**3 / 4, "the sums of a few rows at once"
