"""Times measured on this machine's workers, all at once as they would train, and kept on disk."""

import statistics
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from sheaf import launch
from sheaf.cluster.machine import available_cores
from sheaf.graph import BlockTime, ModelFacts, Profile, cache, profile
from sheaf.launch import FromFile
from sheaf.task import Task

BUDGET_SECONDS = 6.0  # for all sizes measured with one number of workers
LEAST_SECONDS = 1.5  # for one size
TIMEOUT_SECONDS = 600.0


def measured_profiles(
    task: Task, facts: Sequence[ModelFacts], workers: int, *, source: FromFile | None = None, fresh: bool = False
) -> list[Profile]:
    """One profile for each of ``facts``, while ``workers`` workers of this machine measure at the same time.

    Each worker has its share of the cores; times are the median over workers. Kept beside ``sheaf.graph``'s own
    profiles, by the same key; ``fresh`` measures again.
    """
    threads = max(1, available_cores() // workers)
    known = {} if fresh else {one.samples: cache._read(_path(task, one, workers, threads), one) for one in facts}
    missing = [one for one in facts if known.get(one.samples) is None]
    if missing:
        budget_seconds = max(LEAST_SECONDS, BUDGET_SECONDS / len(missing))
        given = task if source is None else source
        rows = launch.run(
            measure_together,
            workers,
            given,
            missing,
            threads,
            budget_seconds,
            threads=threads,
            timeout_s=TIMEOUT_SECONDS,
        )
        for index, one in enumerate(missing):
            combined = median([row[index] for row in rows])
            with suppress(OSError):  # a folder that cannot be written to is done without
                cache._write(_path(task, one, workers, threads), combined)
            known[one.samples] = combined
    return [found for one in facts if (found := known[one.samples]) is not None]


def measure_together(
    given: Task | FromFile, facts: list[ModelFacts], threads: int, budget_seconds: float
) -> list[Profile]:
    """This worker's profiles; the workers wait for each other, so that all measure the same thing at once."""
    launch.join()
    found = given if isinstance(given, Task) else given.load()
    task = found if isinstance(found, Task) else found()
    workers = dist.get_world_size() if dist.is_initialized() else 1
    return [
        profile(
            task,
            one,
            threads=threads,
            concurrency=workers,
            together=_barrier if workers > 1 else None,
            budget_seconds=budget_seconds,
        )
        for one in facts
    ]


def median(profiles: Sequence[Profile]) -> Profile:
    """One profile from those of several workers that measured the same thing at once."""
    first = profiles[0]
    return Profile(
        samples=first.samples,
        concurrency=first.concurrency,
        threads=first.threads,
        precision=first.precision,
        blocks={
            name: BlockTime(
                statistics.median(one.blocks[name].forward_seconds for one in profiles),
                statistics.median(one.blocks[name].backward_seconds for one in profiles),
            )
            for name in first.blocks
        },
        optimizer_seconds_per_byte=statistics.median(one.optimizer_seconds_per_byte for one in profiles),
        optimizer_state_bytes_per_byte=first.optimizer_state_bytes_per_byte,
        fetch_seconds=statistics.median(one.fetch_seconds for one in profiles),
        host_seconds=statistics.median(one.host_seconds for one in profiles),
    )


def _barrier() -> None:
    dist.barrier()


def _path(task: Task, facts: ModelFacts, workers: int, threads: int) -> Path:
    name = cache.cache_key(task, facts, threads=threads, concurrency=workers)
    return cache.cache_folder() / f"{name}-together.json"
