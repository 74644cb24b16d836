"""Every plan worth pricing: how many workers, what is sharded, who gets how much, how large a microbatch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from sheaf.errors import PlanError
from sheaf.graph.facts import ModelFacts
from sheaf.plans import Plan
from sheaf.plans.layout import soonest
from sheaf.plans.plan import DEFAULT_SCHEDULE, RECOMPUTE, SCHEDULES
from sheaf.plans.server import APART
from sheaf.plans.shares import STOLEN, weights_text
from sheaf.plans.stages import placed

ALL_DEGREES_UP_TO = 16  # workers; beyond, powers of two, divisors of the batch, and all of them
MESHES_UP_TO = 8  # workers of which every number is tried with split layers and stages; beyond, powers of two and all
STAGES_UP_TO = 16  # beyond, powers of two
VIRTUAL = 2  # stages per worker of an interleaved pipeline
PART_BYTES, PART_FLOPS = 0.6, 0.3  # a part with more of the parameters and less of the work is worth splitting alone
COMPRESSIONS = ("bf16", "int8", "topk:0.01", "powersgd:4")  # relaxed plans, where they are allowed
LOCALS = ("8", "8:slowmo", "8:diloco", "32:diloco", "8:adasum", "1:exponential", "8:steps=speed")
STALE = ("staleness=4", "async")  # what a server may be behind, in relaxed plans
UNEQUAL = 1.02  # workers whose speeds differ by less count as equal


def degrees(workers: int, batch: int) -> tuple[int, ...]:
    """How many workers to try, from 1 to ``workers``.

    >>> degrees(4, 64), degrees(20, 30)
    ((1, 2, 3, 4), (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 20))
    """
    found = set(range(1, min(workers, ALL_DEGREES_UP_TO) + 1)) | {workers}
    found |= set(_powers(workers)) | {number for number in _divisors(batch) if number <= workers}
    return tuple(sorted(found))


def microbatch_choices(batch: int, workers: int) -> tuple[int, ...]:
    """Sizes to try where the task leaves the microbatch open: powers of two, divisors, and one per worker.

    >>> microbatch_choices(12, 2)
    (1, 2, 3, 4, 6)
    """
    largest = -(-batch // workers)
    found = {*_powers(largest), *(number for number in _divisors(batch) if number <= largest), largest}
    return tuple(sorted(found))


def strategies(workers: int) -> Iterator[Plan]:
    """Every legal answer to the other questions for so many workers, shares by weight apart."""
    for zero in (0, 1, 2, 3) if workers > 1 else (0,):
        for recompute in RECOMPUTE:
            yield Plan(dp=workers, zero=zero, recompute=recompute)
            if workers > 1 and zero < 2:
                yield Plan(dp=workers, zero=zero, recompute=recompute, shares=STOLEN)


def relaxed(workers: int) -> Iterator[Plan]:
    """Ways for gradients to meet that are not exact, for replicas: compressed, and after several local steps.

    >>> [str(plan) for plan in relaxed(2)][-2:]
    ['dp=2,server=2:async', 'dp=2,local=8:diloco,server=2:async']
    """
    for compress in COMPRESSIONS if workers > 1 else ():
        yield Plan(dp=workers, compress=compress)
    for local in LOCALS if workers > 1 else ():
        yield Plan(dp=workers, local=local)
    for behind in STALE if 1 < workers <= ALL_DEGREES_UP_TO else ():
        yield Plan(dp=workers, server=f"{workers}:{behind}")
        yield Plan(dp=workers, server=f"{workers}:{behind}", local="8:diloco")


def relaxed_replicas(plan: Plan) -> Iterator[Plan]:
    """The same mesh, whose replicas of several workers meet in ways that are not exact.

    >>> [str(one) for one in relaxed_replicas(Plan(dp=2, tp=2))]
    ['dp=2,tp=2,compress=bf16', 'dp=2,tp=2,local=8:diloco', 'dp=2,tp=2,server=2:async']
    """
    if plan.dp > 1 and not plan.zero:
        yield replace(plan, compress="bf16")
        yield replace(plan, local="8:diloco")
        if plan.dp <= ALL_DEGREES_UP_TO and plan.cp == 1:
            yield replace(plan, server=f"{plan.dp}:async")


def served(workers: int, left: int = 0) -> Iterator[Plan]:
    """Replicas with a parameter server in lock-step, which is exact: one shard on each worker, or on the first alone;
    and with shards apart, on as many of the workers that are ``left`` as there are replicas.

    >>> [str(plan) for plan in served(3, 2)]
    ['dp=3,server=1', 'dp=3,server=3', 'dp=3,server=2:apart']
    """
    if not 1 < workers <= ALL_DEGREES_UP_TO:
        return
    for shards in (1, workers):
        yield Plan(dp=workers, server=str(shards))
    if left > 0:
        yield Plan(dp=workers, server=f"{min(workers, left)}:{APART}")


def meshes(workers: int, tps: Sequence[int], most_stages: int) -> Iterator[tuple[int, int, int]]:
    """(dp, tp, pp) for so many workers, other than dp alone; ``tps`` are the numbers that may split a layer.

    >>> list(meshes(4, (2,), 4))
    [(2, 1, 2), (1, 1, 4), (2, 2, 1), (1, 2, 2)]
    """
    for tp in sorted({1, *tps}):
        for pp in _divisors(workers // tp) if workers % tp == 0 else ():
            worth_trying = pp <= STAGES_UP_TO or pp.bit_count() == 1
            if tp * pp > 1 and pp <= most_stages and worth_trying:
                yield workers // (tp * pp), tp, pp


def wide_meshes(
    available: int, count: int, degrees_inside: Sequence[int], most_stages: int
) -> tuple[tuple[int, int, int], ...]:
    """(dp, workers that split a layer or a sequence, pp) for a large cluster and ``count`` microbatches.

    Stages are every number up to 16, powers of two, and divisors of the number of blocks or one and two less, as
    embedding and head often take little; replicas all there is room for, or as few as take no longer, or as deal out
    evenly, and halves of that.

    >>> [mesh for mesh in wide_meshes(100, 48, (8,), 4) if mesh[2] == 1]
    [(3, 8, 1), (6, 8, 1), (12, 8, 1)]
    """
    stages = {pp for pp in range(1, most_stages + 1) if pp <= STAGES_UP_TO or pp.bit_count() == 1}
    stages |= {pp for blocks in range(max(1, most_stages - 2), most_stages + 1) for pp in _divisors(blocks)}
    found: set[tuple[int, int, int]] = set()
    for degree in degrees_inside:
        for pp in stages:
            room = min(count, available // (degree * pp))
            if room < 1 or degree * pp == 1:
                continue
            even = max(number for number in _divisors(count) if number <= room)
            few = -(-count // -(-count // room))
            for most in (room, even, few):
                found |= {(most >> half, degree, pp) for half in range(3) if most >> half}
    return tuple(sorted(found))


def mesh_degrees(workers: int) -> tuple[int, ...]:
    """How many workers to try with split layers and stages.

    >>> mesh_degrees(24)
    (2, 3, 4, 5, 6, 7, 8, 16, 24)
    """
    found = {*range(2, MESHES_UP_TO + 1), *_powers(workers)[1:], workers}
    return tuple(sorted(number for number in found if 1 < number <= workers))


def mesh_strategies(dp: int, tp: int, pp: int, sequences: Sequence[int], most_stages: int) -> Iterator[Plan]:
    """Every answer to the other questions worth trying for a mesh.

    Replicas of pipelines shard no more than optimizer state: gathering parameters for each microbatch of a stage loses
    what a pipeline gains. Keeping all microbatches of a gpipe makes no sense where memory asks for recomputation.
    """
    for schedule in SCHEDULES if pp > 1 else (DEFAULT_SCHEDULE,):
        virtual = VIRTUAL if schedule == "interleaved" else 1
        if pp * virtual > most_stages:
            continue
        for zero in ((0, 1) if pp > 1 else (0, 1, 2, 3)) if dp > 1 else (0,):
            for recompute in RECOMPUTE if schedule != "gpipe" else RECOMPUTE[:1]:
                for sequence in sequences if tp > 1 else (0,):
                    try:
                        yield Plan(
                            dp=dp, tp=tp, pp=pp, schedule=schedule, virtual=virtual, sequence=sequence, zero=zero,
                            recompute=recompute,
                        )  # fmt: skip
                    except PlanError:
                        continue


def sequence_strategies(dp: int, cp: int, pp: int) -> Iterator[Plan]:
    """Every answer to the other questions worth trying where sequences are split.

    >>> [str(plan) for plan in sequence_strategies(1, 2, 2)][:2]
    ['cp=2,pp=2', 'cp=2,pp=2,recompute=full']
    """
    for zero in (0, 1) if pp > 1 else (0, 1, 2, 3):
        for recompute in RECOMPUTE:
            yield Plan(dp=dp, cp=cp, pp=pp, zero=zero, recompute=recompute)


def mesh_microbatches(batch: int, dp: int, pp: int) -> tuple[int, ...]:
    """Sizes to try where the task leaves the microbatch open: as large as they get, and smaller ones for a pipeline.

    >>> mesh_microbatches(64, 2, 1), mesh_microbatches(64, 2, 4), mesh_microbatches(4, 4, 2)
    ((8, 16, 32), (2, 4, 8), (1,))
    """
    whole = -(-batch // dp)
    return tuple(sorted({max(1, -(-whole // (pp * parts))) for parts in (1, 2, 4)}))


def part_plans(dp: int, name: str) -> Iterator[Plan]:
    """Replicas that split one part among each other."""
    for recompute in RECOMPUTE:
        yield Plan(dp=dp, recompute=recompute, parts=((name, "tp"),))


def expert_plans(dp: int, names: Sequence[str]) -> Iterator[Plan]:
    """Replicas that hold the experts in these modules for each other."""
    for recompute in RECOMPUTE:
        yield Plan(dp=dp, recompute=recompute, parts=tuple((name, "ep") for name in names))


def stacked(facts: ModelFacts) -> bool:
    """Whether a parameter may be a stack of experts' matrices."""
    return any(len(one.shape) == 3 for one in facts.parameters)


