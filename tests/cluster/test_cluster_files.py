import dataclasses
import tomllib

import pytest
from cluster_cases import built, clusters
from hypothesis import HealthCheck, given, settings

from sheaf.cluster import known, read, write
from sheaf.cluster.cluster import Tier
from sheaf.errors import ClusterError

GOOD = """
name = "two boxes"
backend = "gloo"
[intra]
name = "loopback"
latency_seconds = 60e-6
bytes_per_second = 2_000_000_000
[[hosts]]
name = "box"
count = 1
workers = 2
cores = 2
memory_bytes = 8e9
[hosts.device]
name = "a processor"
kind = "cpu"
memory_bytes_per_second = 1e10
memory_bytes = 8_000_000_000
flops_per_second = {fp32 = 50e9}
"""


def problems_of(text, tmp_path, **arguments):
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    with pytest.raises(ClusterError) as caught:
        read(path, **arguments)
    return [problem.removeprefix(f"{path}: ") for problem in caught.value.broken]


def sound(cluster):
    """The drawn cluster with figures that go together."""
    kind = {"gloo": "cpu", "nccl": "cuda"}[cluster.backend]
    hosts = tuple(
        dataclasses.replace(
            host,
            memory_bytes=max(host.memory_bytes, host.device.memory_bytes),
            device=dataclasses.replace(
                host.device, kind=kind, flops_per_second={"fp32": 1e9, **host.device.flops_per_second}
            ),
        )
        for host in cluster.hosts
    )
    return dataclasses.replace(cluster, hosts=hosts)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(description=clusters)
def test_a_written_cluster_reads_back_equal(tmp_path, description):
    cluster = sound(built(description))
    write(cluster, tmp_path / "cluster.toml")
    assert read(tmp_path / "cluster.toml") == cluster


def test_overlap_may_be_below_zero_as_it_is_measured_on_busy_cores(tmp_path):
    cluster = dataclasses.replace(read("a100-dgx"), overlap=-0.33)
    write(cluster, tmp_path / "cluster.toml")
    assert read(tmp_path / "cluster.toml") == cluster


def test_lists_of_numbers_take_one_line(tmp_path):
    write(read("a100-dgx"), tmp_path / "folder" / "cluster.toml")
    text = (tmp_path / "folder" / "cluster.toml").read_text()
    assert "size_bytes = [1048576, 2097152," in text
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("name", known())
def test_known_clusters_are_sound_and_say_where_from(name):
    cluster = read(name, hosts=128)
    assert cluster.name == name
    assert cluster.hosts[0].count == 128
    assert cluster == read(f"{name}:128")
    assert all(part.source for part in (cluster, cluster.intra, cluster.inter, cluster.hosts[0].device))
    assert set(cluster.hosts[0].device.flops_per_second) >= {"fp64", "fp32", "bf16", "fp16"}
    assert cluster.intra.bytes_per_second > cluster.inter.bytes_per_second


def test_known_rates_are_the_reached_ones_not_the_peaks():
    assert read("a100-dgx").hosts[0].device.flops_per_second["bf16"] == 271.2e12
    assert {"a100-dgx", "cpu-10gbit", "cpu-1gbit", "h100-dgx", "h200-dgx"} <= set(known())


def test_numbers_may_be_whole_or_not(tmp_path):
    (tmp_path / "good.toml").write_text(GOOD)
    cluster = read(tmp_path / "good.toml")
    assert cluster.hosts[0].memory_bytes == 8_000_000_000
    assert isinstance(cluster.hosts[0].memory_bytes, int)
    assert isinstance(cluster.intra.bytes_per_second, float)
    assert cluster.workers == 2


def test_every_problem_is_listed_at_once(tmp_path):
    text = (
        GOOD.replace(
            'backend = "gloo"', 'backend = "glo"\noverlap = 1.5\ncontentoin = {}\ncontention = {2 = 0, 4 = 1.5}'
        )
        .replace("latency_seconds = 60e-6", "latency_seconds = -1")
        .replace("bytes_per_second = 2_000_000_000", 'bytes_per_second = "2 GB/s"')
        .replace("count = 1\n", "")
        .replace("cores = 2", "cores = 2.5")
        .replace("fp32 = 50e9", "fp23 = 50e9, bf16 = 0, fp16 = inf")
    )
    problems = problems_of(text, tmp_path)
    expected = [
        "backend: found 'glo'; did you mean gloo?",
        "overlap: found 1.5, wanted a share from -2.0 to 1.0",
        "contentoin is not a known key; did you mean contention?",
        "contention.2: found 0.0, wanted a share above 0, up to 1",
        "contention.4: found 1.5, wanted a share above 0, up to 1",
        "intra.latency_seconds: found -1, wanted a number that is not negative",
        "intra.bytes_per_second: found '2 GB/s', wanted a number",
        "hosts[0].cores: found 2.5, wanted a whole number",
        "hosts[0].device.flops_per_second.bf16: found 0.0, wanted a number above zero",
        "hosts[0].device.flops_per_second.fp16: found inf, wanted a finite number",
        "hosts[0].count is missing: add it",
    ]
    assert set(expected) <= set(problems)
    assert len(problems) == len(expected) + 1  # and fp23, with what is near it
    assert any("fp23" in problem for problem in problems)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name = ", "is not TOML"),
        ("", "hosts is missing: add it"),
        (GOOD.replace("[[hosts]]", "[hosts]"), "hosts: found a table, wanted a list"),
        (GOOD.replace("flops_per_second = {fp32 = 50e9}", "flops_per_second = 1e9"), "wanted a table"),
        (GOOD + "thread_speedup = {two = 1.9}", "found 'two' as a key, wanted a whole number"),
        (GOOD.replace('"cpu"', '"cup"'), "known: cpu, cuda, xla"),
        (GOOD.replace('"two boxes"', "2"), "name: found 2, wanted text"),
        (GOOD.replace("workers = 2", "workers = true"), "found True, wanted a number"),
        (GOOD.replace("count = 1", "count = 2"), "inter is missing"),
        (GOOD.replace("[[hosts]]", "timings = 3\n[[hosts]]"), "intra.timings: wanted a list"),
        (
            GOOD.replace(
                "[[hosts]]",
                "timings = [{operation = 'allreduce', workers = 2, size_bytes = [1, 2], seconds = [0.1]}]\n[[hosts]]",
            ),
            "did you mean all_reduce?",
        ),
        ("hosts = []\nname = 'x'\nbackend = 'gloo'\n" + GOOD[GOOD.index("[intra]") : GOOD.index("[[hosts]]")], "empty"),
        ("intra = 3\nhosts = 3", "intra: found 3, wanted a table of name"),
    ],
)
def test_a_bad_file_is_told_in_words(text, told, tmp_path):
    assert any(told in problem for problem in problems_of(text, tmp_path))


