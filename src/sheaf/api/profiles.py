"""Times measured on this machine's workers, all at once as they would train, and kept on disk."""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from sheaf import launch
from sheaf.api.saying import say_nothing
from sheaf.cluster import others
from sheaf.cluster.machine import available_cores
from sheaf.cluster.others import disturbed, quiet
from sheaf.errors import SheafError
from sheaf.graph import BlockTime, ModelFacts, Profile, cache, profile
from sheaf.graph.profile import accelerator
from sheaf.launch import FromFile
from sheaf.parallel import build
from sheaf.plans import Plan
from sheaf.task import Task
from sheaf.units import pretty_seconds

BUDGET_SECONDS = 6.0  # for all sizes measured with one number of workers
LEAST_SECONDS = 1.5  # for one size
TIMEOUT_SECONDS = 600.0
REAL_STEP_BYTES = 2 * 2**30  # of training state, over all workers; a larger model is measured block by block only
WARM_UP_STEPS = 2
MOST_STEPS = (3, 20)  # fewest and most real steps


def measured_profiles(
    task: Task,
    facts: Sequence[ModelFacts],
    workers: int,
    *,
    source: FromFile | None = None,
    fresh: bool = False,
    say: Callable[[str], None] = say_nothing,
) -> list[Profile]:
    """One profile for each of ``facts``, while ``workers`` workers of this machine measure at the same time.

    Each worker has its share of the cores; times are the median over workers. Kept beside ``sheaf.graph``'s own
    profiles, by the same key; ``fresh`` measures again. What was measured while other programs kept the cores busy
    (``cores_taken``) is measured again as soon as they do not: at once, or when it is asked for the next time. ``say``
    is told in a line whether it is measured now, or when it was.
    """
    what = f"the model's blocks on {workers} worker{'s' if workers > 1 else ''}"
    threads = max(1, available_cores() // workers)

    def measured(some: list[ModelFacts]) -> dict[int, Profile]:
        budget_seconds = max(LEAST_SECONDS, BUDGET_SECONDS / len(some))
        given = task if source is None else source
        rows = launch.run(
            measure_together, workers, given, some, threads, budget_seconds, threads=threads, timeout_s=TIMEOUT_SECONDS
        )
        return {one.samples: median([row[index] for row in rows]) for index, one in enumerate(some)}

    paths = {one.samples: _path(task, one, workers, threads) for one in facts}
    kept = {} if fresh else {one.samples: cache._read(paths[one.samples], one) for one in facts}
    known = {samples: one for samples, one in kept.items() if one is not None}
    if missing := [one for one in facts if one.samples not in known]:
        say(f"measuring {what}")
        known |= measured(missing)
    else:
        say(f"{what}: measured {ago(paths.values())}")
    unsure = [one for one in facts if disturbed(known[one.samples].cores_taken)]
    if unsure and quiet():
        say(f"measuring {what} again, as other programs kept the cores busy before")
        with suppress(SheafError):  # what was measured first stays
            for samples, again in measured(unsure).items():
                known[samples] = min(again, known[samples], key=lambda one: one.cores_taken)
    for samples, one in known.items():
        if one is not kept.get(samples):
            with suppress(OSError):  # a folder that cannot be written to is done without
                cache._write(paths[samples], one)
    return [known[one.samples] for one in facts]


def ago(paths: Iterable[Path]) -> str:
    """When the oldest of these files was written, and how to measure again what is in them."""
    ages = [time.time() - path.stat().st_mtime for path in paths if path.is_file()]
    return f"{pretty_seconds(max([1.0, *ages]))} ago (`sheaf plan --fresh` measures again)"


def busy_note(profiles: Iterable[Profile]) -> str:
    """What to say of times that were measured while other programs kept the cores busy; empty where none were."""
    return busy_words(max((one.cores_taken for one in profiles), default=0.0))


@dataclass
class BusyNote:
    """Says once, however much is measured, that other programs kept the cores busy while it was."""

    say: Callable[[str], None]
    told: bool = False

    def of(self, profiles: Iterable[Profile]) -> None:
        """Say it if it was so while these were measured, and nothing was said yet."""
        busy = "" if self.told else busy_note(profiles)
        if busy:
            self.told = True
            self.say(busy)


def busy_words(taken: float) -> str:
    """What to say of times that were measured while other programs took so many cores; empty where it is not many."""
    if not disturbed(taken):
        return ""
    return (
        f"other programs kept {taken:.1f} of the workers' cores busy while this was measured: the figures, and the "
        "order of plans, are those of a busy machine; plan again when it is quiet, and it is measured again"
    )


def measure_together(
    given: Task | FromFile, facts: list[ModelFacts], threads: int, budget_seconds: float
) -> list[Profile]:
    """This worker's profiles, among the workers that it joins."""
    launch.join()
    return profiles_here(loaded(given), facts, threads, budget_seconds)


def loaded(given: Task | FromFile) -> Task:
    """The task itself."""
    found = given if isinstance(given, Task) else given.load()
    return found if isinstance(found, Task) else found()


def profiles_here(task: Task, facts: list[ModelFacts], threads: int, budget_seconds: float) -> list[Profile]:
    """This worker's profiles; the workers wait for each other, so that all measure the same thing at once."""
    workers = dist.get_world_size() if dist.is_initialized() else 1
    profiles: list[Profile] = []
    for one in facts:
        start = others.now()
        found = profile(
            task,
            one,
            threads=threads,
            concurrency=workers,
            together=_barrier if workers > 1 else None,
            budget_seconds=budget_seconds,
        )
        found = in_a_real_step(task, one, found, budget_seconds / 3)
        taken = others.taken_since(start, threads)  # of all workers together, whatever each of them computes on
        profiles.append(replace(found, cores_taken=taken) if accelerator().type == "cpu" else found)
    return profiles


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
        exposed_seconds=statistics.median(one.exposed_seconds for one in profiles),
        uneven_seconds=statistics.median(one.uneven_seconds for one in profiles),
        cores_taken=max(one.cores_taken for one in profiles),
    )


