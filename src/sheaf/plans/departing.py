"""Steps between meetings beside a parameter server: which ways to meet go with shards, and which do not."""

from sheaf.errors import PlanError
from sheaf.plans.local import Local

KINDS = ("average", "slowmo", "diloco")  # what an optimizer on a shard does with departures


def undeparting(server: str, plain: str, late: str, local: str, *, several: str, stolen: bool) -> list[str]:
    """Every rule that a plan with both ``server`` and ``local`` breaks; ``plain`` is the server without staleness.

    ``several`` names what makes several workers of a replica, such as ``tp=2``.

    >>> undeparting("2:async", "2", "plain", "16:diloco", several="", stolen=False)
    []
    """
    try:
        meets = Local.parse(local)
    except PlanError:
        return []  # said elsewhere
    if not meets.every:
        return [f"server={server},local={local}: with 0 steps between meetings there are none: drop local"]
    both, near = f"server={server},local={local}", f"server={server},local={meets.every}:diloco"
    rules = (
        (
            meets.kind not in KINDS,
            (
                f"shards step by what each worker departed by, and {meets.kind} is between workers themselves: use "
                f"{near}, or drop server"
            ),
        ),
        (
            meets.after > 0,
            (
                "shards hold an optimizer over departures from the first step on, and after= wants one over gradients: "
                "drop after, or server"
            ),
        ),
        (
            meets.fragments > 1 or meets.overlap > 0,
            "a worker pushes and pulls all that it holds at once: drop fragments and overlap, or server",
        ),
        (
            meets.rounds,
            (
                "who waits for whom is what staleness says: use "
                f"server={plain}:staleness=1,local={meets.every}:diloco in place of quorum and steps, or drop server"
            ),
        ),
        (
            bool(several),
            f"a meeting here is of replicas of one worker each, and {several} makes several of one: drop it, or server",
        ),
        (
            stolen,
            (
                "between meetings each worker steps by its own share, and shares=stolen lends out one step among all: "
                "drop shares"
            ),
        ),
        (
            late.startswith("compensated"),
            (
                "late=compensated guesses from a gradient how it changed, and departures are none: use late=scaled or "
                "late=delayed"
            ),
        ),
        (
            late.startswith("delayed") and not (meets.kind == "diloco" and meets.momentum),
            (
                f"late=delayed splits a step of Nesterov's momentum in two, which {meets.kind} has not: use {near}, "
                "or late=buffered"
            ),
        ),
    )
    return [f"{both}: {why}" for is_broken, why in rules if is_broken]
