"""A task's optimizer over slices of parameters: it sees whole shapes when it is made, and pieces when it steps."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from sheaf.errors import TaskError
from sheaf.plans.layout import Piece
from sheaf.task import Blueprint


def sliced_optimizer(blueprint: Blueprint, slices: dict[str, tuple[Tensor, Piece]]) -> torch.optim.Optimizer:
    """The task's optimizer, made over the whole parameters without memory, then moved to this worker's slices.

    Groups and their settings are decided on whole shapes (``p.ndim >= 2`` works); state that the constructor makes is
    sliced too. ``slices`` maps parameter names to one-dimensional tensors; parameters it lacks are left out. Sound for
    elementwise optimizers only (``sheaf.task.probe.elementwise``).
    """
    fakes = blueprint.parameters
    with blueprint.recording():
        optimizer = blueprint.task.optimizer(list(fakes.values()))  # pyright: ignore[reportArgumentType]
    name_of = {id(fake): name for name, fake in fakes.items()}
    made = dict(optimizer.state)
    optimizer.state = defaultdict(dict)
    for group in optimizer.param_groups:
        names = [name_of.get(id(parameter)) for parameter in group["params"]]
        if None in names:
            raise TaskError("the optimizer holds a tensor that is no parameter of the model; give it parameters only")
        group["params"] = [slices[name][0] for name in names if name in slices]
    for fake, state in made.items():
        name = name_of[id(fake)]
        if name in slices:
            tensor, piece = slices[name]
            optimizer.state[tensor] = {
                key: _sliced(blueprint, value, fake, tensor, piece) for key, value in state.items()
            }
    return optimizer


def named_state(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as (tensors by ``parameter/key``, JSON-able values by parameter, group settings).

    ``names`` maps ids of the optimizer's parameters to names. Raises TaskError for state that is neither a tensor nor
    a plain value.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            elif value is None or isinstance(value, int | float | str | bool):
                plain.setdefault(name, {})[key] = value
            else:
                raise TaskError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} ({key}) in its state; a checkpoint "
                    "holds tensors and plain values only"
                )
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return tensors, {"state": plain, "groups": [_plain(group) for group in groups]}


def load_named_state(
    optimizer: torch.optim.Optimizer, names: dict[int, str], tensors: dict[str, Tensor], values: dict[str, Any]
) -> None:
    """Put back what ``named_state`` gave."""
    by_name: dict[str, dict[str, Any]] = {name: dict(state) for name, state in values["state"].items()}
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        by_name.setdefault(name, {})[key] = tensor
    for group, saved in zip(optimizer.param_groups, values["groups"], strict=True):
        for key, value in saved.items():
            if isinstance(group.get(key), Tensor):
                group[key].fill_(value)
            else:
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
        for parameter in group["params"]:
            state = by_name.get(names[id(parameter)])
            if state is not None:
                # step counters stay on the CPU where the optimizer put them; the rest lives with its parameter
                optimizer.state[parameter] = {
                    key: value.to(parameter.device) if isinstance(value, Tensor) and value.ndim else value
                    for key, value in state.items()
                }


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()}


def _sliced(blueprint: Blueprint, value: Any, fake: Tensor, tensor: Tensor, piece: Piece) -> Any:
    if not isinstance(value, Tensor):
        return value
    real = blueprint.compute(value)
    if value.shape == fake.shape:
        real = real.flatten()[piece.start : piece.stop].clone()
        return real.to(device=tensor.device, dtype=tensor.dtype if real.is_floating_point() else None)
    return real
