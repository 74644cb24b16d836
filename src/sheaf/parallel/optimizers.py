"""A task's optimizer over slices of parameters: it sees whole shapes when it is made, and pieces when it steps."""

import functools
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sheaf.errors import PlanError, TaskError
from sheaf.graph.refusals import refuse_dense
from sheaf.parallel.portion import Portion
from sheaf.parallel.values import decoded, encoded
from sheaf.plans.layout import Piece
from sheaf.task.recorder import replace_tensors


def learning_rate(optimizer: torch.optim.Optimizer) -> float | None:
    """That of the first group; None for an optimizer that has none."""
    rate = optimizer.param_groups[0].get("lr") if optimizer.param_groups else None
    return None if rate is None else float(rate)


def whole_optimizer(portion: Portion, parameters: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    """The task's optimizer over whole parameters by name.

    Where it is SparseAdam, its step raises TaskError for a dense gradient, before it changes anything.
    """
    optimizer = portion.task.optimizer(list(parameters.values()))  # pyright: ignore[reportArgumentType]
    if isinstance(optimizer, torch.optim.SparseAdam):
        names = {id(value): name for name, value in parameters.items()}
        optimizer.register_step_pre_hook(lambda made, *_: refuse_dense(made, names))
    return optimizer


def sliced_optimizer(portion: Portion, slices: Mapping[str, tuple[Tensor, Piece | None]]) -> torch.optim.Optimizer:
    """The task's optimizer, made over the whole parameters without memory, then moved to this worker's slices.

    Groups and their settings are decided on whole shapes (``p.ndim >= 2`` works); state that the constructor makes is
    sliced too, and every other tensor that it made is computed. ``slices`` maps parameter names to one-dimensional
    tensors (or, without a piece, to what is held of the parameter whole); parameters it lacks are left out. Sound for
    elementwise optimizers only (``sheaf.task.probe.elementwise``).

    Raises TaskError for an optimizer over tensors that are no parameters, and PlanError for one that keeps whole
    parameters, or tensors in objects of its own, where they cannot be exchanged.
    """
    fakes = portion.as_trained
    with portion.recording():
        optimizer = portion.task.optimizer(list(fakes.values()))  # pyright: ignore[reportArgumentType]
    name_of = {id(fake): name for name, fake in fakes.items()}
    real = _computing(portion, set(name_of))
    made = dict(optimizer.state)
    optimizer.state = defaultdict(dict)
    for group in optimizer.param_groups:
        names = [name_of.get(id(parameter)) for parameter in group["params"]]
        if None in names:
            raise TaskError("the optimizer holds a tensor that is no parameter of the model; give it parameters only")
        group["params"] = [slices[name][0] for name in names if name is not None and name in slices]
        group.update({key: replace_tensors(value, real) for key, value in group.items() if key != "params"})
    for owner, state in made.items():
        name = name_of.get(id(owner))
        if name is None:
            optimizer.state[owner] = replace_tensors(state, real)
        elif name in slices:
            tensor, piece = slices[name]
            optimizer.state[tensor] = {key: _sliced(value, owner, tensor, piece, real) for key, value in state.items()}
    optimizer.defaults.update({key: replace_tensors(value, real) for key, value in optimizer.defaults.items()})
    for key, value in list(vars(optimizer).items()):
        if key not in ("param_groups", "state", "defaults"):
            changed = replace_tensors(value, real)
            if changed is not value:
                setattr(optimizer, key, changed)
    _refuse_whole(optimizer)
    return optimizer


def named_state(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as (live tensors by ``parameter/key``, JSON-able values by parameter, group settings).

    ``names`` maps ids of the optimizer's parameters to names. Raises TaskError for state that is neither a tensor nor
    a plain value.
    """
    kind = type(optimizer).__name__
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        name = names.get(id(parameter))
        if name is None:
            raise TaskError(
                f"{kind} keeps state ({parameter!r}) that belongs to no parameter; a checkpoint has no place"
            )
        for key, value in state.items():
            if isinstance(value, Tensor) and value.layout is not torch.strided:
                raise TaskError(
                    f"{kind} keeps {key} of {name} as a sparse tensor, which no checkpoint here can hold: use it "
                    "without momentum, or build the table with sparse=False"
                )
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            else:
                plain.setdefault(name, {})[key] = encoded(value, f"{kind}'s state {key} of {name}", tensors=False)
    groups = [
        encoded({key: value for key, value in group.items() if key != "params"}, f"{kind}'s group {index}")
        for index, group in enumerate(optimizer.param_groups)
    ]
    return tensors, {"state": plain, "groups": groups}


def load_named_state(
    optimizer: torch.optim.Optimizer, names: dict[int, str], tensors: dict[str, Tensor], values: dict[str, Any]
) -> None:
    """Put back what ``named_state`` gave; tensors are copied."""
    by_name: dict[str, dict[str, Any]] = {name: decoded(state) for name, state in values["state"].items()}
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        by_name.setdefault(name, {})[key] = tensor
    optimizer.state.clear()
    for group, saved in zip(optimizer.param_groups, values["groups"], strict=True):
        for key, value in decoded(saved).items():
            group[key] = _like(value, group.get(key))
        for parameter in group["params"]:
            state = by_name.get(names[id(parameter)])
            if state is not None:
                optimizer.state[parameter] = {
                    key: _placed(value, parameter, state_device(key, parameter, group))
                    if isinstance(value, Tensor)
                    else value
                    for key, value in state.items()
                }


def _placed(value: Tensor, parameter: Tensor, device: torch.device) -> Tensor:
    """A copy on a device. What has a number for each of the parameter's lies in memory as that does: fused kernels take
    that for granted, and go by memory alone.
    """
    if value.shape != parameter.shape:
        return value.to(device, copy=True)
    return torch.empty_like(parameter.detach(), dtype=value.dtype, device=device).copy_(value)


def state_device(key: str, parameter: Tensor, group: dict[str, Any]) -> torch.device:
    """Where an optimizer wants a tensor of its state: with its parameter, but step counters on the CPU.

    As ``torch.optim.Optimizer.load_state_dict`` has it: kernels that are fused or captured read the counter there too.
    """
    on_host = key == "step" and not (group.get("fused") or group.get("capturable"))
    return torch.device("cpu") if on_host else parameter.device


def _like(value: Any, held: Any) -> Any:
    if isinstance(held, Tensor):
        return held.copy_(torch.as_tensor(value))
    if isinstance(held, list | tuple) and isinstance(value, list | tuple) and len(held) == len(value):
        return type(value)(_like(one, other) for one, other in zip(value, held, strict=True))
    return value


def _computing(portion: Portion, parameters: set[int]) -> Callable[[Tensor], Tensor]:
    """Gives the real value of a tensor that the optimizer made, the same for the same; parameters stay as they are."""
    computed: dict[int, Tensor] = {}

    def real(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, FakeTensor) or id(tensor) in parameters:
            return tensor
        if id(tensor) not in computed:
            computed[id(tensor)] = portion.compute(tensor).detach().clone()
        return computed[id(tensor)]

    return real


def _sliced(value: Any, whole: Tensor, tensor: Tensor, piece: Piece | None, real: Callable[[Tensor], Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return replace_tensors(value, real)
    made = real(value).clone()
    if value.shape == whole.shape and value.ndim:
        if piece is None:
            return _placed(made, tensor, tensor.device)
        return made.flatten()[piece.start : piece.stop].clone().to(tensor.device)
    return made


def _refuse_whole(optimizer: torch.optim.Optimizer) -> None:
    for path in _fakes(vars(optimizer), type(optimizer).__name__, set()):
        raise PlanError(
            f"{path} is a tensor made with the optimizer that cannot be exchanged for this worker's part: use zero=0 "
            "without offload, or keep it in the optimizer's state, groups or attributes, and parameters in groups only"
        )


def _fakes(value: Any, path: str, seen: set[int]) -> Iterator[str]:
    """Paths of the fake tensors that an object still reaches."""
    if isinstance(value, FakeTensor):
        yield path
    if id(value) in seen or isinstance(value, Tensor | type | ModuleType | str | int | float | bool | None):
        return
    seen.add(id(value))
    for name, item in _reached(value):
        yield from _fakes(item, f"{path}{name}", seen)


def _reached(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield f" key {key!r:.60}", key
            yield f".{key}" if isinstance(key, str) else f"[{key!r:.60}]", item
    elif isinstance(value, list | tuple | set | frozenset | deque):
        for index, item in enumerate(value):
            yield f"[{index}]", item
    elif isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield f" closure of {value.__name__}", cell.cell_contents
            except ValueError:  # not filled yet
                continue
        yield " defaults", value.__defaults__
    elif isinstance(value, MethodType):
        yield "", value.__self__
        yield "", value.__func__
    elif isinstance(value, functools.partial):
        yield " arguments", (value.func, value.args, value.keywords)
    else:
        yield "", getattr(value, "__dict__", None)
        for slot in getattr(type(value), "__slots__", ()) if not hasattr(value, "__dict__") else ():
            yield f".{slot}", getattr(value, slot, None)
