"""What a shard shows of itself: its values and what was told of a step, or all its state, piece by piece."""

from collections.abc import Callable
from typing import Any

from sheaf.parallel.optimizers import learning_rate
from sheaf.parallel.server.frame import BadFrame, Head, Kind
from sheaf.parallel.server.log import Entry, losses
from sheaf.parallel.server.places import Arena
from sheaf.parallel.server.restore import kept, packed
from sheaf.parallel.server.shard import Shard

PIECE_BYTES = 1 << 20  # of a shard's state in one message


def readable(shard: Shard, head: Head) -> bool:
    """Whether a worker may have the values that it asks for now."""
    if head.kind == Kind.PULL:
        return shard.allows(head.clock)
    return finished(shard) >= head.clock or not (shard.terms.exact or shard.clocks.workers)


def finished(shard: Shard) -> int:
    """How many clocks every worker has behind it, and the values have in them."""
    return shard.applied if shard.terms.exact else shard.clocks.slowest


def read(shard: Shard, head: Head, entry: Entry, out: Arena, log: Callable[[Entry], None]) -> dict[str, Any]:
    """Copy the values to ``out``; what is told with them."""
    if head.kind == Kind.GRADIENT:
        for name, view in out.views.items():
            if name in shard.watched:
                view.copy_(shard.watched[name])
        places = [place for place, piece in enumerate(shard.form.pieces) if piece.name in shard.watched]
        return {"version": shard.version, "used": places}
    earlier = shard.pulled_copy(entry.worker, head.request)
    if earlier is None and head.kind == Kind.PULL and shard.terms.late == "compensated":
        log(Entry(Kind.PULLED, entry.worker, entry.incarnation, sequence=head.request))
    out.copy_(earlier.views if earlier is not None else shard.values)
    told = shard.told.get(head.clock - 1, {})
    found = {
        "version": shard.version,
        "losses": losses(told.values()),
        "samples": sum(int(each.get("samples", 0)) for each in told.values()),
        "counts": {str(worker): len(each.get("losses", ())) for worker, each in told.items()},
        "rate": learning_rate(shard.optimizer),
        "slowest": shard.clocks.slowest,
        "stop_at": shard.stop_at,
        **dealt(shard, entry.worker),
    }
    if shard.terms.exact:
        found["norm"] = shard.whole_norms.get(head.clock - 1)
    if shard.terms.lent:
        found["applied"] = shard.applied
        found["seconds"] = {str(worker): each["seconds"] for worker, each in told.items() if "seconds" in each}
        found["returned"] = {str(worker): each["returned"] for worker, each in told.items() if "returned" in each}
    return found


def dealt(shard: Shard, worker: int) -> dict[str, Any]:
    """What a worker computes next, and how many parts came back so far, where shard 0 says so."""
    return shard.dealing.told(worker) if shard.dealing is not None else {}


class Pictures:
    """A shard's state as bytes, made when a worker first asks and given piece by piece."""

    def __init__(self) -> None:
        self._made: dict[int, bytes] = {}

    def give(self, shard: Shard, worker: int, meta: dict[str, Any]) -> tuple[dict[str, Any], memoryview | None]:
        """How many bytes there are, or those from ``start`` on as many as ``size`` (the lock is held).

        Raises BadFrame for others than there are.
        """
        start, size = meta.get("start"), meta.get("size")
        if start is None or worker not in self._made:
            self._made[worker] = packed(*kept(shard))
            return {"total": len(self._made[worker])}, None
        made = self._made[worker]
        if type(start) is not int or type(size) is not int or not 0 <= start < start + size <= len(made):
            raise BadFrame(f"a worker asks for bytes {start} to {size} of {len(made)}")
        if start + size == len(made):
            del self._made[worker]
        return {}, memoryview(made)[start : start + size]

    def forget(self, worker: int) -> None:
        """A worker is gone, perhaps in the midst of reading (the lock is held)."""
        self._made.pop(worker, None)
