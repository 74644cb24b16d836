"""Measure this machine's workers and links, or take what was measured before."""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sheaf import launch
from sheaf.checkpoint.together import is_first
from sheaf.cluster import Cluster, assemble, available_cores, from_everyone, measure_rank, read, write
from sheaf.cluster.machine import host_name, processor_name
from sheaf.errors import ClusterError

_QUICK_SIZES_BYTES = (2**10, 2**16, 2**20, 2**23)
_SECONDS_BUDGET, _QUICK_SECONDS_BUDGET = 14.0, 3.5
_FORMAT = 1  # raise it when what is measured changes: older files are then measured again


def measure(
    workers: int | None = None, *, out: Path | None = None, quick: bool = False, fresh: bool = False
) -> Cluster:
    """This machine as a cluster of ``workers`` workers (default: its accelerators, or its cores), measured.

    What was measured before for the same machine, number of workers and torch is taken from the cache
    (``$SHEAF_CACHE/clusters``, or ``~/.cache/sheaf/clusters``) unless ``fresh``. ``quick`` measures fewer and smaller
    messages, in about a third of the time, and takes a full measurement where there is one. ``out`` writes the
    cluster file there as well. Raises ClusterError, and WorkerFailed when a worker cannot be started.
    """
    workers = default_workers() if workers is None else workers
    if workers < 1:
        raise ClusterError(f"workers={workers}: at least one worker is needed")
    cluster = None if fresh else _cached(workers, quick=quick)
    if cluster is None:
        path = cache_file(workers, quick=quick)
        write(_measured(workers, quick=quick), path)
        cluster = read(path)  # as every later call will find it, rounded
    if out is not None:
        write(cluster, out)
    return cluster


def cache_file(workers: int, *, quick: bool) -> Path:
    """Where the measurement of this machine with so many workers is kept."""
    folder = Path(os.environ.get("SHEAF_CACHE") or Path.home() / ".cache" / "sheaf") / "clusters"
    accelerators = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    known = [_FORMAT, host_name(), processor_name(), available_cores(), accelerators, workers, torch.__version__]
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]
    machine = re.sub(r"[^A-Za-z0-9.-]+", "-", host_name())
    return folder / f"{machine}-{workers}-{digest}{'-quick' if quick else ''}.toml"


def kept_file(workers: int) -> Path:
    """Where the measurement is kept that ``measure`` with ``quick`` gives: the full one where there is one."""
    full = cache_file(workers, quick=False)
    return full if _cached(workers, quick=False) is not None else cache_file(workers, quick=True)


def _cached(workers: int, *, quick: bool) -> Cluster | None:
    for also_quick in (False, True) if quick else (False,):
        path = cache_file(workers, quick=also_quick)
        if path.is_file():
            try:
                return read(path)
            except ClusterError:  # cut short, or written by another version: it is measured again
                continue
    return None


def _measured(workers: int, *, quick: bool) -> Cluster:
    threads = max(1, available_cores() // workers)
    results = launch.run(_rank_measuring(quick=quick), workers, threads=threads, timeout_s=300.0)
    return assemble(results, name=host_name())


def measure_here(*, out: Path | None = None, quick: bool = False) -> Cluster:
    """The workers that are here already, on one machine or several, as a cluster: the same on all of them (collective).

    Hosts are told apart by their names. Nothing is kept; the first worker writes ``out``. Raises ClusterError when
    nothing could be measured, or written.
    """
    results = from_everyone(_rank_measuring(quick=quick)())
    names = list(dict.fromkeys(result["host"] for result in results))
    cluster = assemble(results, name=names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more")
    if out is not None and is_first():
        write(cluster, out)
    return cluster


def _rank_measuring(*, quick: bool) -> Callable[[], dict[str, Any]]:
    if quick:
        return functools.partial(measure_rank, sizes_bytes=_QUICK_SIZES_BYTES, seconds_budget=_QUICK_SECONDS_BUDGET)
    return functools.partial(measure_rank, seconds_budget=_SECONDS_BUDGET)


def default_workers() -> int:
    """As many as this machine has accelerators, or else cores."""
    accelerators = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    return accelerators or available_cores()
