"""What workers free stays theirs."""

import os
import sys
from pathlib import Path

import pytest

from sheaf import launch

EACH = 30 * 2**20  # bytes: less than what comes from the system by itself


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone is told so")
def test_memory_that_is_freed_is_not_given_back(monkeypatch):
    for name in ("LD_PRELOAD", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)

    def kept():
        import torch

        def resident():
            return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

        before = resident()
        held = [torch.ones(EACH // 4) for _ in range(3)]
        there = resident() - before
        held.clear()
        return there, resident() - before

    ((there, after),) = launch.run(kept, 1)
    assert there > 2.5 * EACH
    assert after > 2 * EACH
