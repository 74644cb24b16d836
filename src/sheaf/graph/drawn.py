"""A task's model without memory, built once for all who only look at it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from sheaf.graph.lookups import put_back
from sheaf.task import Blueprint, Task


@dataclass(frozen=True, eq=False)
class Drawn:
    """Lends the blueprint of a task to one after the other; building one takes as long as tracing the model."""

    task: Task

    @cached_property
    def blueprint(self) -> Blueprint:
        """Built when it is first asked for; raises TaskError as Blueprint does."""
        return Blueprint(self.task)

    @contextmanager
    def lent(self) -> Iterator[Blueprint]:
        """The blueprint for a while, not to be filled; what is changed in its modules is put back."""
        with put_back(self.blueprint.model):
            yield self.blueprint