def heavy_part(facts: ModelFacts) -> str | None:
    """The outermost module that holds most parameters in a run of blocks with little work; None without one.

    Its gradients are what replicas would send each other, its activations little in comparison.
    """
    blocks = placed(facts)
    prefixes = {".".join(block.name.split(".")[:depth]) for block in blocks for depth in range(1, 5)}
    for name in sorted(prefixes, key=lambda prefix: (prefix.count("."), prefix)):
        within = [place for place, block in enumerate(blocks) if f"{block.name}.".startswith(f"{name}.")]
        contiguous = within == list(range(within[0], within[-1] + 1))
        mine = [blocks[place] for place in within]
        flops = sum(block.forward_flops + block.backward_flops for block in mine)
        if (
            contiguous
            and sum(block.parameter_bytes for block in mine) > PART_BYTES * facts.parameter_bytes
            and flops < PART_FLOPS * facts.flops
        ):
            return name
    return None


def weighted_shares(seconds: Sequence[float], num_microbatches: int, begins: Sequence[float] = ()) -> str | None:
    """The weights with which workers that need ``seconds`` per microbatch are done soonest; None if equal ones do.

    None as well where a worker would get nothing: then fewer workers do. ``begins``: when each begins with its first.

    >>> weighted_shares((1.0, 2.2), 16), weighted_shares((1.0, 1.0), 8), weighted_shares((1.0, 1.0), 8, (0.0, 4.0))
    ('11:5', None, '3:1')
    >>> weighted_shares((1.0, 9.0), 4)
    """
    together = not begins or max(begins) - min(begins) < max(seconds)
    if together and max(seconds) <= UNEQUAL * min(seconds):
        return None
    counts = soonest(num_microbatches, seconds, begins)
    if not all(counts) or len(set(counts)) == 1:
        return None
    return weights_text(counts)


def _powers(largest: int) -> list[int]:
    return [2**power for power in range(largest.bit_length()) if 2**power <= largest]


def _divisors(number: int) -> list[int]:
    small = [low for low in range(1, math.isqrt(number) + 1) if number % low == 0]
    return sorted({*small, *(number // low for low in small)})
