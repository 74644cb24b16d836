"""The course of a stage's forward: what it comes by, in order, and after what nothing more concerns the stage."""

import random
from typing import Any

import numpy as np

from sheaf.errors import PlanError
from sheaf.parallel.stand_ins import signature
from sheaf.parallel.trees import line_of_model


class Finished(BaseException):
    """This stage has nothing more to do in the forward under way."""


class Course:
    """Events are numbered alike in every stage. ``steady`` is false from when the forward under way looked at a value,
    counted places or drew a number: the next one for such a batch may take another course, or pass other shapes.

    ``arrivals`` are kept with a course: what the stage received on it.
    """

    def __init__(self) -> None:
        self._tails: dict[Any, tuple[str, ...] | None] = {}  # by stage and batch, the events up to the last of concern
        self._arrivals: dict[Any, tuple[Any, ...]] = {}
        self._batch: Any = None
        self._path: list[str] = []
        self._last = 0
        self._drawn = _generators()
        self.steady = True

    def begin(self, stage: int, batch: Any) -> None:
        """A forward begins."""
        self._batch, self._path, self._last, self.steady = (stage, signature(batch)), [], 0, True
        self._drawn = _generators()

    def event(self, name: str, concerns: bool) -> None:
        """Something that every stage comes by; ends the run when nothing more concerns this one.

        Raises PlanError where a steady course is left.
        """
        tail, count = self._tails.get(self._batch), len(self._path)
        if tail is not None:
            if count >= len(tail):
                raise Finished
            if tail[count] != name:
                raise PlanError(
                    f"{line_of_model()}: the forward comes to {name}, and for batches of the same shapes it came to "
                    f"{tail[count]} before, though it reads no value and draws no number: keep what it depends on (a "
                    "counter, a list that grows) out of forward, or train without pp"
                )
        self._path.append(name)
        if concerns:
            self._last = len(self._path)

    def label(self, name: str) -> str:
        """The name of what the last event made, the same in every stage."""
        return f"{len(self._path)} {name}"

    def end(self, arrivals: tuple[Any, ...], *, whole: bool) -> None:
        """It has ended; ``whole``: the stage had to do with it to its end."""
        if self.steady and self._batch not in self._tails and not self._has_drawn():
            self._tails[self._batch] = None if whole else tuple(self._path[: self._last])
            self._arrivals[self._batch] = arrivals

    def arrivals(self, stage: int, batch: Any) -> tuple[Any, ...] | None:
        """What a stage received for such a batch, where it always will; None where that is not known."""
        return self._arrivals.get((stage, signature(batch)))

    def _has_drawn(self) -> bool:
        before, here = self._drawn, _generators()
        return before[0] != here[0] or any(
            not np.array_equal(one, other) for one, other in zip(before[1], here[1], strict=True)
        )


def _generators() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state()
