"""What is said beside a price must hold when the price is worked out again, and text that is no change be refused."""

import json
from dataclasses import replace

import made
import pytest

from sheaf.api import verdicts
from sheaf.api.verdicts import finished, strategy, sweeps, what_if
from sheaf.cluster.cluster import Tier
from sheaf.errors import PlanError
from sheaf.plans import Plan
from sheaf.search import Question, search
from sheaf.search.change import Change, changed, parse
from sheaf.search.explain import explained


def question(**changes) -> Question:
    return Question(**{"batch": 32, "facts": {4: made.facts()}, "cluster": made.cluster(4), "microbatch": 4, **changes})


def test_the_best_plan_is_taken_apart_and_what_others_need_makes_them_win():
    asked = question(cluster=made.cluster(4, bytes_per_second=1e8))
    ranking = search(asked)
    found = explained(asked, ranking)
    best = ranking.best
    whole = found.compute_seconds * (1 + found.alpha) + found.other_seconds
    assert whole == pytest.approx(best.step_seconds)
    assert best.seconds[found.binding] == max(best.seconds.values())
    flops = asked.facts[4].flops * 32 / 4
    assert found.ideal_seconds == pytest.approx(flops / (best.plan.workers * 1e11))
    assert found.efficiency == pytest.approx(found.ideal_seconds / best.step_seconds)
    solved = [one for one in found.needed if one.key in ("intra", "inter", "flops", "batch")]
    assert solved
    for one in solved:
        runner = Plan.parse(one.plan)
        there = changed(asked, [Change(one.key, one.factor, factor=True)])
        assert there.rough(runner).step_seconds < there.rough(best.plan).step_seconds
        if one.key == "batch":
            continue
        nearer = changed(asked, [Change(one.key, one.factor**0.9, factor=True)])
        assert nearer.rough(runner).step_seconds > nearer.rough(best.plan).step_seconds


def test_a_tiers_link_is_among_what_may_change():
    rack = Tier(name="rack", workers=4, latency_seconds=1e-5, bytes_per_second=1e7)
    asked = question(cluster=replace(made.cluster(2, hosts=4), tiers=(rack,)))
    found = explained(asked, search(asked))
    assert "bandwidth of rack x" in " ".join(one.words for one in found.needed)
    assert "waiting" not in replace(found, other_seconds=-1e-12).lines[0], "what sums are off by"


def test_where_nothing_helps_that_is_said():
    ranking = search(question(cluster=made.cluster(1)))
    found = explained(question(cluster=made.cluster(1)), ranking)
    again = next(one for one in found.needed if one.plan == "recompute=full")
    assert again.words == "no bandwidth, speed or batch within 100 times makes it win"


def test_a_plan_short_of_memory_names_what_it_lacks():
    # Where blocks need not run forward again the step is shorter.
    asked = question(cluster=made.cluster(4, memory_bytes=9_000_000))
    ranking = search(asked)
    one = next(one for one in explained(asked, ranking).needed if one.key == "memory")
    assert one.words.endswith("more memory for each worker")
    roomy = changed(asked, [Change("memory", 2.0, factor=True)])
    assert search(roomy).entry(one.plan).price.step_seconds < ranking.best.step_seconds


def test_changes_are_read_and_all_that_is_wrong_with_them_is_told():
    cluster = made.cluster(4, hosts=2)
    assert parse("inter_node=10Gbit,workers=64,memory=80GiB,flops=300T,batch=x2", cluster) == (
        Change("inter", 1.25e9),
        Change("workers", 64),
        Change("memory", 80 * 2**30),
        Change("flops", 3e14),
        Change("batch", 2.0, factor=True),
    )
    assert parse("intra=25GB/s", cluster)[0].value == 25e9
    with pytest.raises(PlanError) as caught:
        parse("intre=1Gbit,workers=many,memory=-1,batch,flops=0,workers=3,workers=4", cluster)
    assert len(caught.value.broken) == 6
    assert "intre cannot be changed; did you mean" in caught.value.broken[0]
    assert "workers is given twice" in caught.value.broken[-1]


