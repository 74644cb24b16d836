"""Who has how much of a batch, and of the state that ZeRO shards: equal parts, weights, or by how fast workers are."""

import math
import re
from collections.abc import Sequence
from typing import Any

EQUAL = "equal"
STOLEN = "stolen"
BALANCED = "balanced"


def weights_of(written: str, replicas: int) -> tuple[int, ...]:
    """The weight of each replica; one each where none are written.

    >>> weights_of("11:5", 2), weights_of("stolen", 3)
    ((11, 5), (1, 1, 1))
    """
    return tuple(int(part) for part in written.split(":")) if ":" in written else (1,) * replicas


def weights_text(counts: Sequence[int]) -> str:
    """Weights, as a plan writes them, in proportion to how much each replica has.

    >>> weights_text((8, 4)), weights_text((11, 5))
    ('2:1', '11:5')
    """
    common = math.gcd(*counts)
    return ":".join(str(count // common) for count in counts)


def updates_alone(plan: Any) -> bool:
    """Whether a replica goes on as soon as its own update is done, which the others do not wait for.

    They do under ZeRO, for what it has updated, before a server, for shards, and where its part of a layer or table is
    used by them, or weights meet. In a pipeline stages fill one after the other, and all but the first have that long
    for their updates: it counts as if they were waited for.
    """
    return not (plan.zero or plan.server or plan.local or plan.pp > 1 or plan.by_parts)


def undealable(plan: Any) -> list[str]:
    """Every rule that a ``Plan`` with these ``shares`` and ``shards`` breaks, each with what works in its place."""
    broken: list[str] = []
    if plan.shares not in (EQUAL, STOLEN, BALANCED):
        broken += _unweighable("shares", plan.shares, plan.dp, f"{EQUAL}, {STOLEN}, {BALANCED}, or ")
    if plan.shards:
        broken += _unweighable("shards", plan.shards, plan.dp, "")
        if not plan.zero:
            broken.append(
                f"shards={plan.shards} says how large ZeRO's shards are, and zero=0 has none: raise zero or drop shards"
            )
    if plan.zero >= 2 and plan.stolen:
        broken.append(
            f"zero={plan.zero} moves every worker through the layers in lockstep, so there is nothing to steal: "
            f"use zero=1,shares=stolen, or zero={plan.zero} with weighted shares"
        )
    if plan.stolen and plan.computing > plan.dp:
        broken.append(
            f"shares=stolen lets single workers take microbatches, and {plan} computes each with several: use weighted "
            "shares, or drop tp and pp"
        )
    if plan.balanced and (plan.dp == 1 or plan.by_parts or plan.server):
        broken.append(
            "shares=balanced deals a step by how fast replicas were, each alone: use it with dp=2 or more, without "
            "split parts and servers, or write weights such as shares=11:5"
        )
    if plan.dp == 1 and plan.stolen:
        broken.append("shares=stolen needs someone to steal from, and dp=1: raise dp or drop shares")
    return broken


def _unweighable(key: str, written: str, replicas: int, others: str) -> list[str]:
    if not re.fullmatch(r"\d+(:\d+)*", written):
        return [f"{key}={written}: write {others}one whole weight per replica such as 11:5"]
    weights = written.split(":")
    if len(weights) != replicas:
        return [f"{key}={written} gives {len(weights)} weights for dp={replicas} replicas: write one per replica"]
    return [] if any(map(int, weights)) else [f"{key}={written}: at least one weight must be above zero"]
