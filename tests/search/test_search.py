"""The search must find what pricing everything finds, refuse what cannot run, and say why."""

import json
from dataclasses import replace

import made
import pytest

from sheaf.cost.memory import needed_bytes
from sheaf.errors import PlanError
from sheaf.graph.facts import BufferFact
from sheaf.plans import Plan
from sheaf.search import Question, broken, candidates, search
from sheaf.search.measured import profile_for
from sheaf.search.space import microbatch_choices, weighted_shares
from sheaf.units import pretty_seconds


def question(**changes) -> Question:
    return Question(**{"batch": 32, "facts": {4: made.facts()}, "cluster": made.cluster(4), "microbatch": 4, **changes})


@pytest.mark.parametrize(
    "asked",
    [
        question(),
        question(microbatch=None, batch=6, workers=2),
        question(cluster=made.cluster(1, speeds=(1.0, 0.45)), microbatch=2),
        question(cluster=made.cluster(bytes_per_second=1e6)),
        question(cluster=made.cluster(memory_bytes=21_000_000)),
        question(batch=7, microbatch=3),
        question(splits={(degree, 0): made.split(made.facts(), degree) for degree in (2, 4)}),
    ],
    ids=["plain", "open", "unequal", "slow-link", "small", "ragged", "split"],
)
def test_the_best_is_what_pricing_everything_finds(asked):
    memory = asked.cluster.hosts[0].device.memory_bytes
    prices = {}
    for plan in candidates(asked):
        faults = broken(
            plan,
            facts=asked.facts[4],
            workers=asked.available,
            batch=asked.batch,
            microbatch=asked.microbatch,
            elementwise=True,
        )
        for one in (
            plan,
            *([] if plan.server else [plan.with_text("offload=optimizer")]),
        ):  # the first of them that fits
            priced = asked.price(one)
            if not faults and needed_bytes(priced.peak_bytes, "cuda") <= memory:
                prices[str(one)] = priced
                break
    ranking = search(asked)
    fastest = min(one.step_seconds for one in prices.values())
    assert ranking.best.step_seconds <= fastest * 1.01 * (1 if asked.microbatch else 1.01)
    listed = {str(entry.plan) for entry in ranking.ranked if not _in_part_again(str(entry.plan))}
    assert listed <= set(prices)
    if asked.microbatch:
        assert listed == set(prices)
    assert not {refusal.plan for refusal in ranking.refused} & {str(entry.plan) for entry in ranking.ranked}


def _in_part_again(text: str) -> bool:
    """Whether only some blocks run again: such plans come of those in which all do."""
    return "=recompute" in text


def test_ties_go_to_fewer_workers_then_less_memory():
    free = question(cluster=made.cluster(3, overlap=1.0, bytes_per_second=1e15, latency_seconds=0.0))
    ranked = search(free).ranked
    fastest = min(entry.price.step_seconds for entry in ranked)
    tied = [entry for entry in ranked if entry.price.step_seconds <= fastest * 1.01]
    assert len(tied) > 2
    assert tied == list(ranked[: len(tied)])
    keys = [(entry.plan.workers, entry.price.peak_bytes, len(str(entry.plan))) for entry in tied]
    assert keys == sorted(keys)


def test_nothing_that_does_not_fit_is_proposed_and_the_remedy_fits():
    asked = question(cluster=made.cluster(memory_bytes=21_000_000))
    ranking = search(asked)
    assert ranking.ranked
    assert all(needed_bytes(entry.price.peak_bytes, "cuda") <= 21_000_000 for entry in ranking.ranked)
    serial = next(refusal for refusal in ranking.refused if refusal.plan == "serial")
    assert "with a tenth to spare" in serial.reason
    assert "optimizer state takes 7.63 MiB" in serial.reason
    remedy = Plan.parse(serial.remedies[0].plan)
    assert needed_bytes(asked.rough(remedy).peak_bytes, "cuda") <= 21_000_000
    assert serial.remedy.startswith(f"use {remedy} (")


