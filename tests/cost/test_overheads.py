"""What executors add, as it was rehearsed, comes on top of what is priced: for each microbatch, step or meeting."""

from dataclasses import replace

import made
import pytest

from sheaf.api.rehearsals import MICROBATCHES, Rehearsals, overheads, scaled, wanted
from sheaf.cost.overheads import in_microbatches, in_steps
from sheaf.plans import Plan
from sheaf.search import Question

FACTS = made.facts(8)
PROFILE = made.profile(FACTS, concurrency=2)
EXTRA_SECONDS = 0.05
SMALL = 2  # samples


def question(batch=8, microbatch=4, profile=PROFILE, workers=2):
    return Question(
        batch=batch,
        facts={FACTS.samples: FACTS},
        cluster=made.cluster(4),
        microbatch=microbatch,
        profiles={(microbatch, workers): profile},
        splits={
            (2, 0): made.split(FACTS, 2),
            (2, 1): made.split(FACTS, 2),
            (2, 3): made.sequences(FACTS, 2),
            (4, 0): made.split(FACTS, 4),
        },
    )


def small(profile):
    return question(MICROBATCHES * SMALL, SMALL, profile)


def rehearsed(*texts, extra=EXTRA_SECONDS):
    """What steps took, had each plan taken ``extra`` more than its price."""
    plain = scaled(PROFILE, SMALL)
    plans = wanted(Plan.parse(text) for text in texts)
    seconds = {str(plan): small(plain).price(plan).step_seconds + extra for plan in plans}
    return Rehearsals(plain, seconds)


@pytest.mark.parametrize(
    "text",
    [
        "dp=2", "tp=2", "tp=2,sequence=1", "cp=2", "pp=2", "pp=2:gpipe", "dp=2,zero=1", "dp=2,zero=2", "dp=2,zero=3",
        "dp=2,shares=stolen", "dp=2,recompute=full", "dp=2,compress=int8", "dp=2,local=2:diloco", "dp=2,server=1",
        "dp=2,b7=tp",
    ],
)  # fmt: skip
def test_a_rehearsed_plan_is_then_predicted_as_it_was_measured(text):
    found = rehearsed(text)
    added = overheads(question(), found, 2)
    assert text in added
    told = small(replace(found.profile, overheads=added)).price(Plan.parse(text))
    assert told.step_seconds == pytest.approx(found.seconds[text], rel=1e-6)
    assert told.step_seconds == pytest.approx(sum(told.seconds.values()))


def test_what_adds_to_microbatches_grows_with_them_and_what_adds_to_steps_does_not():
    added = overheads(question(), rehearsed("dp=2,zero=3", "dp=2,zero=1"), 2)

    def more(text, batch):
        with_it = question(batch, profile=replace(PROFILE, overheads=added)).price(Plan.parse(text))
        return with_it.step_seconds - question(batch).price(Plan.parse(text)).step_seconds

    rounds = MICROBATCHES // 2
    assert more("dp=2,zero=3", 16) == pytest.approx(2 * EXTRA_SECONDS / rounds)
    assert more("dp=2,zero=3", 32) == pytest.approx(4 * EXTRA_SECONDS / rounds)
    assert more("dp=2,zero=1", 16) == pytest.approx(more("dp=2,zero=1", 32)) == pytest.approx(EXTRA_SECONDS)


def test_meetings_are_shared_out_and_mixed_plans_add_up():
    added = overheads(question(), rehearsed("dp=2,local=8", "tp=2", "dp=2,zero=1"), 2)
    known = replace(PROFILE, overheads=added)

    def more(text):
        plan = Plan.parse(text)
        return question(16, profile=known).price(plan).step_seconds - question(16).price(plan).step_seconds

    assert more("dp=2,local=8") == pytest.approx(2 * EXTRA_SECONDS / 8)
    assert more("dp=2,tp=2,zero=1") == pytest.approx(EXTRA_SECONDS * (2 / MICROBATCHES + 1))
    assert more("serial") == 0


def test_what_was_priced_too_high_is_put_right_as_far_as_to_nothing():
    cheaper = overheads(question(), rehearsed("dp=2,zero=1", "dp=2,zero=3", extra=-10.0), 2)
    profile = replace(PROFILE, overheads=cheaper)
    for text in ("dp=2,zero=1", "dp=2,zero=3"):
        told = question(profile=profile).price(Plan.parse(text))
        assert min(told.seconds.values()) >= 0
        assert told.seconds["compute"] == question().price(Plan.parse(text)).seconds["compute"]


