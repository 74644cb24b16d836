"""What to write where a task was given something built already, and wants a function that builds or calls it."""

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def instead(field: str, value: object) -> str:
    """What is wrong with such a ``value`` for the field, and the line to write; empty where it is nothing of the kind.

    >>> print(instead("loss", nn.MSELoss()))
    loss is a module, MSELoss, which is called with (output, target); Sheaf calls loss(output, batch): write \
criterion = nn.MSELoss() before the task, and loss=lambda output, batch: criterion(output, batch[1])
    """
    looked_for = {"loss": _loss, "model": _model, "optimizer": _optimizer, "scheduler": _scheduler}.get(field)
    return looked_for(value) if looked_for is not None else ""


def _loss(value: object) -> str:
    kind = value if isinstance(value, type) else type(value)
    if not issubclass(kind, nn.Module):
        return ""
    what = "a class" if kind is value else "a module"
    called = "which is called with its settings" if kind is value else "which is called with (output, target)"
    return (
        f"loss is {what}, {kind.__name__}, {called}; Sheaf calls loss(output, batch): write criterion = "
        f"{_written(kind)}() before the task, and loss=lambda output, batch: criterion(output, batch[1])"
    )


def _model(value: object) -> str:
    if not isinstance(value, nn.Module):
        return ""
    kind = _written(type(value))
    return (
        f"model is a module, {type(value).__name__}, that is built already; Sheaf calls model() to build it, "
        f"without memory and from the task's seed: write model=lambda: {kind}(...) (weights= takes a safetensors "
        "file to start from)"
    )


def _optimizer(value: object) -> str:
    if not isinstance(value, Optimizer):
        return ""
    rate = value.defaults.get("lr")
    setting = f", lr={rate:g}" if type(rate) in (int, float) else ""
    return (
        f"optimizer is built already, {type(value).__name__} over other parameters; Sheaf calls optimizer(parameters) "
        f"with those of the model that it trains: write optimizer=lambda parameters: {_written(type(value))}"
        f"(parameters{setting})"
    )


def _scheduler(value: object) -> str:
    if not isinstance(value, LRScheduler):
        return ""
    return (
        f"scheduler is built already, {type(value).__name__} of another optimizer; Sheaf calls scheduler(optimizer) "
        f"with the one that it steps: write scheduler=lambda optimizer: {_written(type(value))}(optimizer, ...)"
    )


def _written(kind: type) -> str:
    """How a script that imports torch and nn calls a class."""
    places = (
        ("torch.nn.", "nn."),
        ("torch.optim.lr_scheduler", "torch.optim.lr_scheduler."),
        ("torch.optim.", "torch.optim."),
    )
    return next((short for place, short in places if kind.__module__.startswith(place)), "") + kind.__name__
