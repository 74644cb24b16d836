import pytest
from cluster_cases import built, links
from hypothesis import given, settings
from hypothesis import strategies as st

from sheaf.cluster import OPERATIONS, Link, Timing, collective_seconds, model_seconds, read
from sheaf.cluster.links import fit
from sheaf.errors import ClusterError

sizes = st.floats(0, 1e12)
PLAIN = Link(name="plain", latency_seconds=1e-4, bytes_per_second=1e8)


@settings(deadline=None)
@given(
    description=links, operation=st.sampled_from(OPERATIONS), workers=st.integers(1, 70), pair=st.tuples(sizes, sizes)
)
def test_a_larger_message_is_never_faster(description, operation, workers, pair):
    link = built(description)
    small, large = (collective_seconds(link, operation, workers, size) for size in sorted(pair))
    assert 0 <= small <= large * (1 + 1e-9)


@settings(deadline=None)
@given(operation=st.sampled_from(OPERATIONS), workers=st.integers(2, 63), size=sizes)
def test_one_more_worker_is_never_faster_by_the_model(operation, workers, size):
    fewer, more = (model_seconds(PLAIN, operation, count, size) for count in (workers, workers + 1))
    assert 0 < fewer <= more


def test_one_worker_talks_to_nobody():
    assert all(collective_seconds(PLAIN, operation, 1, 1e9) == 0 for operation in OPERATIONS)


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather():
    parts = [collective_seconds(PLAIN, operation, 4, 1e8) for operation in ("reduce_scatter", "all_gather")]
    assert collective_seconds(PLAIN, "all_reduce", 4, 1e8) == pytest.approx(sum(parts))
    assert collective_seconds(PLAIN, "all_reduce", 4, 1e8) == pytest.approx(4e-4 + 1.5)


def with_timings(*points, operation="all_reduce"):
    return Link(
        name="measured",
        latency_seconds=1e-4,
        bytes_per_second=1e8,
        timings=tuple(
            Timing(operation=operation, workers=workers, size_bytes=size, seconds=seconds)
            for workers, size, seconds in points
        ),
    )


def test_timings_win_and_are_interpolated_in_logarithms():
    link = with_timings((2, 1000, 1e-3), (2, 100_000, 1e-1))
    assert collective_seconds(link, "all_reduce", 2, 10_000) == pytest.approx(1e-2)
    assert collective_seconds(link, "all_reduce", 2, 1) == 1e-3  # below the smallest: its time
    assert collective_seconds(link, "all_reduce", 2, 200_000) == pytest.approx(0.2, rel=1e-3)  # beyond: its bandwidth
    assert collective_seconds(link, "all_gather", 2, 0) == 1e-4  # not measured: the model
    assert collective_seconds(link, "all_reduce", 3, 0) == pytest.approx(4e-4)


def test_between_two_measured_numbers_of_workers():
    link = with_timings((2, 1000, 1.0), (4, 1000, 3.0))
    assert collective_seconds(link, "all_reduce", 3, 1000) == pytest.approx(2.0)


def test_a_single_timing_is_extended_by_the_links_bandwidth():
    assert collective_seconds(with_timings((2, 0, 1.0)), "all_reduce", 2, 1e8) == pytest.approx(2.0)


def test_noise_does_not_make_a_larger_message_cheaper():
    link = with_timings((2, 1000, 2.0), (2, 2000, 1.0), (2, 4000, 3.0))
    assert collective_seconds(link, "all_reduce", 2, 2000) == 2.0


def test_a_barrier_carries_nothing():
    link = with_timings((2, 0, 0.25), operation="barrier")
    assert collective_seconds(link, "barrier", 2, 10**9) == 0.25


def test_an_unknown_collective_names_the_nearest():
    with pytest.raises(ClusterError, match="did you mean all_reduce"):
        collective_seconds(PLAIN, "allreduce", 2, 1)


@settings(deadline=None)
@given(
    latency=st.floats(1e-6, 1e-3),
    bandwidth=st.floats(1e6, 1e11),
    counts=st.sets(st.integers(2, 16), min_size=1, max_size=3),
)
def test_the_fit_finds_the_link_that_made_the_timings(latency, bandwidth, counts):
    link = Link(name="true", latency_seconds=latency, bytes_per_second=bandwidth)
    timings = tuple(
        Timing(operation=operation, workers=count, size_bytes=size, seconds=model_seconds(link, operation, count, size))
        for operation in OPERATIONS
        for count in counts
        for size in (1, 2**20, 2**25)
    )
    found_latency, found_bandwidth = fit(timings)
    assert found_latency == pytest.approx(latency, rel=0.01, abs=2 / bandwidth)
    assert found_bandwidth == pytest.approx(bandwidth, rel=0.02)


def test_the_fit_needs_a_message_and_survives_noise():
    with pytest.raises(ClusterError, match="two workers"):
        fit(())
    _, bandwidth = fit(with_timings((2, 1000, 1.0), (2, 2**20, 0.5)).timings)  # larger and faster
    assert bandwidth > 0


def test_published_figures_of_the_a100_are_met():
    link = read("a100-dgx").intra
    assert collective_seconds(link, "all_reduce", 8, 2**30) == pytest.approx(8.193e-3)
    assert model_seconds(link, "all_reduce", 8, 2**30) == pytest.approx(8.193e-3, rel=0.03)
    assert collective_seconds(link, "all_reduce", 8, 2**33) == pytest.approx(8 * 8.193e-3, rel=0.02)


def test_a_group_has_only_the_direct_links_among_its_own():
    direct = Link(name="four, each to each", latency_seconds=0.0, bytes_per_second=3e9, direct=4)
    assert [direct.among(workers) for workers in (1, 2, 3, 4, 8)] == [3e9, 1e9, 2e9, 3e9, 3e9]
    assert collective_seconds(direct, "all_reduce", 2, 1e9) == pytest.approx(1.0)
    assert PLAIN.among(2) == PLAIN.bytes_per_second