def in_a_real_step(task: Task, facts: ModelFacts, found: Profile, budget_seconds: float) -> Profile:
    """The profile, put right by a few real steps of the replicated plan among the workers that are here.

    Blocks keep their proportions and add up to what computing took in the steps; host and optimizer are what they
    took; ``exposed_seconds`` is what the workers waited for each other's gradients, ``uneven_seconds`` for the last
    of them to be done computing. A model whose training state does not fit comfortably keeps the profile as it is.
    """
    workers = found.concurrency
    if facts.parameter_bytes * (2 + found.optimizer_state_bytes_per_byte) * workers > REAL_STEP_BYTES:
        return found
    plan = Plan(dp=workers)
    step = build(replace(task, microbatch=facts.samples), plan)
    try:
        reports = [step() for _ in range(1 + WARM_UP_STEPS)]
        count = max(MOST_STEPS[0], min(MOST_STEPS[1], int(budget_seconds / max(reports[-1].seconds, 1e-6))))
        # every worker must take as many steps as the others
        agreed = torch.tensor([float(count)])
        if workers > 1:
            dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        reports = [step() for _ in range(int(agreed))]
    finally:
        step.close()
    number = statistics.median(report.microbatches[step.rank] for report in reports)
    blocks_seconds = sum(time.forward_seconds + time.backward_seconds for time in found.blocks.values())
    if not number or not blocks_seconds:
        return found

    # Workers that share a core are put aside for milliseconds at a time; the median of a term never saw that.
    here = min(workers, int(os.environ.get("LOCAL_WORLD_SIZE", workers)))
    typical = statistics.fmean if here * found.threads > available_cores() else statistics.median

    def term(name: str) -> float:
        return typical([report.terms[name] for report in reports])

    ratio = term("compute") / number / blocks_seconds
    return replace(
        found,
        blocks={
            name: BlockTime(time.forward_seconds * ratio, time.backward_seconds * ratio)
            for name, time in found.blocks.items()
        },
        optimizer_seconds_per_byte=term("optimizer") / max(1, facts.trainable_bytes),
        host_seconds=max(0.0, term("host") - number * found.fetch_seconds),
        exposed_seconds=term("communicate") if workers > 1 else 0.0,
        uneven_seconds=term("wait") if workers > 1 else 0.0,
    )


def _barrier() -> None:
    dist.barrier()


def _path(task: Task, facts: ModelFacts, workers: int, threads: int) -> Path:
    name = cache.cache_key(task, facts, threads=threads, concurrency=workers)
    return cache.cache_folder() / f"{name}-together.json"
