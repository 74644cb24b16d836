"""What executors add to blocks and messages: the Python of split layers, passing between stages, layouts, codecs.

No fact of a model foretells it, so it is measured: each executor that a plan uses runs a few steps of very small
microbatches on two workers (a rehearsal), and what they take beyond what is priced is its overhead. A profile holds it
by the text of the rehearsed plan.

Of executors in which each message is waited for, all that is beyond the price is overhead. In others (stages, stolen
shares, recomputation) a worker goes on while messages travel, so that steps of tiny microbatches, which have nothing to
go on with, say too much: their overhead is the processor time that they take beside replicas of the same model.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from sheaf.cost.again import EVERY_BLOCK
from sheaf.graph.facts import Profile
from sheaf.plans import Plan
from sheaf.plans.again import AGAIN
from sheaf.plans.local import of_two
from sheaf.plans.schedule import tells_apart
from sheaf.plans.server import beside

REPLICAS = Plan(dp=2)
MEETING = 2  # steps between meetings of weights, in a rehearsal
REHEARSED_STAGES = 2
_GRADIENT_TERMS = ("server", "all_reduce", "reduce_scatter", "all_gather")


def in_microbatches(plan: Plan) -> tuple[Plan, ...]:
    """What is rehearsed of the plan for what it adds to each microbatch.

    >>> [str(one) for one in in_microbatches(Plan.parse("dp=4,tp=2,pp=4:gpipe,zero=1"))]
    ['tp=2', 'pp=2:gpipe']
    """
    found: list[Plan] = []
    if plan.tp > 1:
        found.append(Plan(tp=2, sequence=plan.sequence))
    if plan.cp > 1:
        found.append(Plan(cp=2))
    if plan.pp > 1:
        found += _stages(plan)
    if plan.zero > 1:
        found.append(Plan(dp=2, zero=plan.zero))
    if plan.stolen:
        found.append(Plan(dp=2, shares=plan.shares))
    if plan.parts and plan.by_parts:
        found.append(Plan(dp=2, parts=tuple(part for part in plan.parts if part[1] != AGAIN)))
    if plan.again:
        found.append(EVERY_BLOCK)
    return tuple(found)


def in_steps(plan: Plan) -> tuple[Plan, ...]:
    """What is rehearsed of the plan for what it adds to each step, or to each meeting of weights.

    >>> [str(one) for plan in ("dp=4,local=16:diloco", "dp=8,pp=2", "pp=2") for one in in_steps(Plan.parse(plan))]
    ['dp=2,local=2:diloco', 'dp=2']
    """
    found: list[Plan] = []
    if plan.dp > 1 and plan.exact and not plan.zero and not plan.server:
        found.append(REPLICAS)
    if plan.zero == 1:
        found.append(Plan(dp=2, zero=1))
    if plan.compress != "none" and not plan.local:
        found.append(Plan(dp=2, compress=plan.compress))
    local = of_two(plan.local, MEETING) if plan.local else ""
    if plan.server:
        few = min(2, plan.serves.shards)  # two workers hold two shards at most
        found.append(Plan(dp=2, server=beside(plan.server, few), late=plan.late, local=local))
    elif plan.local:
        found.append(Plan(dp=2, local=local, compress=plan.compress))
    return tuple(found)


def goes_on(rehearsed: Plan) -> bool:
    """Whether a worker of a rehearsed plan goes on while messages travel, so that its overhead is processor time.

    >>> goes_on(Plan.parse("pp=2")), goes_on(Plan.parse("tp=2"))
    (True, False)
    """
    return rehearsed.pp > 1 or rehearsed.stolen or rehearsed.recompute != "none"


def microbatch_seconds(profile: Profile | None, plan: Plan, *, speed: float = 1.0) -> float:
    """What one worker spends on each microbatch beside what is priced, but for what stages add.

    ``speed`` is that worker's, relative to the first.
    """
    if profile is None or not profile.overheads:
        return 0.0
    known = (one for one in in_microbatches(plan) if one.pp == 1)
    return sum(max(0.0, profile.overheads.get(str(one), 0.0)) / (speed if goes_on(one) else 1.0) for one in known)


def stage_seconds(profile: Profile | None, plan: Plan, *, first: bool, speed: float = 1.0) -> float:
    """What one stage of a pipeline adds to each microbatch; ``speed`` is its worker's, relative to the first.

    ``zero-bubble`` tells the backward of inputs from that of weights, and the ``first`` stage has no inputs to tell
    apart: what that adds to ``1f1b`` is of the others alone, in a rehearsal on two workers of the second.

    >>> profile = Profile(1, 2, 1, "fp32", {}, 0.0, 2.0, 0.0, 0.0, overheads={"pp=2": 1.0, "pp=2:zero-bubble": 1.5})
    >>> plan = Plan.parse("pp=4:zero-bubble")
    >>> stage_seconds(profile, plan, first=True), stage_seconds(profile, plan, first=False)
    (1.0, 2.0)
    """
    if profile is None or not profile.overheads:
        return 0.0
    plain, *apart = (max(0.0, profile.overheads.get(str(one), 0.0)) for one in _stages(plan))
    more = max(0.0, apart[0] - plain) if apart else 0.0
    return (plain + (0.0 if first else REHEARSED_STAGES * more)) / speed


def _stages(plan: Plan) -> tuple[Plan, ...]:
    """What is rehearsed of a plan's stages: their schedule, and ``1f1b`` beside one that tells backwards apart."""
    plain = Plan(pp=REHEARSED_STAGES, schedule=plan.schedule, virtual=plan.virtual)
    if plan.schedule != "zero-bubble":
        return (plain,)
    together = replace(plain, schedule="1f1b")
    return (together, plain) if tells_apart(plan) else (together,)