def test_what_if_ranks_again_with_other_figures():
    ranking = finished(search(question(cluster=made.cluster(2, hosts=2))))
    wider = what_if(ranking, "workers=8")
    assert wider.best.plan.workers == 8
    assert wider.explanation is not None
    slower = what_if(ranking, "flops=x0.5")
    assert slower.best.seconds["compute"] > 1.9 * ranking.best.seconds["compute"]
    same = what_if(ranking, "inter=x1")
    assert [str(one.plan) for one in same.ranked] == [str(one.plan) for one in ranking.ranked]
    assert [one.price.step_seconds for one in same.ranked] == [one.price.step_seconds for one in ranking.ranked]


def test_a_price_per_hour_gives_the_cost_of_a_step_and_of_a_target():
    cluster = made.cluster(4)
    device = replace(cluster.hosts[0].device, price_per_hour=3.0)
    priced = replace(cluster, hosts=(replace(cluster.hosts[0], device=device),), currency="USD")
    ranking = finished(search(question(cluster=priced)), target_samples=100)
    text, step = str(ranking.best.plan), ranking.best.step_seconds
    assert ranking.best.plan.workers == 4
    assert ranking.costs.per_hour[text] == 12.0
    assert ranking.costs.per_step[text] == pytest.approx(12.0 * step / 3600)
    assert ranking.costs.to_target[text] == pytest.approx(4 * 12.0 * step / 3600), "100 samples are 4 steps of 32"
    assert json.loads(json.dumps(ranking.to_dict()))["costs"]["currency"] == "USD"
    assert finished(search(question())).costs is None


def test_a_model_too_large_for_all_says_how_many_workers_would_do():
    ranking = finished(search(question(batch=64, cluster=made.cluster(2, memory_bytes=6_000_000))))
    assert not ranking.ranked
    assert ranking.workers_needed is not None
    with pytest.raises(PlanError, match=f"{ranking.workers_needed} workers of this kind would do"):
        _ = ranking.best
    assert what_if(ranking, f"workers={ranking.workers_needed}").ranked
    assert not what_if(ranking, f"workers={ranking.workers_needed // 2}").ranked


def test_strategies_are_swept_over_workers_and_bandwidth():
    ranking = search(question(cluster=made.cluster(2, hosts=2)))
    workers, bandwidth = sweeps(ranking)
    assert workers["x"] == [1, 2, 4]
    lines = workers["lines"]
    assert lines["replicas"]["seconds"][0] is None, "one worker has no replicas"
    at = bandwidth["x"].index(bandwidth["at"])
    lowest = min(line["seconds"][at] for line in bandwidth["lines"].values() if line["seconds"][at] is not None)
    assert lowest == pytest.approx(ranking.best.step_seconds, rel=0.011)
    assert (workers["key"], bandwidth["key"]) == ("workers", "inter")
    assert strategy(Plan.parse("dp=2,pp=2,zero=1")) == "replicas with ZeRO + pipeline"


def test_every_link_is_swept_where_the_cluster_has_tiers(monkeypatch):
    monkeypatch.setattr(verdicts, "FACTORS", (0.1, 1.0))

    def tier(name, workers, rate):
        return Tier(name=name, workers=workers, latency_seconds=1e-4, bytes_per_second=rate)

    cluster = replace(made.cluster(4, hosts=2), tiers=(tier("rack", 8, 8e8), tier("socket", 2, 2e9)))
    asked = question(cluster=cluster, facts={4: made.facts(2)})
    found = {one["key"]: one for one in sweeps(search(asked))}
    assert list(found) == ["workers", "socket", "intra", "rack", "inter"]
    assert found["rack"]["figure"] == "bandwidth of rack, GB/s"
    at = {key: one["at"] for key, one in found.items() if key != "workers"}
    assert at == {"intra": 1e9, "socket": 2e9, "rack": 8e8, "inter": 1e8}
    slower, as_is = found["rack"]["lines"]["replicas"]["seconds"]
    assert slower > as_is, "replicas in a whole rack wait for its link"
