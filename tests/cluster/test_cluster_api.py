import pytest
from cluster_cases import measured

from sheaf.api import measure as api
from sheaf.cluster import read
from sheaf.errors import ClusterError


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The numbers of workers that were measured; nothing is started."""
    seen = []

    def run(function, workers, *, threads, timeout_s):
        seen.append((workers, function.keywords["seconds_budget"]))
        return [measured(rank, "a") | {"threads": threads} for rank in range(workers)]

    monkeypatch.setenv("SHEAF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(api.launch, "run", run)
    return seen


def test_what_was_measured_is_kept_until_asked_afresh(runs, tmp_path):
    cluster = api.measure(2, out=tmp_path / "mine.toml")
    assert cluster == api.measure(2) == read(tmp_path / "mine.toml")
    assert len(runs) == 1
    api.measure(3)
    api.measure(2, fresh=True)
    assert [workers for workers, _ in runs] == [2, 3, 2]


def test_a_quick_measurement_takes_a_full_one_but_never_replaces_it(runs):
    api.measure(2, quick=True)
    api.measure(2, quick=True)
    assert len(runs) == 1
    api.measure(2)
    assert len(runs) == 2
    assert runs[0][1] < runs[1][1]
    api.measure(2, quick=True)
    assert len(runs) == 2


def test_a_spoilt_cache_is_measured_again(runs):
    api.measure(2)
    api.cache_file(2, quick=False).write_text("half a fi")
    assert api.measure(2).workers == 2
    assert len(runs) == 2


def test_no_workers_are_refused(runs):
    with pytest.raises(ClusterError, match="at least one worker"):
        api.measure(0)
    assert not runs


@pytest.mark.whole
def test_this_machine_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("SHEAF_CACHE", str(tmp_path))
    cluster = api.measure(2, quick=True)
    assert cluster.workers == 2
    assert {timing.workers for timing in cluster.intra.timings} == {2}
    assert cluster.hosts[0].device.flops_per_second["fp32"] > 1e8
    assert cluster.hosts[0].device.threads >= 1
