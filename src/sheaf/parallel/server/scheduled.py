"""A worker's scheduler where local steps meet on shards out of lock-step: its place now, and that at the last meeting.

From there a run goes on that is resumed, so a checkpoint has the learning rate of there, too.
"""

from typing import Any

import torch

from sheaf.errors import TaskError
from sheaf.parallel.values import encoded


class Scheduled:
    """Steps ``scheduler``, of ``optimizer``, once for each step of the run; ``steps`` are behind it."""

    def __init__(self, scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
        self._scheduler, self._optimizer, self.steps = scheduler, optimizer, 0
        self._moves = set[str]()  # settings of the optimizer that the scheduler has ever changed
        self._met: tuple[int, Any, list[dict[str, Any]]] | None = None
        self.meet()

    def go(self, steps: int) -> None:
        """The learning rate goes with the step, however often this worker stepped."""
        while self._scheduler is not None and self.steps < steps:
            before = self._settings()
            self._scheduler.step()
            self.steps += 1
            for one, other in zip(before, self._settings(), strict=True):
                self._moves |= {key for key in other if other[key] != one.get(key)}

    def meet(self) -> None:
        """This is a meeting."""
        if self._scheduler is not None:
            self._met = self.steps, self._state(), self._settings()

    def as_met(self, values: dict[str, Any]) -> dict[str, Any]:
        """What ``Step.state`` gave, with the schedule as at the last meeting."""
        if self._met is None:
            return values
        _, scheduler, settings = self._met
        groups = [
            group | {key: value for key, value in met.items() if key in self._moves}
            for group, met in zip(values["optimizer"]["groups"], settings, strict=True)
        ]
        return values | {"scheduler": scheduler, "optimizer": values["optimizer"] | {"groups": groups}}

    @property
    def steps_met(self) -> int:
        """How many were behind it at the last meeting."""
        return self.steps if self._met is None else self._met[0]

    def _state(self) -> Any:
        try:
            return encoded(self._scheduler.state_dict(), type(self._scheduler).__name__)
        except TaskError:  # no checkpoint can hold it, and whoever writes one is told
            return None

    def _settings(self) -> list[dict[str, Any]]:
        """The optimizer's settings by group, as they are now."""
        found: list[dict[str, Any]] = []
        for group in self._optimizer.param_groups:
            try:
                found.append(encoded({key: value for key, value in group.items() if key != "params"}, "a setting"))
            except TaskError:
                found.append({})
        return found
