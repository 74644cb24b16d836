"""Which replicas a parameter server can serve: what splits one is fine, what replicas or their workers share is not."""

from collections.abc import Sequence

from sheaf.plans.again import AGAIN


def unservable_replicas(
    server: str, beside: str, *, dp: int, tp: int, cp: int, pp: int, zero: int, parts: Sequence[tuple[str, str]]
) -> list[str]:
    """Every rule that replicas of this kind break beside ``server``; ``beside``: the same with no workers of its own,
    empty where it has none.

    >>> unservable_replicas("1", "", dp=2, tp=2, cp=1, pp=2, zero=0, parts=[])
    []
    """
    broken: list[str] = []
    split = [f"{key}={degree}" for key, degree in (("tp", tp), ("pp", pp)) if degree > 1]
    if zero:
        broken.append(
            f"server={server} holds optimizer state and values once already, so zero={zero} has nothing left to shard: "
            f"drop zero, or use dp={dp},zero={zero} without a server"
        )
    if cp > 1:
        inside = ",".join([f"dp={dp}", f"tp={tp * cp}", *([f"pp={pp}"] if pp > 1 else [])])
        broken.append(
            f"server={server} takes a gradient from one worker of each replica, and cp={cp} finds parts of it on "
            f"several, which would meet before every push: use {inside},sequence=1,server={server}"
        )
    for glob, answer in parts:
        if answer in ("tp", "ep"):
            broken.append(
                f"server={server} is pushed to by replicas that go on by themselves, and {glob}={answer} needs all of "
                f"them in every forward: drop it, or split layers inside replicas, as dp={dp},tp=2,server={server} does"
            )
        elif answer not in ("whole", AGAIN):
            broken.append(
                f"{glob}={answer} lets rows travel between replicas, and with server={server} gradients meet on "
                f"shards, where embeddings lie by rows: drop {glob}={answer}"
            )
    if beside and split:
        broken.append(
            f"server={server} gives its shards workers of their own, which replicas of one worker each push to, and "
            f"{', '.join(split)} makes several of one: use server={beside}, beside the replicas"
        )
    return broken