def test_remedies_are_the_changes_that_fit_by_the_time_they_take():
    asked = question(cluster=made.cluster(memory_bytes=21_000_000))
    ranking = search(asked)
    starved = [refusal for refusal in ranking.refused if refusal.remedies]
    changed = 0
    for refusal in starved:
        plan = Plan.parse(refusal.plan)
        there = asked.rough(plan).step_seconds
        seconds = [one.step_seconds for one in refusal.remedies]
        assert seconds == sorted(seconds)
        for one in refusal.remedies:
            price = asked.rough(Plan.parse(one.plan))
            assert needed_bytes(price.peak_bytes, "cuda") <= 21_000_000
            assert one.step_seconds == price.step_seconds
            assert one.times == pytest.approx(price.step_seconds / there)
        # by hand: every stage of ZeRO from the plan's own, with and without recomputation and offload, that fits
        own = {
            str(change)
            for zero in range(plan.zero, 4 if plan.dp > 1 else plan.zero + 1)
            for recompute in {plan.recompute, "full"}
            for offload in ("none", "optimizer")
            if (change := _changed(plan, zero, recompute, offload)) is not None
            and needed_bytes(asked.rough(change).peak_bytes, "cuda") <= 21_000_000
        }
        own -= {f"{one},offload=optimizer" for one in own}  # which fits without
        if own:
            changed += 1
            assert {one.plan for one in refusal.remedies if not _in_part_again(one.plan)} == own
            assert all(one in refusal.remedy for one in list({one.plan for one in refusal.remedies[:3]}))
        else:
            assert len(refusal.remedies) == 1
    assert changed >= 3
    assert any(len(refusal.remedies) > 1 for refusal in starved)


def _changed(plan: Plan, zero: int, recompute: str, offload: str) -> Plan | None:
    try:
        return replace(plan, zero=zero, recompute=recompute, offload=offload)
    except PlanError:
        return None


def test_where_the_microbatch_is_open_a_remedy_may_have_another():
    asked = question(microbatch=None, workers=2, cluster=made.cluster(2, memory_bytes=12_000_000))
    ranking = search(asked)
    found = [one for refusal in ranking.refused for one in refusal.remedies]
    assert found
    for one in found:
        plan = Plan.parse(one.plan)
        assert plan.microbatch
        assert needed_bytes(asked.rough(plan).peak_bytes, "cuda") <= 12_000_000


def test_when_nothing_fits_best_says_so():
    ranking = search(question(cluster=made.cluster(memory_bytes=1_000_000)))
    assert ranking.ranked == ()
    with pytest.raises(PlanError, match=r"serial.*give each worker .* MiB"):
        _ = ranking.best


def test_cpu_workers_of_one_host_are_refused_by_their_sum():
    cluster = made.cluster(4)
    host = replace(cluster.hosts[0], device=replace(cluster.hosts[0].device, kind="cpu"), memory_bytes=800 * 2**20)
    ranking = search(question(cluster=replace(cluster, hosts=(host,))))
    assert {entry.plan.workers for entry in ranking.ranked} == {1, 2}
    assert any(refusal.plan.startswith("dp=4") for refusal in ranking.refused)


def test_an_optimizer_that_is_not_elementwise_has_no_zero():
    ranking = search(question(elementwise=False))
    assert all(entry.plan.zero == 0 for entry in ranking.ranked)
    refused = [refusal for refusal in ranking.refused if "zero" in refusal.plan]
    assert refused
    assert all("not elementwise" in refusal.reason for refusal in refused)


def test_buffers_that_nobody_can_merge_keep_a_model_on_one_worker():
    counter = BufferFact("memory.seen", 8, persistent=True, updated=True, module_kind="Memory")
    running = BufferFact("norm.running_mean", 8, persistent=True, updated=True, module_kind="BatchNorm2d")
    alone = search(question(facts={4: made.facts(buffers=(counter, running))}))
    assert all(entry.plan.serial for entry in alone.ranked)
    assert any("memory.seen" in refusal.reason for refusal in alone.refused)
    assert search(question(facts={4: made.facts(buffers=(running,))})).best.plan.workers == 4


