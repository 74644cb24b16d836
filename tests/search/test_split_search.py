"""The search over split layers, stages and parts: what is proposed, what is refused, and what wins where it should."""

from dataclasses import replace

import made
import pytest

from sheaf.errors import PlanError
from sheaf.graph.facts import BlockTime
from sheaf.plans import Plan
from sheaf.plans.stages import placed
from sheaf.search import Question, broken, candidates, search
from sheaf.search.space import heavy_part, mesh_degrees, mesh_strategies, meshes


def question(facts=None, *, degrees=(2, 4), sequences=(0,), **changes) -> Question:
    facts = facts or made.facts(8)
    splits = {(degree, sequence): made.split(facts, degree) for degree in degrees for sequence in sequences}
    given = {"batch": 32, "facts": {4: facts}, "cluster": made.cluster(4), "microbatch": 4, "splits": splits}
    return Question(**{**given, **changes})


def classified(elements=20_000_000):
    """Convolutions with all the work, then a classifier of two blocks with all the parameters."""
    facts = made.facts(6)
    names = ["features.0", "features.1", "features.2", "features.3", "classifier.0", "classifier.1"]
    blocks = [
        replace(
            block,
            name=name,
            parameters=(f"{name}.weight",),
            parameter_bytes=4 * (elements if name.startswith("c") else 1000),
            forward_flops=1e8 if name.startswith("c") else 1e9,
            backward_flops=2e8 if name.startswith("c") else 2e9,
        )
        for block, name in zip(facts.blocks, names, strict=False)
    ]
    parameters = [
        replace(one, name=f"{name}.weight", shape=(elements if name.startswith("c") else 1000,))
        for one, name in zip(facts.parameters, names, strict=True)
    ]
    return replace(facts, blocks=(*blocks, *facts.blocks[6:]), parameters=tuple(parameters))


def broken_by(text, **changes):
    given = {"facts": made.facts(4), "workers": 8, "batch": 32, "microbatch": 4, "elementwise": True, **changes}
    return broken(Plan.parse(text), **given)


def test_every_way_to_arrange_the_workers_is_looked_at():
    found = {(plan.dp, plan.tp, plan.pp) for plan in candidates(question())}
    assert found == {
        (dp, tp, pp) for dp in range(1, 5) for tp in (1, 2, 4) for pp in range(1, 5) if dp * tp * pp <= 4
    }  # fmt: skip
    schedules = {plan.schedule for plan in candidates(question()) if plan.pp > 1}
    assert schedules == {"gpipe", "1f1b", "interleaved", "zero-bubble"}
    assert len(list(candidates(question()))) == len({str(plan) for plan in candidates(question())})


def test_sequences_are_split_where_a_rehearsal_says_that_they_can_be():
    facts = made.facts(8)
    asked = question(degrees=(), splits={(2, 3): made.sequences(facts, 2)})
    found = {(plan.dp, plan.cp, plan.pp) for plan in candidates(asked) if plan.cp > 1}
    assert found == {(1, 2, 1), (2, 2, 1), (1, 2, 2)}
    assert not any(plan.cp > 1 for plan in candidates(question()))
    one = replace(asked, batch=4)  # one microbatch: replicas and stages have nothing to share
    assert search(one).best.plan.cp == 2
    assert "computing" in next(entry.loses_on for entry in search(one).ranked if entry.plan.serial)


def test_the_best_pipeline_of_each_number_of_workers_has_a_timeline():
    ranked = search(replace(question(degrees=()), batch=8)).ranked
    first = {entry.plan.workers: entry for entry in reversed(ranked)}
    assert any(entry.plan.pp > 1 for entry in first.values())
    assert all(bool(entry.price.timeline) == (entry.plan.pp > 1) for entry in first.values())


def test_only_what_was_rehearsed_is_split():
    assert all(plan.tp in (1, 2) for plan in candidates(question(degrees=(2,))))
    assert all(plan.sequence == 0 for plan in candidates(question()))
    both = {(plan.tp, plan.sequence) for plan in candidates(question(sequences=(0, 1)))}
    assert both == {(1, 0), (2, 0), (2, 1), (4, 0), (4, 1)}


def test_layers_are_not_split_between_machines_with_several_workers():
    several = question(cluster=made.cluster(2, hosts=2))
    assert max(plan.tp for plan in candidates(several)) == 2
    lone = question(cluster=made.cluster(1, hosts=4))
    assert max(plan.tp for plan in candidates(lone)) == 4


def test_a_mesh_has_as_many_workers_as_it_says():
    for workers in range(1, 25):
        assert all(dp * tp * pp == workers for dp, tp, pp in meshes(workers, (2, 3, 8), 12))


def test_splitting_wins_where_microbatches_are_few_and_links_fast():
    asked = question(batch=4, cluster=made.cluster(4, bytes_per_second=1e11, latency_seconds=1e-6))
    ranking = search(asked)
    assert ranking.best.plan.tp == 4
    assert "times serial with 4 workers" in ranking.ranked[0].reason


def test_stages_win_where_memory_is_short_and_links_are_slow():
    slow = made.cluster(1, hosts=4, inter_bytes_per_second=2e6)
    ranking = search(question(cluster=slow, batch=64))
    assert ranking.best.plan.pp == 4
    assert ranking.best.timeline, "the leader's pipeline can be drawn"
    assert not ranking.ranked[1].price.timeline
    split = next(entry for entry in ranking.ranked if entry.plan == Plan(tp=4))
    assert "sending between the workers that split a layer" in split.loses_on


