"""A checkpoint of ZeRO's shards laid out for those of this run: of other sizes, or of more workers or fewer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sheaf.errors import PlanError, RunError
from sheaf.parallel.flat import FlatTensors
from sheaf.parallel.gathered import Gathered
from sheaf.parallel.holding import AbstractHolding
from sheaf.parallel.sharded import Sharded
from sheaf.plans import Plan
from sheaf.plans.layout import Flat, Piece

State = tuple[dict[str, Tensor], dict[str, Any]]  # as ``state`` of a step gives it


def is_reshardable(plan: Plan, saved: str) -> bool:
    """Whether a run of ``plan`` can go on from a checkpoint of the other: the same but for how many replicas there are,
    which shares and shards they have, and where the optimizer steps. Stages 1 and 2 of ZeRO keep the same.

    >>> plan = Plan.parse("dp=2,zero=1")
    >>> [is_reshardable(plan, saved) for saved in ("dp=2,zero=1,shares=2:1", "dp=3,zero=2", "dp=2,zero=3", "dp=2")]
    [True, True, False, False]
    """
    try:
        other = Plan.parse(saved)
        alike = replace(other, dp=plan.dp, shares=plan.shares, zero=plan.zero, shards=plan.shards, offload=plan.offload)
    except PlanError:
        return False
    return bool(plan.zero and other.zero) and (plan.zero == 3) == (other.zero == 3) and alike == plan


def keeps_the_same(plan: Plan, saved: str) -> bool:
    """Whether a checkpoint of the other plan is as one of this: they differ in where the optimizer steps alone.

    >>> plan = Plan.parse("dp=2,tp=2,offload=optimizer")
    >>> keeps_the_same(plan, "dp=2,tp=2"), keeps_the_same(plan, "dp=4")
    (True, False)
    """
    try:
        return replace(Plan.parse(saved), offload=plan.offload) == plan
    except PlanError:
        return False


def resharded(plan: Plan, saved: str, holding: AbstractHolding, read: Callable[[int], State]) -> State | None:
    """What this worker loads of a checkpoint of the plan ``saved``, of which ``read`` gives each worker's part.

    Every number is as it was saved. None where plans differ in more than shards, or replicas are of several workers.
    """
    if plan.computing > plan.dp or not is_reshardable(plan, saved) or not isinstance(holding, Sharded | Gathered):
        return None
    other, kept = Plan.parse(saved), cache(read)
    states = cache(lambda worker: _by_parameter(kept(worker)[0]))
    first, values = kept(0)
    made = {name: value for name, value in first.items() if not name.startswith(("optimizer/", "parameter/shard "))}
    plain: dict[str, Any] = {}
    for index, held in enumerate(holding.flats):
        old, name = replace(held.flat, workers=other.dp, weights=other.shard_weights), f"parameter/shard {index}"
        made[name] = _shard(held, old, lambda worker, name=name: kept(worker)[0][name])
        old_pieces = [old.pieces(worker) for worker in range(old.workers)]
        for piece in held.pieces if held.trained else ():
            lies = overlaps(piece, old_pieces)
            found = joined(piece, [(lay, states(worker).get(piece.name, {})) for worker, lay in lies])
            made |= {f"optimizer/{piece.name}/{key}": value for key, value in found.items()}
            told = kept(lies[0][0])[1]["optimizer"]["state"]
            plain |= {piece.name: told[piece.name]} if piece.name in told else {}
    return made, values | {"optimizer": values["optimizer"] | {"state": plain}}


def checked(name: str, saved: Tensor, num_elements: int) -> Tensor:
    """What a checkpoint has under a name. Raises RunError where that is more or less than so many numbers."""
    if saved.numel() != num_elements:
        raise RunError(
            f"{name} has {saved.numel()} numbers in the checkpoint and {num_elements} here: another model wrote it, or "
            "a version of Sheaf that cut ZeRO's shards equally under weighted shares; resume with what wrote it"
        )
    return saved


def check_cuts(saved: Mapping[str, list[int]], here: Mapping[str, list[int]]) -> None:
    """Raises RunError where a checkpoint's layers are cut otherwise than here: slices of one size may hold others."""
    other = [name for name in sorted({*saved, *here}) if saved.get(name) != here.get(name)]
    if other:
        theirs, ours = (cuts.get(other[0], "whole") for cuts in (saved, here))
        raise RunError(
            f"{len(other)} parameters (the first is {other[0]}) are cut among workers otherwise in the checkpoint "
            f"(dimension, runs, sizes: {theirs}) than here ({ours}): another version of Sheaf or torch wrote it; "
            "resume with that one"
        )


def overlaps(piece: Piece, pieces: Sequence[Sequence[Piece]]) -> list[tuple[int, Piece]]:
    """Which of several holders have some of a piece, and what of the parameter each has, in the parameter's order."""
    found = [
        (holder, old)
        for holder, theirs in enumerate(pieces)
        for old in theirs
        if old.name == piece.name and old.start < piece.stop and piece.start < old.stop
    ]
    return sorted(found, key=lambda one: one[1].start)


def joined(piece: Piece, lies: Sequence[tuple[Piece, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """The tensors of a piece, from those of the pieces in which it lies: by key, in the parameter's order.

    What has a number for each one of a piece is cut; the rest is as with the first.
    """
    made: dict[str, Tensor] = {}
    for key, value in lies[0][1].items():
        if any(tuple(theirs[key].shape) != (old.num_elements,) for old, theirs in lies):
            made[key] = value
            continue
        ranges = [(max(piece.start, old.start) - old.start, min(piece.stop, old.stop) - old.start) for old, _ in lies]
        made[key] = torch.cat([theirs[key][low:high] for (low, high), (_, theirs) in zip(ranges, lies, strict=True)])
    return made


def _shard(held: FlatTensors, old: Flat, read: Callable[[int], Tensor]) -> Tensor:
    """This worker's shard, from those of the old flat; zeros where it is padded."""
    begin, end = held.flat.start(held.rank), held.flat.start(held.rank + 1)
    made = torch.zeros(end - begin, dtype=held.dtype)
    for worker in range(old.workers):
        first = old.start(worker)
        low, high = max(begin, first), min(end, old.start(worker + 1), old.num_elements)
        if low < high:
            saved = checked("a shard", read(worker), old.sizes[worker])
            made[low - begin : high - begin] = saved[low - first : high - first]
    return made


def _by_parameter(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The optimizer's tensors by parameter and key."""
    found: dict[str, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        kind, _, rest = path.partition("/")
        if kind == "optimizer":
            name, _, key = rest.rpartition("/")
            found.setdefault(name, {})[key] = value
    return found
