"""A checkpoint of other shards, laid out for those of this run: more of them or fewer, beside replicas or apart."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from sheaf.errors import PlanError, RunError
from sheaf.parallel.resharding import State, joined, overlaps
from sheaf.parallel.server.places import Form
from sheaf.parallel.server.restore import numbered, part
from sheaf.plans import Plan
from sheaf.plans.server import beside


def is_relayable(plan: Plan, saved: str) -> bool:
    """Whether a run of ``plan`` can go on from a checkpoint of the other: they differ in where shards lie alone.

    >>> plan = Plan.parse("dp=4,server=2:apart:async")
    >>> [is_relayable(plan, saved) for saved in ("dp=4,server=4:async", "dp=4,server=4", "dp=4")]
    [True, False, False]
    """
    try:
        other = Plan.parse(saved)
    except PlanError:
        return False
    if not plan.server or not other.server or plan.local or plan.computing > plan.dp:
        return False
    one, another = (replace(each, server=beside(each.server, 1)) for each in (plan, other))
    return one == another


def relaid(saved: Plan, read: Callable[[int], State], forms: Sequence[Form], old_forms: Sequence[Form]) -> State:
    """All shards as ``state`` of one worker would have them that held all; ``read`` gives each worker's of ``saved``.

    Raises RunError when a shard is missing.
    """
    kept: dict[int, State] = {}
    for worker in range(saved.workers):
        tensors, values = read(worker)
        for number, told in values["shards"].items():
            kept[int(number)] = part(tensors, f"shard/{number}/"), told
    if missing := sorted(set(range(saved.serves.shards)) - set(kept)):
        raise RunError(f"the checkpoint has no shard {missing[0]}; it was not written by a whole run")
    return numbered(enumerate(_relaid(form, old_forms, kept) for form in forms))


def _relaid(form: Form, old_forms: Sequence[Form], kept: dict[int, State]) -> State:
    """One shard of the new layout. What has a number for each one of a piece is cut; the rest is as on the first."""
    made: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for piece in form.pieces:
        lies = overlaps(piece, [old.pieces for old in old_forms])
        values = kept[lies[0][0]][1]
        if piece.name in values["optimizer"]["state"]:
            plain[piece.name] = values["optimizer"]["state"][piece.name]
        made |= joined(piece, [(old, _of(piece.name, kept[number][0])) for number, old in lies])
    common = kept[0][1]
    return made, common | {"optimizer": common["optimizer"] | {"state": plain}}


def _of(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A shard's tensors of a parameter."""
    return {key: value for key, value in tensors.items() if _is_of(key, name)}


def _is_of(key: str, name: str) -> bool:
    """Whether a shard's tensor is of a parameter: its values, what was gathered for it, or the optimizer's state."""
    kind, _, rest = key.partition("/")
    return (rest.rpartition("/")[0] if kind == "optimizer" else rest) == name
