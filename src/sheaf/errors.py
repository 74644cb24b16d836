"""What can go wrong, as a tree of errors; each message says what was found, what was wanted and what to do.

- SheafError
    - TaskError        the task contradicts itself or cannot be read
    - DataError        the data set is empty, or an item cannot be had
    - PlanError        the plan breaks rules; every broken rule is listed
    - ClusterError     a cluster file is wrong, or a measurement failed
    - RunError         a run directory is in use, or a checkpoint does not fit
    - NonFiniteLoss    a loss is NaN or infinite
    - WorkerFailed     a worker raised, hung or died
"""

import difflib
from collections.abc import Iterable, Sequence

_CLOSE = 0.5  # of 1: words less alike than that are not meant


class SheafError(Exception):
    """Any mistake that Sheaf can explain; the command line prints it without a traceback."""


class _Listed(SheafError):
    """An error that carries every broken rule, not only the first."""

    def __init__(self, broken: str | Sequence[str]) -> None:
        self.broken: tuple[str, ...] = (broken,) if isinstance(broken, str) else tuple(broken)
        lines = self.broken if len(self.broken) == 1 else tuple(f"- {rule}" for rule in self.broken)
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type, tuple[tuple[str, ...]]]:
        return type(self), (self.broken,)


class TaskError(_Listed):
    """The task contradicts itself or cannot be read."""


class DataError(SheafError):
    """The data set is empty, has no length, or an item cannot be had."""


class PlanError(_Listed):
    """The plan breaks rules; ``broken`` lists every one with its remedy."""


class ClusterError(_Listed):
    """A cluster file is wrong, or a measurement failed."""


class RunError(SheafError):
    """A run directory is in use, or a checkpoint does not fit the task and plan."""


class NonFiniteLoss(SheafError):
    """A microbatch's loss is NaN or infinite; nothing of that step was applied."""

    def __init__(self, step: int, microbatch: int, value: float, advice: str = "") -> None:
        self.step, self.microbatch, self.value, self.advice = step, microbatch, value, advice
        super().__init__(
            f"the loss of microbatch {microbatch} at step {step} is {value}; the step was not applied. "
            + (advice or "Lower the learning rate, clip gradients (clip=1.0), or look at that microbatch's samples.")
        )

    def __reduce__(self) -> tuple[type, tuple[int, int, float, str]]:
        return type(self), (self.step, self.microbatch, self.value, self.advice)


class WorkerFailed(SheafError):
    """A worker raised, hung or died; the message names it and holds the first traceback by time."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint naming the known word closest to ``word``, or all of them when none is close.

    >>> nearest("zer", ["dp", "zero"])
    'did you mean zero?'
    >>> nearest("x", ["dp", "zero"])
    'known: dp, zero'

    Of words that are as close, the first is named.

    >>> nearest("dpp", ["dp", "pp"]), nearest("dpp", ["pp", "dp"])
    ('did you mean dp?', 'did you mean pp?')
    """
    words = list(known)
    closest = max(words, key=lambda one: difflib.SequenceMatcher(None, one, word).ratio(), default="")
    if difflib.SequenceMatcher(None, closest, word).ratio() >= _CLOSE:
        return f"did you mean {closest}?"
    return f"known: {', '.join(sorted(words))}"


def first_line(error: BaseException) -> str:
    """What an error says first; empty where it says nothing."""
    return (str(error).strip().splitlines() or [""])[0]
