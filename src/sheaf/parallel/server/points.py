"""Fail points: named places of the protocol at which a test has this process killed, stopped, or held for a moment.

Armed by ``SHEAF_FAIL_AT=NAME:WHAT[:COUNT]`` in the environment, or by ``arm``; absent, each costs one comparison. WHAT
is ``kill`` (SIGKILL), ``stop`` (SIGSTOP) or ``pause`` (a tenth of a second); COUNT is which time the place is come to.
"""

import os
import signal
import time

NAMES = (
    "worker.before_push",  # before a push to each shard
    "worker.after_push",  # each shard has the push, none was told to apply it
    "worker.before_commit",  # where gradients may come late: each shard has it, of every place in a replica
    "worker.between_commits",  # one shard was told to apply it, another was not
    "worker.during_pull",
    "worker.before_claim",  # stolen shares: all shards have the push, it was not claimed
    "worker.after_claim",
    "primary.before_log",
    "primary.after_log",  # the backup was sent the entry, and has not answered
    "primary.before_ack",  # the backup has it
    "primary.after_ack",
    "primary.during_apply",
    "primary.during_norms",
    "primary.before_sum",  # lock-step: it has all gradients of a clock, and its backup none of them
    "backup.on_receipt",
    "backup.before_ack",
    "backup.at_promotion",
)
_DEEDS = ("kill", "stop", "pause")


class _Armed:
    name = ""
    what = "kill"
    left = 0


def arm(text: str) -> None:
    """Arm one point, such as ``worker.after_push:kill:3``; the empty text disarms.

    Raises ValueError for a name or deed that there is not.
    """
    name, _, rest = text.partition(":")
    what, _, count = rest.partition(":")
    if text and (name not in NAMES or (what or "kill") not in _DEEDS):
        raise ValueError(f"{text}: write NAME:WHAT:COUNT with a name of {NAMES} and one of {_DEEDS}")
    _Armed.name, _Armed.what, _Armed.left = name, what or "kill", int(count or 1)


def reached(name: str) -> None:
    """This process comes to a named place."""
    if _Armed.name != name:
        return
    _Armed.left -= 1
    if _Armed.left:
        return
    _Armed.name = ""
    if _Armed.what == "pause":
        time.sleep(0.1)
    else:
        os.kill(os.getpid(), signal.SIGKILL if _Armed.what == "kill" else signal.SIGSTOP)


arm(os.environ.get("SHEAF_FAIL_AT", ""))
