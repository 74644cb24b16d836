"""Plans how to split the training of any PyTorch model, runs the plan, and proves that the answer did not change."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sheaf.api.build import build
    from sheaf.api.fit import fit
    from sheaf.api.measure import measure
    from sheaf.api.plan import plan
    from sheaf.api.train import train
    from sheaf.api.verify import verify
    from sheaf.errors import SheafError
    from sheaf.parallel import Step
    from sheaf.plans import Plan
    from sheaf.task import Loss, Task

__all__ = ["Loss", "Plan", "SheafError", "Step", "Task", "build", "fit", "measure", "plan", "train", "verify"]
__version__ = "0.1.0"

_HOMES = {
    "Loss": "sheaf.task",
    "Plan": "sheaf.plans",
    "SheafError": "sheaf.errors",
    "Step": "sheaf.parallel",
    "Task": "sheaf.task",
    "build": "sheaf.api.build",
    "fit": "sheaf.api.fit",
    "measure": "sheaf.api.measure",
    "plan": "sheaf.api.plan",
    "train": "sheaf.api.train",
    "verify": "sheaf.api.verify",
}


def __getattr__(name: str) -> Any:
    # a room is imported when its first name is used: planning needs no launcher, a task no planner
    if name not in _HOMES:
        raise AttributeError(f"sheaf has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
