"""A few steps of very small microbatches under each executor that plans use, for what the executors add themselves."""

import json
import statistics
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sheaf import launch
from sheaf.api.profiles import REAL_STEP_BYTES, TIMEOUT_SECONDS, in_a_real_step, loaded, median
from sheaf.cluster.machine import available_cores
from sheaf.cost.overheads import MEETING, each, in_microbatches, in_steps, without
from sheaf.errors import SheafError
from sheaf.graph import BlockTime, ModelFacts, Profile, cache
from sheaf.launch import FromFile
from sheaf.parallel import build
from sheaf.plans import Plan
from sheaf.search import Question
from sheaf.task import Task

SAMPLES = 2  # of a microbatch: with one, batch statistics may have nothing to do
MICROBATCHES = 4
WORKERS = 2
WARM_UP, ROUNDS = 2, 6


@dataclass(frozen=True)
class Rehearsals:
    """What steps of small microbatches took, by the text of the plan; ``profile`` is of such microbatches.

    ``refused`` are plans that cannot run the task.
    """

    profile: Profile
    seconds: dict[str, float]
    refused: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """What JSON knows."""
        return asdict(self)

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> "Rehearsals":
        """What ``to_dict`` gave."""
        seconds = {str(text): float(each) for text, each in told["seconds"].items()}
        return cls(profile_from(told["profile"]), seconds, tuple(told["refused"]))


def profile_from(told: dict[str, Any]) -> Profile:
    """A profile from what ``dataclasses.asdict`` gave."""
    values: dict[str, Any] = dict(told)
    values["blocks"] = {str(name): BlockTime(**time) for name, time in told["blocks"].items()}
    return Profile(**values)


def wanted(plans: Iterable[Plan]) -> list[Plan]:
    """What must be rehearsed for these plans."""
    return list(dict.fromkeys(one for plan in plans for one in (*in_microbatches(plan), *in_steps(plan))))


def kept_rehearsals(
    task: Task,
    facts: ModelFacts,
    profile: Profile,
    plans: Sequence[Plan],
    *,
    source: FromFile | None = None,
    fresh: bool = False,
) -> Rehearsals | None:
    """What two new workers of this machine take for these plans, or took before; None where nothing can be rehearsed.

    Kept beside the profiles. A model whose training state does not fit comfortably twice is not rehearsed.
    """
    if _state_bytes(facts, profile) > REAL_STEP_BYTES:
        return None
    name = cache.cache_key(task, facts, threads=profile.threads, concurrency=WORKERS)
    path = cache.cache_folder() / f"{name}-rehearsed.json"
    known = None if fresh else _read(path)
    missing = [
        plan for plan in plans if known is None or (str(plan) not in known.seconds and str(plan) not in known.refused)
    ]
    if not missing:
        return known
    rows = launch.run(
        _rehearse_rank,
        WORKERS,
        task if source is None else source,
        facts,
        profile,
        missing,
        threads=max(1, available_cores() // WORKERS),
        timeout_s=TIMEOUT_SECONDS,
    )
    found = replace(rows[0], profile=median([row.profile for row in rows]))
    if known is not None:
        found = replace(found, seconds=known.seconds | found.seconds, refused=(*known.refused, *found.refused))
    with suppress(OSError):  # a folder that cannot be written to is done without
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(found.to_dict()), encoding="utf-8")
        beside.replace(path)
    return found


def _rehearse_rank(given: Task | FromFile, facts: ModelFacts, profile: Profile, plans: Sequence[Plan]) -> Rehearsals:
    launch.join()
    return agreed(rehearsed(loaded(given), facts, profile, plans))


def _read(path: Path) -> Rehearsals | None:
    """What a file holds; None where there is none, or when what is there is not whole."""
    try:
        return Rehearsals.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def rehearsed(task: Task, facts: ModelFacts, profile: Profile, plans: Sequence[Plan]) -> Rehearsals:
    """Run a few small steps of each plan on the two workers of the default process group (collective).

    Plans are in turn, as many as fit comfortably at once, so that what disturbs one disturbs all; those that cannot run
    the task are left out.
    """
    samples = min(SAMPLES, facts.samples)
    small = replace(task, batch=MICROBATCHES * samples, microbatch=samples)
    plain = in_a_real_step(small, replace(facts, samples=samples), scaled(profile, samples), 0.3)
    at_once = max(1, REAL_STEP_BYTES // max(1, round(_state_bytes(facts, profile))))
    seconds: dict[str, float] = {}
    refused: list[str] = []
    for start in range(0, len(plans), at_once):
        taken, impossible = _in_turn(small, plans[start : start + at_once])
        seconds |= taken
        refused += impossible
    return Rehearsals(plain, seconds, tuple(refused))


def _in_turn(small: Task, plans: Sequence[Plan]) -> tuple[dict[str, float], list[str]]:
    """Seconds of a step under each plan, and the plans that cannot run the task."""
    steps: dict[str, Any] = {}
    refused: list[str] = []
    taken: dict[str, list[float]] = {}
    try:
        for plan in plans:
            try:
                steps[str(plan)] = build(small, plan)
            except SheafError:  # the same on every worker
                refused.append(str(plan))
        for turn in range(WARM_UP + ROUNDS):
            for text, step in steps.items():
                dist.barrier()
                began = time.perf_counter()
                for _ in range(MEETING):
                    step()
                if turn >= WARM_UP:
                    taken.setdefault(text, []).append((time.perf_counter() - began) / MEETING)
    finally:
        for step in steps.values():
            step.close()
    return {text: statistics.median(each_time) for text, each_time in taken.items()}, refused


def _state_bytes(facts: ModelFacts, profile: Profile) -> float:
    """What two workers take to train the whole model."""
    return facts.parameter_bytes * (2 + profile.optimizer_state_bytes_per_byte) * WORKERS


def scaled(profile: Profile, samples: int) -> Profile:
    """The profile for other microbatches, as if all its work grew with the samples."""
    share = samples / profile.samples
    blocks = {
        name: BlockTime(time.forward_seconds * share, time.backward_seconds * share)
        for name, time in profile.blocks.items()
    }
    return replace(profile, samples=samples, blocks=blocks, fetch_seconds=profile.fetch_seconds * share)


def overheads(question: Question, found: Rehearsals, busy: int) -> dict[str, float]:
    """What each rehearsed plan took beyond its price; ``question`` is of the workers that rehearsed."""
    samples = found.profile.samples
    small = replace(
        question,
        batch=MICROBATCHES * samples,
        microbatch=samples,
        profiles={(samples, busy): without(found.profile)},
    )
    more: dict[str, float] = {}
    for text, seconds in found.seconds.items():
        plan = Plan.parse(text)
        if (plan.split_degree == 1 and plan.cp == 1) or plan.split_kind in question.splits:
            more[text] = seconds - small.rough(plan).step_seconds
    return each(more, MICROBATCHES)


def agreed(found: Rehearsals) -> Rehearsals:
    """The slowest worker's seconds, on every worker (collective)."""
    texts = list(found.seconds)
    slowest = torch.tensor([found.seconds[text] for text in texts], dtype=torch.float64)
    if texts:
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return replace(found, seconds=dict(zip(texts, slowest.tolist(), strict=True)))
