import pytest

from sheaf.cluster import available_cores, describe_local, free_memory_bytes, read, write
from sheaf.cluster.machine import cgroup_cores, cgroup_free_bytes, host_name, processor_name
from sheaf.errors import ClusterError


def tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_machine_is_described_without_measuring(tmp_path):
    cluster = describe_local(4)
    assert cluster.workers == 4
    host = cluster.hosts[0]
    assert (host.name, host.device.name) == (host_name(), processor_name())
    assert host.cores == available_cores() >= 1
    assert host.memory_bytes > 0
    assert "not measured" in cluster.source
    write(cluster, tmp_path / "here.toml")
    assert read(tmp_path / "here.toml") == cluster


def test_workers_beyond_the_cores_share_them():
    cores = available_cores()
    cluster = describe_local(4 * cores)
    if cluster.backend == "gloo":
        assert cluster.contention[cores] == 1.0
        assert cluster.contention[4 * cores] == 0.25
        assert cluster.hosts[0].device.threads == 1


def test_no_workers_are_refused():
    with pytest.raises(ClusterError, match="at least one"):
        describe_local(0)


def test_cpu_workers_share_the_hosts_memory_and_accelerators_have_their_own():
    host = describe_local(4).hosts[0]
    if host.device.kind == "cpu":
        assert host.memory_per_worker() == host.memory_bytes // 4
        assert host.memory_per_worker(1) == host.memory_bytes
        assert host.memory_per_worker(9) == host.memory_bytes // 4  # no more than the host has
    gpu = read("a100-dgx").hosts[0]
    assert gpu.memory_per_worker() == gpu.memory_per_worker(1) == gpu.device.memory_bytes


def test_limits_of_control_groups_version_2(tmp_path):
    group = "sys/fs/cgroup/box/run"
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/box/run\n",
            f"{group}/memory.max": "max\n",
            f"{group}/memory.current": "100\n",
            "sys/fs/cgroup/box/memory.max": "1000\n",
            "sys/fs/cgroup/box/memory.current": "700\n",
            "sys/fs/cgroup/box/memory.stat": "anon 500\ninactive_file 200\n",
            f"{group}/cpu.max": "max 100000\n",
            "sys/fs/cgroup/box/cpu.max": "150000 100000\n",
        },
    )
    assert cgroup_free_bytes(root) == 500  # the parent binds, and 200 can be dropped
    assert cgroup_cores(root) == 1.5


def test_limits_of_control_groups_version_1(tmp_path):
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/box\n1:cpu,cpuacct:/\n0::/\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "1000",
            "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "400",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "4000",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
    )
    assert cgroup_free_bytes(root) == 600
    assert cgroup_cores(root) is None


def test_no_control_group_means_no_limit(tmp_path):
    assert cgroup_free_bytes(tmp_path) is None
    assert cgroup_cores(tmp_path) is None
    assert free_memory_bytes() > 0
