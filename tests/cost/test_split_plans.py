"""Plans that split layers, cut stages, or split one part: their terms move as the world does, and add up."""

from dataclasses import replace

import made
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheaf.cost import BYTES_TERMS, SECONDS_TERMS, microbatch_sizes, price
from sheaf.cost.basis import Basis
from sheaf.cost.clock import Course, course_seconds, timeline
from sheaf.cost.parts import boundary_moves
from sheaf.cost.pipeline import measured_stages
from sheaf.errors import PlanError
from sheaf.graph.facts import BlockTime
from sheaf.plans import Plan
from sheaf.plans.schedule import actions, held

PLANS = (
    "tp=2", "tp=3", "tp=2,recompute=full", "dp=2,tp=2", "dp=2,tp=2,zero=1", "dp=2,tp=2,zero=3", "tp=2,b1=whole",
    "pp=2", "pp=2:gpipe", "pp=2:interleaved", "pp=2:zero-bubble", "pp=2:zero-bubble,recompute=full", "pp=4",
    "dp=2,pp=2", "dp=2,pp=2,zero=1", "dp=2,pp=2,zero=2", "dp=2,pp=2,zero=3", "dp=2,pp=2,shares=2:1", "tp=2,pp=2",
    "cp=2", "cp=3,recompute=full", "cp=2,dp=2,zero=1", "cp=2,zero=3", "cp=2,pp=2", "cp=2,dp=2,pp=2,zero=1",
    "dp=2,tp=2,pp=2,zero=1", "pp=2,stages=1:7", "dp=2,b7=tp", "dp=4,b3=tp", "dp=2,b[0-2]=tp,recompute=full",
)  # fmt: skip
SIZES = microbatch_sizes(30, 4)


def priced(text, facts=None, cluster=None, profile=None, sizes=SIZES, split=None):
    plan = Plan.parse(text) if isinstance(text, str) else text
    facts = facts or made.facts(8)
    if split is None and plan.cp > 1:
        split = made.sequences(facts, plan.cp)
    if split is None and (plan.tp > 1 or plan.parts):
        split = made.split(facts, plan.tp if plan.tp > 1 else plan.dp)
    return price(plan, facts, cluster or made.cluster(8), profile, microbatches=sizes, split=split)


@pytest.mark.parametrize("measured", [False, True], ids=["roofline", "measured"])
@pytest.mark.parametrize("text", PLANS)
def test_terms_are_the_known_ones_never_negative_and_add_up(text, measured):
    facts = made.facts(8)
    found = priced(text, facts, profile=made.profile(facts) if measured else None)
    assert tuple(found.seconds) == SECONDS_TERMS
    assert tuple(found.memory) == BYTES_TERMS
    assert min(found.seconds.values()) >= 0
    assert min(found.memory.values()) >= 0
    assert found.step_seconds == pytest.approx(sum(found.seconds.values()))
    plan = found.plan
    assert (found.seconds["tensor"] > 0) == (plan.tp * plan.cp > 1 or bool(plan.parts))
    assert (found.seconds["bubble"] > 0) == (plan.pp > 1) == (found.timeline != ()) == (found.stages != ())
    assert sum(found.stages) == (8 if plan.pp > 1 else 0)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(PLANS), st.floats(1e7, 1e10), st.floats(1.0, 100.0))
def test_more_bandwidth_is_never_slower(text, bandwidth, factor):
    slow = priced(text, cluster=made.cluster(8, bytes_per_second=bandwidth))
    fast = priced(text, cluster=made.cluster(8, bytes_per_second=bandwidth * factor))
    assert fast.step_seconds <= slow.step_seconds * (1 + 1e-9)


def test_splitting_layers_shares_out_work_parameters_and_activations():
    facts = made.facts(8)
    whole, half = (
        priced("serial", facts, profile=made.profile(facts)),
        priced("tp=2", facts, profile=made.profile(facts)),
    )
    # Of 10 blocks, the loss and the glue are computed whole by both workers.
    assert half.seconds["compute"] == pytest.approx(0.6 * whole.seconds["compute"], rel=0.01)
    for term in ("parameters", "gradients", "optimizer_state"):
        assert half.memory[term] == whole.memory[term] // 2
    assert half.memory["activations"] < whole.memory["activations"]
    per_microbatch = 16 * (2 * 1e-4 + 2 * 0.5 * 50_000 / 1e9)
    short = 30 / 4 / len(SIZES)  # the last microbatch is half as large: its messages are shorter, not fewer
    assert half.seconds["tensor"] == pytest.approx(
        len(SIZES) * 16 * 2e-4 + len(SIZES) * short * (per_microbatch - 16 * 2e-4)
    )
    again = priced("tp=2,recompute=full", facts, profile=made.profile(facts))
    assert again.seconds["tensor"] == pytest.approx(1.5 * half.seconds["tensor"]), "forward's messages come twice"


