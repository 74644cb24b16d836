import json

import pytest
from cluster_cases import measured

from sheaf.cluster import assemble, read, write
from sheaf.errors import ClusterError


def timing(tier, workers, size_bytes, seconds, operation="all_reduce"):
    return {
        "tier": tier,
        "operation": operation,
        "workers": workers,
        "size_bytes": size_bytes,
        "seconds": seconds,
    }


def test_workers_of_one_name_are_one_host_and_equal_hosts_one_entry(tmp_path):
    timings = [timing("intra", 2, 1024, 2e-4), timing("intra", 2, 2**20, 2e-3), timing("inter", 4, 2**20, 2e-2)]
    results = [measured(3, "b"), measured(0, "a", timings=timings), measured(1, "a"), measured(2, "b", rate=0.97e10)]
    cluster = assemble(json.loads(json.dumps(results)), name="ours")
    assert cluster.workers == 4
    (host,) = cluster.hosts
    assert (host.count, host.workers, host.speed) == (2, 2, 1.0)
    assert [timing.workers for timing in cluster.intra.timings] == [2, 2]
    assert cluster.intra.latency_seconds == 1e-4  # half of the smallest all-reduce between two
    assert cluster.intra.bytes_per_second == pytest.approx(2**20 / 1.8e-3, rel=1e-3)
    assert cluster.inter is not None
    assert cluster.inter.timings[0].workers == 4
    assert cluster.overlap == 0.5
    write(cluster, tmp_path / "ours.toml")
    assert read(tmp_path / "ours.toml") == cluster


def test_a_slower_host_is_its_own_entry():
    cluster = assemble([measured(0, "fast"), measured(1, "slow", rate=0.4e10)], name="uneven")
    fast, slow = cluster.hosts
    assert (fast.name, slow.name) == ("fast", "slow")
    assert slow.speed / fast.speed == pytest.approx(0.4, rel=1e-3)
    assert fast.device == slow.device


def test_hosts_keep_the_order_of_their_ranks_whatever_their_speed():
    rates = (0.5e10, 1e10, 0.97e10, 0.5e10)
    cluster = assemble([measured(rank, f"h{rank}", rate=rate) for rank, rate in enumerate(rates)], name="uneven")
    assert [(host.name, host.count) for host in cluster.hosts] == [("h0", 1), ("h1", 2), ("h3", 1)]
    slow, fast, last = (host.speed for host in cluster.hosts)
    assert slow == last
    assert slow / fast == pytest.approx(0.5 / 0.985, rel=1e-3)


def test_contention_is_the_share_of_the_lone_rate_and_never_rises():
    results = [
        measured(0, "a", busy={"1": 1e10, "2": 0.9e10, "3": 0.95e10}),
        measured(1, "a", busy={"2": 0.7e10, "3": 0.95e10}),
        measured(2, "a", busy={"3": 0.5e10}),
    ]
    assert assemble(results, name="x").contention == {1: 1.0, 2: 0.8, 3: 0.8}


def test_a_lone_worker_has_a_link_it_does_not_use():
    cluster = assemble([measured(0, "a") | {"overlap": None}], name="alone")
    assert cluster.inter is None
    assert "not measured" in cluster.intra.source
    assert cluster.overlap == 0.0


def test_no_results_are_refused():
    with pytest.raises(ClusterError, match="no measurements"):
        assemble([], name="x")


def test_a_busy_machine_is_told_of():
    assert "busy" not in assemble([measured(0, "a")], name="x").source
    assert "1.7 cores busy" in assemble([measured(0, "a") | {"cores_taken": 1.7}], name="x").source
