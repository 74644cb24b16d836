"""Which worker's failure was the first, and how it is told."""

import pickle
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from sheaf.errors import SheafError, WorkerFailed


def is_settled(answers: Mapping[int, dict[str, Any]], gone: Mapping[int, int | None]) -> bool:
    """Whether the cause of a failure is known already: a death that has a status, or an exception of somebody's own."""
    if any(status is not None for status in gone.values()):
        return True
    return any("raised" in answer and not answer["lost_peer"] for answer in answers.values())


def failure(workers: int, answers: Mapping[int, dict[str, Any]], gone: Mapping[int, int | None]) -> SheafError:
    """The error to raise for a run in which a worker raised or died.

    ``gone`` maps workers that ended without an answer to their exit status (minus the signal; None: not known). What
    workers raised because they lost a peer is told only when nothing else explains it.
    """
    raised = sorted(((answer["at"], rank) for rank, answer in answers.items() if "raised" in answer))
    own = [rank for _, rank in raised if not answers[rank]["lost_peer"]]
    if own:
        return _retold(own[0], workers, answers[own[0]])
    if gone:
        rank = min(gone, key=lambda rank: (gone[rank] is None, rank))
        return WorkerFailed(f"worker {rank} of {workers} {ending(gone[rank])}")
    first = raised[0][1]
    return _retold(first, workers, answers[first])


def _retold(rank: int, workers: int, answer: dict[str, Any]) -> SheafError:
    if answer["exception"] is not None:
        error = pickle.loads(answer["exception"])
        error.add_note(f"raised by worker {rank} of {workers}:\n{answer['raised']}")
        return error
    return WorkerFailed(f"worker {rank} of {workers} raised {answer['what']}\n\n{answer['raised']}")


def ending(status: int | None) -> str:
    """How a worker ended, in words."""
    if status is None:
        return "closed its connection before it returned"
    if status >= 0:
        return f"ended with exit code {status} before it returned"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    why = "; the system ends processes like this when memory runs out" if name == "SIGKILL" else ""
    return f"was killed by {name} before it returned{why}"


def late(workers: int, answers: Mapping[int, dict[str, Any]], stacks: Sequence[str], timeout_s: float) -> WorkerFailed:
    """The error for a run that took longer than its time-out, with where every worker was.

    Workers inside a collective wait for others, so those that are elsewhere are told first.
    """
    waiting = [rank for rank in range(workers) if rank not in answers]
    waiting.sort(key=lambda rank: (_in_collective(stacks[rank]), rank))
    told = [
        f"worker {rank}:\n{stacks[rank].strip() or '  gives no stack: it is stopped, or in native code'}"
        for rank in waiting
    ]
    done = f" ({len(answers)} of {workers} had returned)" if answers else ""
    headline = f"the workers took longer than {timeout_s:g} s{done}; look at worker {waiting[0]} first"
    return WorkerFailed("\n\n".join([headline, *told]))


def _in_collective(stack: str) -> bool:
    frames = [line for line in stack.splitlines() if line.lstrip().startswith("File ")]
    return bool(frames) and any("distributed_c10d.py" in frame for frame in frames[:3])


def own_frames(stack: str) -> str:
    """A stack as faulthandler wrote it, innermost frame first, without the launcher's own frames at its end."""
    kept: list[str] = []
    skipping = False
    for line in stack.splitlines():
        skipping = (skipping and line.startswith("  File")) or ("launch" in line and line.endswith(" in _answer"))
        if not skipping:
            kept.append(line)
    return "\n".join(kept)