def test_splitting_sequences_shares_out_work_and_activations_and_leaves_parameters_whole():
    facts = made.facts(8)
    profile = made.profile(facts)
    whole, half, replicas = (priced(text, facts, profile=profile) for text in ("serial", "cp=2", "dp=2"))
    assert half.seconds["compute"] == pytest.approx(0.55 * whole.seconds["compute"], rel=0.01), "glue is whole"
    assert half.memory["activations"] == pytest.approx(whole.memory["activations"] / 2, rel=0.1)
    for term in ("parameters", "gradients", "optimizer_state"):
        assert half.memory[term] == whole.memory[term]
    for term in ("all_reduce", "all_gather"):  # gradients meet as those of replicas do
        assert half.seconds[term] == pytest.approx(replicas.seconds[term], rel=0.3)
    moved = 8 * len(SIZES) * 3  # messages, of the latency at least
    assert half.seconds["tensor"] > moved * 1e-5
    sharded = priced("cp=2,zero=1", facts, profile=profile)
    assert sharded.memory["optimizer_state"] == half.memory["optimizer_state"] // 2


def test_pipelines_of_split_sequences_pass_on_parts_of_them():
    facts = made.facts(8)
    alone, split = priced("pp=2", facts), priced("cp=2,pp=2", facts)
    seconds = split.seconds["compute"]
    assert seconds < 0.7 * alone.seconds["compute"]
    assert split.memory["activations"] < 0.7 * alone.memory["activations"]


def test_launching_kernels_is_not_shortened_by_splitting():
    facts = made.facts(8)
    cluster = made.cluster(8)
    device = replace(cluster.hosts[0].device, kernel_seconds=5e-4)  # 10 kernels: half of a forward
    slow = replace(cluster, hosts=(replace(cluster.hosts[0], device=device),))
    profile = made.profile(facts)
    sizes = (4,) * 4
    tail = 4 * 2 * 0.03  # loss and glue
    assert priced("tp=2", facts, cluster, profile, sizes).seconds["compute"] == pytest.approx(
        4 * 8 * 0.03 / 2 + tail, rel=0.01
    )
    assert priced("tp=2", facts, slow, profile, sizes).seconds["compute"] == pytest.approx(
        4 * 8 * 0.03 * 0.75 + tail, rel=0.01
    )


def test_uneven_slices_count_as_the_largest():
    facts = made.facts(1, block_elements=1000)
    assert priced("tp=3", facts).memory["parameters"] == 334 * 4


def test_gradients_of_replicas_are_reduced_slice_by_slice():
    alone, split = priced("dp=2", sizes=(4,) * 8), priced("dp=2,tp=2", sizes=(4,) * 8)
    crossing = priced("tp=2", sizes=(4,) * 4).traffic_bytes
    assert split.traffic_bytes - crossing == pytest.approx(alone.traffic_bytes / 2, rel=1e-6)


def test_workers_that_split_a_layer_sit_on_one_machine_and_replicas_on_several():
    cluster = made.cluster(2, hosts=2)
    tight, wide = priced("dp=2,tp=2", cluster=cluster), priced("tp=4", cluster=cluster)
    assert wide.seconds["tensor"] > 3 * tight.seconds["tensor"]
    one = priced("dp=2,tp=2", cluster=made.cluster(4))
    assert tight.seconds["tensor"] == pytest.approx(one.seconds["tensor"])
    assert tight.seconds["all_reduce"] > one.seconds["all_reduce"]


def test_what_is_kept_whole_is_computed_and_held_by_all():
    less, more = priced("tp=2"), priced("tp=2,b1=whole")
    assert more.seconds["compute"] > less.seconds["compute"]
    assert more.memory["parameters"] == less.memory["parameters"] + 500_000
    assert more.seconds["tensor"] == pytest.approx(less.seconds["tensor"] * 7 / 8)


def test_pricing_a_split_needs_its_facts():
    facts = made.facts(8)
    for text in ("tp=2", "dp=2,b1=tp"):
        with pytest.raises(ValueError, match=r"splits layers among 2 workers; .* none are given"):
            price(Plan.parse(text), facts, made.cluster(), None, microbatches=SIZES)
        with pytest.raises(ValueError, match="those given are of 4"):
            priced(text, facts, split=made.split(facts, 4))


def test_modules_inside_a_block_move_for_it():
    facts = made.facts(8)
    split = made.split(facts, 2)
    inner = replace(split, moves=tuple(replace(move, block=f"{move.block}.linear") for move in split.moves))
    assert priced("tp=2,b1=whole", facts, split=inner).seconds == priced("tp=2,b1=whole", facts).seconds


