"""A cluster file with wrong fields has its contradictions told with them, in one go."""

import pytest

from sheaf.cluster import read
from sheaf.errors import ClusterError

FILE = """
name = "mine"
backend = "gloo"
[[hosts]]
name = "a"
count = 2
workers = -8
cores = 8
memory_bytes = 1000
[hosts.device]
name = "cpu"
kind = "cpu"
flops_per_second = {fp33 = 2e12}
memory_bytes_per_second = 1e10
memory_bytes = 2000
[intra]
name = "loop"
latency_seconds = 1e-6
bytes_per_second = 1e9
"""


def test_contradictions_are_told_beside_wrong_fields(tmp_path):
    (tmp_path / "c.toml").write_text(FILE)
    with pytest.raises(ClusterError) as caught:
        read(tmp_path / "c.toml")
    told = [one.partition(": ")[2] for one in caught.value.broken]
    assert len(told) == 4
    assert any("hosts[0].workers: found -8" in one for one in told)
    assert any("did you mean fp32?" in one for one in told)
    assert any("inter is missing" in one for one in told)
    assert any("the device has 2000 bytes of memory and its host 1000" in one for one in told)


def test_what_does_not_go_together_is_told_beside_what_is_wrong(tmp_path):
    device = "flops_per_second = {fp33 = 2e12}", "flops_per_second = {fp33 = 2e12}\nprice_per_hour = 2.0"
    tiers = "".join(
        f'[[tiers]]\nname = "{name}"\nworkers = {workers}\nlatency_seconds = 1e-5\nbytes_per_second = 1e9\n'
        for name, workers in (("rack", 16), ("hall", 24), ("a=b", 16), ("alone", 1))
    )
    text = FILE.replace(*device).replace("workers = -8", "workers = 8").replace("count = 2", "count = 3000000")
    (tmp_path / "c.toml").write_text(text.replace('"gloo"', '"nccl"') + "direct = 9\n" + tiers)
    with pytest.raises(ClusterError) as caught:
        read(tmp_path / "c.toml")
    for told in (
        "did you mean fp32?",
        "hosts have 24000000 workers together, and no more than 16777216 are planned for",
        "backend nccl is for cuda, hosts[0].device.kind is cpu",
        "price_per_hour is given and currency is not",
        "intra.direct: 9 workers with links of their own to each other, and a host has 8",
        "a tier is called 'a=b': --what-if cannot speak of it",
        "tiers[3].workers: one worker has no link to itself",
        "tiers[0] and tiers[2] both hold 16 workers",
        "tiers[1].workers: 24 is no number of whole tiers[2], which hold 16",
    ):
        assert any(told in one for one in caught.value.broken), told


def test_of_a_gpu_all_kinds_of_devices_are_told(tmp_path):
    (tmp_path / "c.toml").write_text(FILE.replace('kind = "cpu"', 'kind = "gpu"'))
    with pytest.raises(ClusterError, match="found 'gpu'; known: cpu, cuda, xla"):
        read(tmp_path / "c.toml")
