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
