"""What the rehearsals of one task for several numbers of workers have in common."""

from dataclasses import dataclass, field
from typing import Any

from sheaf.task.blueprint import Blueprint


@dataclass(frozen=True, eq=False)
class Common:
    """The task's model on fake tensors, and what was counted when it ran alone, by what was kept whole."""

    blueprint: Blueprint
    alone: dict[Any, Any] = field(default_factory=dict[Any, Any])