def test_a_balanced_pipeline_idles_as_theory_says():
    facts = made.facts(4)
    profile = replace(
        made.profile(facts),
        blocks={block.name: BlockTime(0.01, 0.02) for block in facts.blocks[:4]},
        fetch_seconds=0.0,
    )
    free = made.cluster(8, bytes_per_second=1e18, latency_seconds=0.0)
    sizes = (4,) * 8
    texts = ("pp=4", "pp=4:gpipe", "pp=2:interleaved", "pp=4:zero-bubble")
    found = {text: priced(text, facts, free, profile, sizes) for text in texts}
    assert found["pp=4"].seconds["compute"] == pytest.approx(8 * 0.03)
    assert found["pp=4"].seconds["bubble"] == pytest.approx(3 * 0.03)
    assert found["pp=4:gpipe"].seconds["bubble"] == pytest.approx(3 * 0.03)
    assert found["pp=2:interleaved"].seconds["bubble"] == pytest.approx(0.03)
    assert found["pp=4:zero-bubble"].seconds["bubble"] < 0.5 * 3 * 0.03
    assert all(one.seconds["transfer"] < 1e-12 for one in found.values())


def test_gpipe_keeps_every_microbatch_and_1f1b_as_many_as_workers():
    sizes = (4,) * 16
    every, few = (priced(text, sizes=sizes).memory["activations"] for text in ("pp=2:gpipe", "pp=2"))
    assert every == pytest.approx(8 * few, rel=0.01)
    one = priced("pp=2:gpipe", sizes=(4,)).memory["activations"]
    assert every == pytest.approx(16 * one, rel=0.01)
    kept = priced("pp=2:gpipe,recompute=full", sizes=sizes).memory["activations"]
    assert kept < every / 4


def test_of_interleaved_a_replica_that_is_dealt_fewer_may_keep_more():
    given = (("dp=2,pp=4:interleaved", 15), ("pp=4:interleaved", 8), ("pp=4:interleaved", 7))
    both, eight, seven = (priced(text, sizes=(4,) * count).memory["activations"] for text, count in given)
    assert both == seven > eight


def test_each_worker_holds_its_stages_and_the_fullest_counts():
    facts = made.facts(8)
    whole = priced("serial", facts).memory["parameters"]
    assert priced("pp=2", facts).memory["parameters"] == whole // 2
    assert priced("pp=2,stages=2:6", facts).memory["parameters"] == whole * 6 // 8
    assert priced("pp=2:interleaved", facts).memory["parameters"] == whole // 2
    assert priced("tp=2,pp=2", facts).memory["parameters"] == whole // 4


def test_parameters_used_in_two_stages_are_held_in_both_and_their_gradients_meet():
    facts = made.facts(8, saved_bytes=1000)
    tied = replace(facts.parameters[0], aliases=("b7.other",))
    shared = replace(facts, parameters=(tied, *facts.parameters[1:]))
    apart, together = priced("pp=2", facts), priced("pp=2", shared)
    assert together.memory["parameters"] == apart.memory["parameters"] + tied.size_bytes
    assert together.seconds["all_reduce"] > apart.seconds["all_reduce"]
    near = replace(facts, parameters=(replace(tied, aliases=("b1.other",)), *facts.parameters[1:]))
    assert priced("pp=2", near).seconds["all_reduce"] == apart.seconds["all_reduce"]


def test_a_slow_link_between_stages_shows_as_transfer():
    fast, slow = (priced("pp=2", cluster=made.cluster(1, hosts=2, inter_bytes_per_second=rate)) for rate in (1e9, 1e6))
    assert slow.seconds["transfer"] > 10 * fast.seconds["transfer"]
    assert slow.seconds["bubble"] == pytest.approx(fast.seconds["bubble"])
    assert fast.traffic_bytes == pytest.approx(50_000 * 30 / 4), "outputs one way, gradients the other"


def test_the_timeline_is_that_of_the_price():
    found = priced("dp=2,pp=2", sizes=(4,) * 6)
    assert found.stages == (4, 4)
    assert len(found.timeline) == 3 * 2 * 2
    assert {row[:2] for row in found.timeline} == {(0, "F"), (0, "B"), (1, "F"), (1, "B")}
    spent = sum(found.seconds[term] for term in ("compute", "bubble", "transfer"))
    assert max(row[5] for row in found.timeline) == pytest.approx(spent)


def test_the_slowest_stage_sets_a_pipelines_pace():
    facts = made.facts(8)
    even, odd = priced("pp=2", facts), priced("pp=2,stages=2:6", facts)
    assert odd.step_seconds > 1.3 * even.step_seconds


