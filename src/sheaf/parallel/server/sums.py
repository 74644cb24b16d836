"""Lock-step: a clock's gradients are added on the primary, and its backup is given their sum in place of each of them.

Until then pushes are the primary's alone, and their workers keep them. When it dies, they push again to the seat that
takes over, which has all of the clock or nothing of it: whose pushes are in the sum travels with it, in one entry.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sheaf.parallel.server.door import check_push
from sheaf.parallel.server.frame import BadFrame, Kind
from sheaf.parallel.server.log import Entry, losses, used


def added(pushes: Mapping[int, Entry]) -> dict[str, Tensor]:
    """Their gradients, added in the order of their keys in the room of the first, over the weight of all."""
    order = [pushes[key] for key in sorted(pushes)]
    room = order[0].arena
    assert room is not None
    sums: dict[str, Tensor] = {}
    for entry in order:
        for name, gradient in used(entry).items():
            if name in sums:
                sums[name] += gradient
            else:
                sums[name] = room.views[name] if entry is order[0] else room.views[name].copy_(gradient)
    metas = [entry.meta for entry in order]
    weight = math.fsum(weight for _, _, weight in losses(metas))
    factor = metas[0].get("expected", weight) / weight
    if sums and factor != 1.0:
        torch._foreach_mul_(list(sums.values()), factor)
    return {name: sums[name] for name in room.views if name in sums}


def forwarded(pushes: Mapping[int, Entry], sums: Mapping[str, Tensor]) -> Entry:
    """The entry that makes a clock's gradients meet: what ``added`` gave, and whose pushes are in it."""
    order = [pushes[key] for key in sorted(pushes)]
    room = order[0].arena
    assert room is not None
    parts = [[one.worker, one.incarnation, one.sequence, {**one.meta, "used": []}] for one in order]
    places = [place for place, piece in enumerate(room.form.pieces) if piece.name in sums]
    return Entry(Kind.APPLY, clock=order[0].clock, meta={"parts": parts, "used": places}, arena=room)


def received(entry: Entry) -> dict[int, Entry]:
    """By worker, the pushes in the sum that an entry has; the room of the sum is with the first."""
    found: dict[int, Entry] = {}
    for worker, incarnation, sequence, meta in entry.meta["parts"]:
        room = None if found else entry.arena
        found[worker] = Entry(Kind.PUSH, worker, incarnation, sequence, entry.clock, meta=meta, arena=room)
    return found


def told_of(pushes: Mapping[int, Entry]) -> dict[int, dict[str, Any]]:
    """By worker, what all its pushes told."""
    told: dict[int, dict[str, Any]] = {}
    for key in sorted(pushes):
        meta = pushes[key].meta
        mine = told.setdefault(pushes[key].worker, {"losses": [], "samples": 0, "seconds": 0.0})
        mine["losses"] += meta.get("losses", ())
        mine["samples"] += meta.get("samples", 0)
        mine["seconds"] += meta.get("seconds", 0.0)
    return told


def check_sum(meta: dict[str, Any], pieces: int, workers: int) -> None:
    """A sum must be of one push of each worker. Raises BadFrame."""
    check_push(meta, pieces)
    parts = meta.get("parts")
    if not isinstance(parts, list) or [part[:1] for part in parts if isinstance(part, list)] != [
        [worker] for worker in range(workers)
    ]:
        raise BadFrame(f"a sum is not of one push of each of {workers} workers")
    for part in parts:
        if len(part) != 4 or any(type(number) is not int for number in part[:3]) or not isinstance(part[3], dict):
            raise BadFrame("a sum tells of what are no pushes")
        check_push(part[3], pieces)