def test_a_file_that_is_no_text_or_a_name_that_is_not_known(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ClusterError, match="cannot read"):
        read(tmp_path / "bytes")
    with pytest.raises(ClusterError, match="did you mean h100-dgx"):
        read("h100-dxg")
    with pytest.raises(ClusterError, match="neither a file nor a known cluster"):
        read(tmp_path)
    with pytest.raises(ClusterError, match="wanted how many hosts"):
        read("h100-dgx:many")
    with pytest.raises(ClusterError, match="at least one host"):
        read("h100-dgx", hosts=0)
    with pytest.raises(ClusterError, match="cannot write"):
        write(read("h100-dgx"), tmp_path / "bytes" / "below.toml")


def test_the_number_of_hosts_cannot_be_set_for_several_kinds(tmp_path):
    cluster = read("cpu-1gbit")
    write(dataclasses.replace(cluster, hosts=cluster.hosts * 2), tmp_path / "two.toml")
    assert len(tomllib.loads((tmp_path / "two.toml").read_text())["hosts"]) == 2
    with pytest.raises(ClusterError, match="2 kinds"):
        read(tmp_path / "two.toml", hosts=3)


TIER = """
[[tiers]]
name = "{name}"
workers = {workers}
latency_seconds = 1e-6
bytes_per_second = 1e9
"""


def test_fields_that_contradict_each_other_are_told_together(tmp_path):
    text = (
        GOOD.replace('backend = "gloo"', 'backend = "nccl"')
        .replace("memory_bytes = 8e9", "memory_bytes = 4e9")
        .replace("flops_per_second = {fp32 = 50e9}", "flops_per_second = {}\nprice_per_hour = 2.5")
        .replace("workers = 2", "workers = 4")
        .replace("count = 1", "count = 2")
    )
    text += (
        TIER.format(name="rack", workers=6) + TIER.format(name="rack", workers=8) + TIER.format(name="inter", workers=2)
    )
    problems = problems_of(text, tmp_path)
    wanted = [
        "inter is missing",
        "flops_per_second is empty",
        "which CPU workers share",
        "backend nccl is for cuda, hosts[0].device.kind is cpu",
        "currency is not",
        "two tiers are called 'rack'",
        "a tier is called 'inter'",
        "tiers[0].workers: 6 is no part of a host of 4 workers",
    ]
    assert [any(one in problem for problem in problems) for one in wanted] == [True] * len(wanted)
    assert len(problems) == len(wanted)


def test_prices_below_zero_and_for_some_devices_only_are_told(tmp_path):
    assert "hosts[0].device.price_per_hour: found -1, wanted a number that is not negative" in problems_of(
        GOOD + "price_per_hour = -1", tmp_path
    )
    other = GOOD[GOOD.index("[[hosts]]") :]
    assert any(
        "for some hosts' devices" in problem
        for problem in problems_of('currency = "USD"' + GOOD + "price_per_hour = 1\n" + other, tmp_path)
    )


def test_a_device_may_be_named_and_a_name_that_is_not_known_has_its_nearest_told(tmp_path):
    start = GOOD.index("[hosts.device]")
    text = GOOD[:start].replace("gloo", "nccl")
    (tmp_path / "named.toml").write_text(text + 'device = "A100-SXM4-80GB"')
    assert read(tmp_path / "named.toml").hosts[0].device == read("a100-dgx").hosts[0].device
    problems = problems_of(text.replace("count = 1", "count = 0") + 'device = "A100-SMX4-80GB"', tmp_path)
    assert "hosts[0].device: 'A100-SMX4-80GB' is not known; did you mean A100-SXM4-80GB?" in problems
    assert any("hosts[0].count" in problem for problem in problems)


def test_tiers_and_prices_are_written_and_read_back(tmp_path):
    cluster = read("a100-dgx", hosts=4)
    host = dataclasses.replace(
        cluster.hosts[0], device=dataclasses.replace(cluster.hosts[0].device, price_per_hour=1.5)
    )
    tiers = (Tier(name="socket", workers=4, latency_seconds=1e-6, bytes_per_second=3e11),)
    priced = dataclasses.replace(cluster, hosts=(host,), tiers=tiers, currency="USD")
    write(priced, tmp_path / "cluster.toml")
    assert read(tmp_path / "cluster.toml") == priced
