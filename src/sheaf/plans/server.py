"""What a plan says of a parameter server: how many shards, how stale values may be, what becomes of late gradients.

The one rule: a pull at clock c waits until the slowest worker's clock is at least c - s.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sheaf.errors import PlanError, nearest
from sheaf.plans.departing import undeparting
from sheaf.plans.served import unservable_replicas

ASYNC, APART = "async", "apart"
LATE = ("plain", "scaled", "compensated", "buffered", "delayed")


@dataclass(frozen=True)
class Server:
    """``shards`` hold the parameters (0: there is no server); ``staleness`` in clocks, None without bound.

    With ``apart`` each shard has a worker of its own, which computes nothing; else they lie beside the first replicas.

    ``late`` says what is done with a gradient computed on values that have changed since: taken as it is (``plain``),
    divided by one plus the updates in between (``scaled``), ``compensated`` (DC-ASGD), ``buffered`` until one from
    each worker is there, or ``delayed`` (delayed Nesterov): a plain step now, momentum when one from each is there. One
    more than ``dropped_beyond`` updates late is dropped, and its samples are used again.

    >>> Server.parse("2:staleness=4")
    Server(shards=2, staleness=4, late='plain', dropped_beyond=None, apart=False)
    >>> Server.parse("2:async", "scaled:20")
    Server(shards=2, staleness=None, late='scaled', dropped_beyond=20, apart=False)
    >>> Server.parse("1").exact, Server.parse("2:apart:async").serving
    (True, 2)
    """

    shards: int = 0
    staleness: int | None = 0
    late: str = "plain"
    dropped_beyond: int | None = None
    apart: bool = False

    @property
    def serving(self) -> int:
        """How many workers only serve."""
        return self.shards if self.apart else 0

    @property
    def exact(self) -> bool:
        """Whether every update is the sum over all workers, as with an all-reduce."""
        return self.staleness == 0

    @property
    def gathers(self) -> bool:
        """Whether late gradients wait for others."""
        return self.late in ("buffered", "delayed")

    @classmethod
    def parse(cls, text: str, late: str = "plain") -> "Server":
        """Read ``K``, ``K:staleness=S`` or ``K:async``, each also with ``K:apart`` in place of ``K``, and ``WAY`` or
        ``WAY:BOUND`` of what is late.

        Raises PlanError listing everything wrong.
        """
        broken: list[str] = []
        count, apart, rest = _parts(text)
        shards, staleness = 0, cls._staleness(text, rest, broken)
        if not re.fullmatch(r"\d+", count) or int(count) < 1:
            broken.append(f"server={text}: write the number of shards, 1 or more, such as server=2 or server=2:async")
        else:
            shards = int(count)
        way, _, bound = late.partition(":")
        if way not in LATE:
            broken.append(f"late={late}: {nearest(way, LATE)}")
        if (bound or late.endswith(":")) and not re.fullmatch(r"\d+", bound):
            broken.append(
                f"late={late}: after the colon stands how many updates late a gradient may be, such as {way}:20"
            )
        if not broken and staleness == 0 and late != "plain":
            broken.append(f"late={late}: with staleness=0 no gradient is late: drop it, or write server={count}:async")
        if broken:
            raise PlanError(broken)
        return cls(shards, staleness, way, int(bound) if bound else None, apart)

    @staticmethod
    def _staleness(text: str, rest: str, broken: list[str]) -> int | None:
        if rest == ASYNC:
            return None
        key, _, value = rest.partition("=")
        if not rest and not text.endswith(":"):
            return 0
        if key == "staleness" and value == ASYNC:
            return None
        if key != "staleness" or not re.fullmatch(r"-?\d+", value):
            if APART in rest.split(":"):
                broken.append(f"server={text}: apart comes right after the number of shards, such as 2:apart:async")
                return 0
            broken.append(
                f"server={text}: after the colon write staleness=S in clocks, such as staleness=4, or async; apart "
                "before that gives shards workers of their own"
            )
            return 0
        if int(value) < 0:
            broken.append(
                f"server={text}: staleness={value}: values cannot be newer than the slowest worker's; use 0 for "
                "lock-step, or async for no bound"
            )
        return max(0, int(value))


def _parts(text: str) -> tuple[str, bool, str]:
    """The number of shards, whether they are apart, and what follows."""
    count, _, rest = text.partition(":")
    if rest != APART and not rest.startswith(f"{APART}:"):
        return count, False, rest
    return count, True, rest.removeprefix(APART).removeprefix(":")


def beside(text: str, shards: int) -> str:
    """The same server with so many shards, beside replicas.

    >>> beside("4:apart:staleness=2", 2), beside("4", 1)
    ('2:staleness=2', '1')
    """
    rest = _parts(text)[2]
    return f"{shards}:{rest}" if rest else str(shards)


def counted(computing: int, serving: int) -> str:
    """How many workers a plan has, and for what.

    >>> counted(4, 0), counted(4, 2)
    ('4 workers', '6 workers (4 that compute, 2 that only serve)')
    """
    of_these = f" ({computing} that compute, {serving} that only serve)" if serving else ""
    return f"{computing + serving} workers{of_these}"


def outlives(served: Server, *, stolen: bool, local: bool = False) -> bool:
    """Whether a run goes on when it loses workers: where no step needs any one of them, or some only serve.

    In lock-step with ``local`` steps between meetings each has what its checkpoint needs, so all are needed.

    >>> outlives(Server.parse("2:async"), stolen=False), outlives(Server.parse("2"), stolen=False)
    (True, False)
    >>> [outlives(Server.parse("2:apart"), stolen=False, local=local) for local in (False, True)]
    [True, False]
    """
    return served.shards > 0 and (stolen or not served.exact or (served.apart and not local))


def unservable(
    server: str,
    late: str,
    *,
    dp: int,
    cuts: Mapping[str, int],
    parts: Sequence[tuple[str, str]],
    stolen: bool,
    meets: tuple[str, str],
) -> list[str]:
    """Every rule that a plan with this ``server`` and ``late`` breaks.

    ``cuts`` are the degrees to which it cuts a replica (``tp``, ``cp``, ``pp``) or its state (``zero``), ``parts`` its
    answers for modules, ``meets`` what it says of ``local`` and ``compress``.
    """
    if not server:
        return [] if late == "plain" else [f"late={late} is of a server that may be behind: add server=1:async"]
    try:
        served = Server.parse(server, late)
    except PlanError as error:
        return list(error.broken)
    broken: list[str] = []
    if dp == 1:
        broken.append(f"server={server} lies between several workers, and dp=1: raise dp or drop server")
    elif served.shards > dp and not served.apart:
        broken.append(
            f"server={server}: a worker holds at most one shard, and dp={dp}: use server={dp}, raise dp, or give "
            f"shards workers of their own with server={served.shards}:{APART}"
        )
    near = beside(server, min(dp, served.shards)) if served.apart else ""
    broken += unservable_replicas(server, near, dp=dp, **cuts, parts=parts)
    if stolen and not served.exact:
        broken.append(
            f"shares=stolen shares out one step among all workers, and with server={server} each has a step of its "
            f"own: use server={served.shards},shares=stolen (lock-step), or weighted shares"
        )
    local, compress = meets
    if local:
        several = ", ".join(f"{key}={cuts[key]}" for key in ("tp", "pp") if cuts[key] > 1)
        broken += undeparting(server, _parts(server)[0], late, local, several=several, stolen=stolen)
    if compress != "none":
        broken.append(f"server={server} and compress={compress} are two answers to how gradients meet: keep one")
    return broken