def test_every_executor_is_rehearsed_on_two_workers_and_replicas_are_counted_once():
    assert wanted([Plan()]) == []
    plans = [Plan.parse(text) for text in ("serial", "dp=4", "dp=4,shares=3:1:1:1", "dp=2,tp=4,pp=4,zero=1")]
    assert [str(plan) for plan in wanted(plans)] == ["dp=2", "tp=2", "pp=2", "dp=2,zero=1"]
    assert in_microbatches(plans[1]) == ()
    added = overheads(question(), rehearsed("dp=2", "dp=2,shares=stolen"), 2)
    assert added["dp=2"] == pytest.approx(EXTRA_SECONDS)
    assert added["dp=2,shares=stolen"] == pytest.approx(0.0, abs=1e-9)
    assert [str(plan) for plan in in_steps(Plan.parse("dp=2,shares=stolen"))] == ["dp=2"]


@pytest.mark.parametrize(("text", "stages"), [("pp=2", 2), ("dp=2,shares=stolen", 1), ("dp=2,recompute=full", 1)])
def test_what_goes_on_while_messages_travel_adds_the_processor_time_that_it_takes(text, stages):
    plain = sum(time.forward_seconds + time.backward_seconds for time in scaled(PROFILE, SMALL).blocks.values())
    replicas = MICROBATCHES * plain
    known = 0.0
    if "recompute" in text:
        known = small(scaled(PROFILE, SMALL)).price(Plan(recompute="full")).seconds["recompute"]
    if "pp" in text:
        stepped = PROFILE.optimizer_seconds_per_byte * FACTS.trainable_bytes
        known = MICROBATCHES * scaled(PROFILE, SMALL).fetch_seconds - stepped
    found = replace(
        rehearsed("dp=2", text, extra=7.0),  # waiting, of which nothing follows
        processor_seconds={"dp=2": replicas, text: replicas + known + EXTRA_SECONDS},
    )
    added = overheads(question(), found, 2)
    assert added[text] == pytest.approx(EXTRA_SECONDS / MICROBATCHES / stages)
    halves = {one: seconds / 2 for one, seconds in found.processor_seconds.items()}
    shared = overheads(question(), replace(found, processor_seconds=halves), 2)
    assert shared[text] == pytest.approx(added[text]), "threads that run half of the time take twice as long"


def test_a_slower_worker_takes_longer_for_what_its_processor_does_but_not_for_waiting():
    from sheaf.cost.overheads import microbatch_seconds, stage_seconds

    profile = replace(PROFILE, overheads={"pp=2": 0.5, "tp=2": 0.25})
    plan = Plan.parse("tp=2,pp=2")
    assert stage_seconds(profile, plan, first=True, speed=0.5) == 1.0
    assert microbatch_seconds(profile, plan, speed=0.5) == 0.25


def test_what_telling_backwards_apart_adds_is_of_all_stages_but_the_first():
    with_it = replace(PROFILE, overheads={"pp=2": 0.01, "pp=2:zero-bubble": 0.04})
    plan = Plan.parse("pp=2:zero-bubble")
    busiest = question(profile=with_it).price(plan).seconds["dispatch"]
    assert busiest == pytest.approx((0.01 + 2 * 0.03) * 2), "two microbatches, on the second stage"
    assert [str(one) for one in in_microbatches(plan)] == ["pp=2", "pp=2:zero-bubble"]
    together = Plan.parse("pp=2:zero-bubble,recompute=full")
    assert question(profile=with_it).price(together).seconds["dispatch"] == pytest.approx(0.02), "done at once there"


def test_replicas_wait_for_the_last_of_them_though_all_are_equally_fast():
    uneven = replace(PROFILE, uneven_seconds=0.02)

    def more(text):
        prices = (question(profile=one).price(Plan.parse(text)).seconds["wait"] for one in (uneven, PROFILE))
        return next(prices) - next(prices)

    assert [more(text) for text in ("serial", "dp=2", "dp=2,zero=3", "pp=2", "dp=2,local=4", "dp=2,server=1")] == (
        pytest.approx([0.0, 0.02, 0.02, 0.0, 0.01, 0.02])
    )
    assert more("dp=2,server=1:async") == 0
