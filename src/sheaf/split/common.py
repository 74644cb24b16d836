"""What the rehearsals of one task for several numbers of workers have in common."""

from dataclasses import dataclass, field
from typing import Any

from sheaf.graph.example import converted, example
from sheaf.split.recalled import Known
from sheaf.task import Task
from sheaf.task.blueprint import Blueprint


@dataclass(frozen=True, eq=False)
class Common:
    """The task's model on fake tensors, and what was counted when it ran alone, by what was kept whole.

    ``examples`` are batches with values, by the number of samples; ``known`` is what operators give on fake tensors.
    """

    blueprint: Blueprint
    alone: dict[Any, Any] = field(default_factory=dict[Any, Any])
    examples: dict[int, Any] = field(default_factory=dict[int, Any])
    known: Known = field(default_factory=dict[Any, Any])

    def batch(self, task: Task, samples: int) -> Any:
        """The task's example batch on the blueprint's fake tensors."""
        if samples not in self.examples:
            self.examples[samples] = example(task, samples)
        return converted(self.examples[samples], self.blueprint.mode.from_tensor)