def test_nothing_that_does_not_fit_is_proposed():
    tight = question(cluster=made.cluster(4, memory_bytes=15_000_000))
    ranking = search(tight)
    assert ranking.ranked
    assert all(entry.price.peak_bytes * 1.1 <= 15_000_001 for entry in ranking.ranked)
    assert ranking.entry("serial") is None
    assert any(entry.plan.pp > 1 for entry in ranking.ranked)


def test_measured_stages_are_written_into_the_plan():
    facts = made.facts(8)
    uneven = replace(
        made.profile(facts),
        blocks={one.name: BlockTime(0.04, 0.08) if one.name == "b0" else BlockTime(0.01, 0.02) for one in facts.blocks},
    )
    plans = {str(plan) for plan in candidates(question(facts, profiles={(4, 1): uneven}))}
    assert "pp=2,stages=3:5" in plans
    assert "pp=2" not in plans
    assert "pp=2" in {str(plan) for plan in candidates(question(facts))}


def test_replicas_of_unequal_speed_get_unequal_shares_of_pipelines_too():
    cluster = made.cluster(2, speeds=(1.0, 0.5))
    cluster = replace(cluster, inter=cluster.intra)
    plans = [plan for plan in candidates(question(cluster=cluster, batch=48)) if plan.tp == 2 and plan.dp == 2]
    assert "8:4" not in {plan.shares for plan in plans}
    assert "2:1" in {plan.shares for plan in plans}


def test_the_part_with_most_parameters_and_little_work_is_split():
    facts = classified()
    assert heavy_part(facts) == "classifier"
    asked = question(facts, cluster=made.cluster(1, hosts=4, inter_bytes_per_second=1e8), degrees=(4,))
    best = search(asked).best
    assert best.plan.part("classifier.0") == "tp"
    whole = asked.price(Plan(dp=4))
    assert best.step_seconds < whole.step_seconds / 4


def test_no_part_is_split_where_work_and_parameters_go_together():
    assert heavy_part(made.facts(8)) is None
    assert heavy_part(classified(elements=1000)) is None
    assert not any(plan.parts for plan in candidates(question(classified(), degrees=())))


@pytest.mark.parametrize(
    ("text", "changes", "reason", "remedy"),
    [
        ("pp=5", {}, "has 5 stages, and the model has 4 blocks to make them of", "pp=4"),
        ("pp=4:interleaved", {}, "has 8 stages, 2 per worker, and the model has 4 blocks to make them of", "pp=2"),
        ("pp=2", {"facts": made.facts(1)}, "has 2 stages, and the model has 1 block to make them of",
         "dp or tp in place of pp"),
        ("pp=2,stages=1:2", {}, "stages=1:2 places 3 blocks, the model has 4", "drop stages"),
        ("dp=2,pp=2", {"batch": 4}, "1 microbatch of 4 do not go round 2 replicas", "dp=1"),
        ("tp=2", {"elementwise": False}, "workers that split layers step slices of parameters", "an elementwise"),
        ("pp=2", {"elementwise": False}, "workers that cut stages step some parameters each", "an elementwise"),
        ("dp=2,b1=tp", {"elementwise": False}, "split layers step slices of parameters", "dp=2 alone"),
        ("dp=2,pp=2,zero=1", {"elementwise": False}, "ZeRO steps flat slices", "zero=0"),
        ("dp=2,tp=2,pp=4", {}, "needs 16 workers, there are 8", "give more workers"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_with_reason_and_remedy(text, changes, reason, remedy):
    (fault,) = broken_by(text, **changes)
    assert reason in fault.reason
    assert remedy in fault.remedy


def test_as_many_microbatches_as_replicas_are_enough_for_any_mesh():
    assert broken_by("dp=2,tp=2,pp=2", batch=8) == []
    assert broken_by("tp=8", batch=4) == []


def test_an_optimizer_over_all_parameters_leaves_replicas_alone():
    ranking = search(question(elementwise=False))
    assert {(entry.plan.tp, entry.plan.pp, entry.plan.zero) for entry in ranking.ranked} == {(1, 1, 0)}
    assert any(refusal.plan.startswith("tp=2") for refusal in ranking.refused)
    assert any(refusal.plan.startswith("pp=2") for refusal in ranking.refused)


def test_the_open_microbatch_of_a_pipeline_leaves_several_to_fill_it():
    plans = [plan for plan in candidates(question(microbatch=None, batch=64)) if plan.pp == 4]
    assert {plan.microbatch for plan in plans} == {4, 8, 16}
    ranked = [entry for entry in search(question(microbatch=None, batch=64)).ranked if entry.plan.pp == 4]
    assert all(entry.plan.microbatch for entry in ranked)


def test_a_question_asked_again_with_profiles_forgets_what_it_knew():
    asked = question()
    before = asked.price(Plan(pp=2)).step_seconds
    again = replace(asked, profiles={(4, 1): made.profile(asked.facts[4], block_seconds=10.0)})
    assert again.price(Plan(pp=2)).step_seconds > 100 * before


def test_hand_written_plans_are_priced_or_say_what_they_lack():
    asked = question()
    assert asked.price(Plan.parse("tp=2,pp=2,stages=3:5")).stages == (3, 5)
    with pytest.raises(ValueError, match="needs their split facts"):
        asked.price(Plan(tp=3))
    with pytest.raises(PlanError, match="the model has 8"):
        asked.price(Plan(pp=4, stages="1:1:1:1"))
    assert len(placed(asked.facts[4])) == 8


def test_there_are_few_enough_plans_to_price_them_all():
    def count(workers):
        return sum(
            1
            for number in mesh_degrees(workers)
            for dp, tp, pp in meshes(number, (2, 4, 8), 50)
            for _ in mesh_strategies(dp, tp, pp, (0, 1), 50)
        )

    assert count(8) < 400
    assert count(64) < 1500