def test_more_workers_than_microbatches_are_refused_with_both_remedies():
    ranking = search(question(batch=12, microbatch=6))
    four = next(refusal for refusal in ranking.refused if refusal.plan == "dp=4")
    assert four.reason == "2 microbatches of 6 do not go round 4 workers"
    assert four.remedy == "dp=2, or microbatch=3 in the task"


def test_a_plan_by_hand_has_all_its_faults_listed():
    found = broken(
        Plan.parse("dp=8,zero=1,microbatch=64"), facts=made.facts(), workers=4, batch=32, microbatch=None,
        elementwise=False,
    )  # fmt: skip
    assert [fault.reason.split(",")[0] for fault in found] == [
        "needs 8 workers",
        "a microbatch of 64 is larger than the batch of 32",
        "1 microbatch of 64 do not go round 8 workers",
        "the optimizer is not elementwise",
    ]


def test_unequal_workers_get_shares_by_speed():
    best = search(question(cluster=made.cluster(1, speeds=(1.0, 0.45)), microbatch=2)).best
    assert best.plan.shares == "11:5"
    assert weighted_shares((1.0, 1.0, 2.0), 10) == "2:2:1"


def test_shares_reckon_with_updates_that_the_others_do_not_wait_for():
    facts = made.facts(block_elements=20_000_000, samples=1)
    asked = question(facts={1: facts}, cluster=made.cluster(1, speeds=(1.0, 0.45)), batch=12, microbatch=1)
    ranked = {str(entry.plan) for entry in search(asked).ranked}
    assert {"dp=2,shares=3:1", "dp=2,shares=2:1,zero=1"} <= ranked
    two, three = (asked.price(Plan.parse(f"dp=2,shares={weights}")) for weights in ("2:1", "3:1"))
    busy = [sum(one.seconds[term] for term in ("compute", "wait", "host", "optimizer")) for one in (two, three)]
    assert busy[1] < busy[0], "though less of what travels hides beside the last backward of the fast worker"


def test_shards_by_speed_are_looked_at_beside_stolen_shares_of_unequal_workers():
    cluster = made.cluster(1, speeds=(1.0, 0.5))
    ranking = search(question(cluster=cluster, microbatch=2))
    even, cut = (ranking.entry(Plan.parse(f"dp=2,shares=stolen,zero=1{more}")) for more in ("", ",shards=2:1"))
    assert cut.price.seconds["optimizer"] < 0.7 * even.price.seconds["optimizer"]
    assert cut.price.seconds["all_gather"] > even.price.seconds["all_gather"], "so it is not always better"
    alike = search(question(cluster=made.cluster(2), microbatch=2))
    assert not any(entry.plan.shards for entry in alike.ranked)


def test_where_shards_by_speed_do_not_fit_equal_ones_are_the_remedy():
    cluster = made.cluster(1, speeds=(1.0, 0.45), memory_bytes=18_500_000)
    ranking = search(question(cluster=cluster, microbatch=2))
    uneven = next(one for one in ranking.refused if one.plan == "dp=2,shares=11:5,zero=3")
    assert uneven.remedies[0].plan == "dp=2,shares=balanced,zero=3"
    assert ranking.entry(Plan.parse(uneven.remedies[0].plan)) is not None


def test_the_open_microbatch_is_chosen_and_written_into_the_plan():
    # Launching kernels costs the same for a microbatch of any size, so larger ones win.
    cluster = made.cluster(4)
    device = replace(cluster.hosts[0].device, kernel_seconds=1e-3)
    quick = replace(cluster, hosts=(replace(cluster.hosts[0], device=device),))
    best = search(question(microbatch=None, batch=8, cluster=quick, workers=2)).best
    assert best.plan.microbatch == 4
    assert best.plan.dp == 2
    assert microbatch_choices(32, 4) == (1, 2, 4, 8)