def with_meetings(seconds: dict[str, float], profile: Profile | None, plan: Plan) -> dict[str, float]:
    """Terms with what each step takes beside what is priced, in the longest of those that gradients travel in.

    What is priced too high there is put right as far as to nothing.
    """
    longest = max(_GRADIENT_TERMS, key=lambda term: seconds[term])
    return seconds | {longest: max(0.0, seconds[longest] + meeting_seconds(profile, plan))}


def meeting_seconds(profile: Profile | None, plan: Plan) -> float:
    """What each step takes beside what is priced, of a meeting of weights its share; below zero: it is priced too high.

    >>> profile = Profile(1, 2, 1, "fp32", {}, 0.0, 2.0, 0.0, 0.0, overheads={"dp=2": -0.5, "dp=2,local=2": 0.5})
    >>> [meeting_seconds(profile, Plan.parse(text)) for text in ("dp=4", "dp=4,local=4", "tp=2")]
    [-0.5, 0.125, 0.0]
    """
    if profile is None or not profile.overheads:
        return 0.0
    every = max(1, plan.meets_locally.every)
    return sum((profile.overheads.get(str(one), 0.0) / every for one in in_steps(plan)), 0.0)


def uneven_seconds(profile: Profile | None, plan: Plan) -> float:
    """What replicas that are equally fast wait for the last of them in a step: no two take equally long each time.

    Most where workers share cores and take turns. Over steps between meetings it is made up for, as random steps are.

    >>> profile = Profile(1, 4, 1, "fp32", {}, 0.0, 2.0, 0.0, 0.0, uneven_seconds=0.5)
    >>> [uneven_seconds(profile, Plan.parse(text)) for text in ("dp=4", "dp=4,local=4", "pp=4", "dp=4,server=1:async")]
    [0.5, 0.25, 0.0, 0.0]
    """
    if profile is None or plan.dp < 2 or plan.meets_locally.rounds:
        return 0.0
    if plan.server and plan.serves.staleness is None:
        return 0.0
    return profile.uneven_seconds / math.sqrt(max(1, plan.meets_locally.every))


def each(more: Mapping[str, float], num_microbatches: int) -> dict[str, float]:
    """Overheads from what steps took beyond their price, by rehearsed plan; steps had so many microbatches.

    What plain replicas add is not counted again with what is rehearsed on top of them.

    >>> each({"dp=2": 0.25, "dp=2,shares=stolen": 0.75, "dp=2,zero=1": 0.5, "pp=2": 0.5, "dp=2,local=2": 0.1}, 4)
    {'dp=2': 0.25, 'dp=2,shares=stolen': 0.25, 'dp=2,zero=1': 0.5, 'pp=2': 0.1, 'dp=2,local=2': 0.2}
    """
    found: dict[str, float] = {}
    for text, seconds in more.items():
        plan = Plan.parse(text)
        beside = more.get(str(REPLICAS), 0.0) if plan != REPLICAS and REPLICAS in in_steps(plan) else 0.0
        found[text] = _each(plan, seconds - beside, num_microbatches)
    return found


def _each(plan: Plan, more: float, num_microbatches: int) -> float:
    if plan.local:
        return more * max(1, plan.meets_locally.every)
    if not in_microbatches(plan):
        return more
    # of a pipeline, by turns of a stage: each worker has its own, and waits for those of the others once
    times = num_microbatches * plan.virtual + plan.pp - 1 if plan.pp > 1 else -(-num_microbatches // plan.dp)
    return more / times


def without(profile: Profile) -> Profile:
    """The profile as if nothing had been rehearsed."""
    return replace(profile, overheads={})
