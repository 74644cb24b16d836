"""A part of a core for each worker, where there are fewer cores than workers: control groups of Linux, made by root.

Workers that merely share cores hide each other's waiting: one computes while another has nothing to do. With a quota
each is a slower core of its own, and a pipeline's bubbles are what they are on as many cores as it has workers.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PERIOD_US = 5000
ROOTS = (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup"))  # of the first version, of the second


@contextmanager
def quota(cores: float) -> Iterator[bool]:
    """Let this process, all its threads together, compute ``cores`` of the time; False where that cannot be done."""
    group = _group(cores) if cores < 1 else None
    if group is None:
        yield False
        return
    try:
        yield True
    finally:
        (group.parent / "cgroup.procs").write_text(str(os.getpid()))
        with suppress(OSError):
            group.rmdir()


def _group(cores: float) -> Path | None:
    """A group that this process alone is in."""
    for root in ROOTS:
        old, new = root / "cpu.cfs_quota_us", root / "cgroup.controllers"
        group = root / f"sheaf-bench-{os.getpid()}"
        if not old.exists() and not new.exists():
            continue
        try:
            group.mkdir()
            if old.exists():
                (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (group / "cpu.cfs_quota_us").write_text(str(round(PERIOD_US * cores)))
            else:
                (group / "cpu.max").write_text(f"{round(PERIOD_US * cores)} {PERIOD_US}")
            (group / "cgroup.procs").write_text(str(os.getpid()))
        except OSError:
            with suppress(OSError):
                group.rmdir()
            continue
        return group
    return None