def test_measured_times_are_taken_for_the_size_and_company_of_the_plan():
    facts = {size: made.facts(samples=size) for size in (2, 8)}
    profiles = {
        (size, busy): made.profile(facts[size], concurrency=busy, block_seconds=0.01 * size * busy)
        for size in facts
        for busy in (1, 4)
    }
    assert profile_for(profiles, 5, 1).blocks["b0"].forward_seconds == pytest.approx(0.05)
    assert profile_for(profiles, 5, 3).concurrency == 4
    assert profile_for(profiles, 16, 1).samples == 8
    rehearsed = {key: replace(one, overheads={"dp=2": 0.1 * one.samples}) for key, one in profiles.items()}
    assert profile_for(rehearsed, 5, 1).overheads == {"dp=2": pytest.approx(0.5)}
    assert profile_for({}, 4, 1) is None
    crowded = search(question(facts=facts, profiles=profiles, microbatch=2))
    assert crowded.best.plan.workers == 1, "four busy workers are each four times slower here"


LOSES_ON = {
    "dp=2,zero=2": "reduce-scatter that nothing hides",
    "dp=2,server=1": "pushing gradients to shards and pulling values",
    "dp=2,zero=3": "all-gather that nothing hides",
    "pp=2:zero-bubble": "idling in the pipeline",
    "pp=2": "idling in the pipeline",
    "dp=2,zero=1,recompute=full": "running blocks forward again",
    "pp=2,recompute=full": "running blocks forward again",
    "serial": "computing",
}


def test_what_is_said_of_a_hand_made_cluster():
    ranking = search(question(cluster=made.cluster(2)))
    best, serial = ranking.best, ranking.entry("serial").price
    assert str(best.plan) == "dp=2"
    times = serial.step_seconds / best.step_seconds
    assert 1.9 < times < 2
    assert ranking.ranked[0].reason.startswith(f"fastest: {times:.2f} times serial with 2 workers; ")
    assert ranking.entry("dp=2,zero=1").loses_on == "as fast within 1 %, but longer to write"
    for entry in ranking.ranked[1:]:
        if entry.price.step_seconds <= best.step_seconds * 1.01:
            assert entry.loses_on.startswith("as fast within 1 %, but ")
        else:
            most = max(entry.price.seconds[term] - best.seconds[term] for term in best.seconds)
            assert entry.loses_on.startswith(f"{pretty_seconds(most)} more ")
    for plan, words in LOSES_ON.items():
        assert ranking.entry(plan).loses_on.endswith(f" more {words}")


def test_json_has_the_promised_shape():
    values = json.loads(json.dumps(search(question(batch=12, microbatch=6)).to_dict()))
    assert set(values) == {
        "plans", "refused", "cluster", "batch", "microbatch", "splits", "looked_at", "proven", "least_seconds",
        "search_seconds", "explanation", "costs", "workers_needed", "cores_taken",
    }  # fmt: skip
    first, second = values["plans"][:2]
    shared = {
        "text", "exact", "seconds", "step_seconds", "hidden_seconds", "memory", "peak_bytes", "traffic_bytes",
        "stages", "begins",
    }  # fmt: skip
    assert set(first) == shared | {"reason"}
    assert set(second) == shared | {"loses_on"}
    assert first["step_seconds"] == pytest.approx(sum(first["seconds"].values()))
    assert first["peak_bytes"] == sum(first["memory"].values())
    assert values["refused"]
    assert set(values["refused"][0]) == {"text", "reason", "remedy", "remedies"}
    assert values["cluster"] == "made"
    assert values["microbatch"] == 6


def test_steps_dealt_by_speed_are_not_dealt_by_weights_too():
    cluster = made.cluster(1, speeds=(1.0, 0.5, 0.9))
    ranked = search(question(cluster=cluster, batch=24, microbatch=1, allow_relaxed=True)).ranked
    assert any(entry.plan.meets_locally.steps == "speed" for entry in ranked)