def test_a_slow_host_gets_a_short_stage():
    facts = made.facts(8)
    cluster = made.cluster(1, speeds=(1.0, 0.5))
    profile = made.profile(facts)
    plan = Plan.parse("pp=2")
    stages = measured_stages(plan, Basis.of(plan, facts, profile, cluster))
    assert stages == "6:2"  # the loss counts with the last block
    fair = priced(replace(plan, stages=stages), facts, cluster, profile)
    assert fair.step_seconds < 0.8 * priced(plan, facts, cluster, profile).step_seconds


def test_stages_follow_measured_times_only_where_they_differ():
    facts = made.facts(8)
    plan = Plan.parse("pp=2")
    even = replace(made.profile(facts), blocks={one.name: BlockTime(0.01, 0.02) for one in facts.blocks[:8]})
    assert measured_stages(plan, Basis.of(plan, facts, even, made.cluster())) == ""
    heavy = replace(even, blocks={**even.blocks, "b0": BlockTime(0.05, 0.1)})
    assert measured_stages(plan, Basis.of(plan, facts, heavy, made.cluster())) == "2:6"


def test_more_stages_than_blocks_are_refused_in_words():
    with pytest.raises(PlanError, match="use at most pp=2"):
        priced("pp=4", made.facts(2))


def test_a_split_part_is_reduced_by_nobody_and_computed_by_all():
    facts = made.facts(8)
    plain, part = (priced(text, facts, sizes=(4,) * 8) for text in ("dp=2", "dp=2,b7=tp"))
    local = facts.parameters[7].size_bytes // 2
    assert part.memory["parameters"] == plain.memory["parameters"] - local
    assert part.memory["workspace"] == pytest.approx(plain.memory["workspace"] - 2 * local)
    assert part.seconds["all_reduce"] < plain.seconds["all_reduce"]
    assert part.seconds["compute"] == pytest.approx(plain.seconds["compute"], rel=0.05)
    assert part.seconds["wait"] == 0


def test_a_heavy_part_over_a_slow_network_pays():
    facts = made.facts(8)
    big = replace(facts.parameters[7], shape=(50_000_000,))
    facts = replace(facts, parameters=(*facts.parameters[:7], big))
    slow = made.cluster(1, hosts=4)
    plain, part = priced("dp=4", facts, slow), priced("dp=4,b7=tp", facts, slow)
    assert part.step_seconds < plain.step_seconds / 2
    assert part.traffic_bytes < plain.traffic_bytes / 10


def test_what_enters_and_leaves_a_part():
    facts = made.facts(8)
    split = made.split(facts, 2)

    def crossing(text, split=split):
        plan = Plan.parse(text)
        found = boundary_moves(plan, Basis.of(plan, facts, None, made.cluster(), split=split))
        return [(move.block, move.operation, move.backward) for move in found]

    bare = replace(split, moves=())
    assert crossing("dp=2,b7=tp", bare) == [("b7", "broadcast", False), ("b7", "all_reduce", True)]
    assert crossing("dp=2,b7=tp") == [("b7", "broadcast", False)], "the split sums the gradient of its input itself"
    assert crossing("dp=2,b[23]=tp", bare) == [
        ("b2", "broadcast", False), ("b3", "broadcast", True), ("b2", "all_reduce", True),
    ]  # fmt: skip
    assert crossing("dp=2,b0=tp", bare) == [("b0", "broadcast", False), ("b0", "broadcast", True)]


@settings(max_examples=30, deadline=None)
@given(
    schedule=st.sampled_from(["gpipe", "1f1b", "interleaved", "zero-bubble"]),
    workers=st.integers(1, 4),
    microbatches=st.integers(1, 40),
    passing=st.floats(0, 3),
    data=st.data(),
)
def test_the_quick_clock_is_the_simulations(schedule, workers, microbatches, passing, data):
    stages = workers * (2 if schedule == "interleaved" else 1)
    seconds = st.lists(st.floats(0.1, 5), min_size=stages, max_size=stages).map(tuple)
    weights = data.draw(seconds) if schedule == "zero-bubble" else ()
    course = Course(schedule, workers, stages, microbatches, data.draw(seconds), data.draw(seconds), weights, passing)
    assert course_seconds(course) == pytest.approx(timeline(course).seconds, rel=1e-12)


def test_memory_counts_what_the_schedule_holds():
    listed = actions("1f1b", workers=4, stages=4, microbatches=8)
    assert held(listed)[0] == 4
    first = priced("pp=4", sizes=(4,) * 8).memory["activations"]
    alone = priced("pp=4", sizes=(4,)).memory["activations"]
    assert first == pytest.approx(4 * alone, rel=0.05)
