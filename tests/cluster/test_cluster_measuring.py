import json
import time

import pytest
import torch
import torch.distributed as dist

from sheaf.cluster import assemble, collective_seconds, measure_rank
from sheaf.cluster.collectives import timed_collectives, within
from sheaf.cluster.measuring import counts_up_to


def measured():
    return measure_rank(sizes_bytes=(1024, 65536), seconds_budget=0.5)


def test_three_ranks_measure_themselves_and_their_links(ranks):
    results = ranks(measured, world=3, timeout_s=250)  # the machine may be busy
    assert json.loads(json.dumps(results)) == results
    assert [result["rank"] for result in results] == [0, 1, 2]
    assert not any(result["timings"] for result in results[1:])
    cluster = assemble(results, name="here")
    assert (cluster.workers, cluster.backend, cluster.inter) == (3, "gloo", None)
    assert set(cluster.contention) == {1, 2, 3}
    assert all(rate > 1e6 for rate in cluster.hosts[0].device.flops_per_second.values())
    assert {timing.workers for timing in cluster.intra.timings} == {2, 3}
    assert {timing.operation for timing in cluster.intra.timings} == {
        "all_reduce",
        "reduce_scatter",
        "all_gather",
        "broadcast",
        "barrier",
    }
    assert collective_seconds(cluster.intra, "all_reduce", 2, 4096) > 0


def test_one_process_measures_itself_without_a_group():
    cluster = assemble([measure_rank(seconds_budget=0.1)], name="alone")
    assert cluster.workers == 1
    assert cluster.hosts[0].memory_bytes > 0


def test_the_measured_threads_are_given_back():
    before = torch.get_num_threads()
    measure_rank(seconds_budget=0.1)
    assert torch.get_num_threads() == before


def test_a_slow_rank_is_in_the_time(ranks):
    def slow_all_reduce():
        plain = dist.all_reduce

        def slow(tensor, *args, **kwargs):
            if tensor.numel() == 256 and dist.get_rank() == 1:
                time.sleep(0.02)
            return plain(tensor, *args, **kwargs)

        dist.all_reduce = slow
        try:
            found = timed_collectives(dist.group.WORLD, torch.device("cpu"), (1024,), 0.2)
        finally:
            dist.all_reduce = plain
        return {operation: seconds for operation, _, seconds in found}

    for found in ranks(slow_all_reduce, world=2):
        assert found["all_reduce"] >= 0.02


def test_what_the_budget_cannot_hold_is_left_out(ranks):
    def tiny_budget():
        return timed_collectives(dist.group.WORLD, torch.device("cpu"), (1024, 2**26), 0.01)

    first, second = ranks(tiny_budget, world=2)
    assert first == second
    assert {size for _, size, _ in first} == {0, 1024}


def test_overlap_is_measured_on_what_the_link_carries_in_time(ranks):
    def chosen():
        return [within(dist.group.WORLD, torch.device("cpu"), seconds, most_bytes=2**18) for seconds in (1e-9, 1e9)]

    assert ranks(chosen, world=2) == [[2**16, 2**18]] * 2


@pytest.mark.parametrize(
    ("workers", "counts"), [(1, []), (2, [2]), (16, [2, 3, 4, 5, 6, 7, 8, 16]), (9, [*range(2, 10)])]
)
def test_counts(workers, counts):
    assert counts_up_to(workers) == counts


def test_everyone_hears_what_everyone_gives(ranks):
    def given():
        import torch.distributed as dist

        from sheaf.cluster import from_everyone

        return from_everyone({"rank": dist.get_rank(), "text": "ü" * 300 * dist.get_rank(), "none": None})

    found = ranks(given, 3)
    assert found == [[{"rank": rank, "text": "ü" * 300 * rank, "none": None} for rank in range(3)]] * 3
