"""Times one block alone, with real parameters and made-up inputs, for models that do not fit as a whole."""

import copy
import enum
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from sheaf.errors import SheafError
from sheaf.graph import ops
from sheaf.graph.example import converted, global_streams_kept, precision
from sheaf.graph.facts import BlockTime
from sheaf.graph.stopwatch import Clock
from sheaf.task import Streams, Task, arguments, as_loss, moved
from sheaf.task.blueprint import Blueprint

_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, type, torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True)
class Spec:
    """A tensor that was passed to a block, without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


@dataclass(frozen=True)
class Call:
    """How a block was called: positional and keyword arguments with a Spec in each tensor's place."""

    args: Any
    kwargs: Any


def record_calls(
    task: Task, blueprint: Blueprint, blocks: dict[str, nn.Module], batch: Any
) -> tuple[dict[str, Call], Any]:
    """The first call of each of these blocks, and the model's output as Specs, from one forward on fake tensors.

    What the model did not reach, because its path depends on values, is missing.
    """
    calls: dict[str, Call] = {}
    handles = [
        module.register_forward_pre_hook(_keep(name, calls), with_kwargs=True) for name, module in blocks.items()
    ]
    try:
        with global_streams_kept(), blueprint.mode:
            fake = converted(batch, blueprint.mode.from_tensor)
            positional, named = arguments(task, fake)
            with precision(task, torch.device("cpu")):
                output = blueprint.model(*positional, **named)
            return calls, _specs(output)
    except SheafError:
        raise
    except Exception:  # noqa: BLE001 the trace has told what a fake tensor cannot
        return calls, None
    finally:
        for handle in handles:
            handle.remove()


def _keep(name: str, calls: dict[str, Call]) -> Any:
    def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
        if name not in calls:
            calls[name] = Call(_specs(args), _specs(kwargs))

    return before


def _specs(value: Any) -> Any:
    def spec(tensor: Any) -> Any:
        return Spec(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)

    return tree_map(lambda leaf: _rebuilt(leaf, spec, {}), value)


def _rebuilt(value: Any, change: Callable[[Any], Any], done: dict[int, Any]) -> Any:
    """A copy of an object that carries tensors between blocks, such as a cache of keys, with each tensor changed."""
    if isinstance(value, (Tensor, Spec)):
        return change(value)
    if isinstance(value, _PLAIN) or callable(value):
        return value
    if id(value) not in done:
        if isinstance(value, list | tuple):
            done[id(value)] = type(value)(_rebuilt(item, change, done) for item in value)
        elif isinstance(value, dict):
            done[id(value)] = type(value)({name: _rebuilt(item, change, done) for name, item in value.items()})
        elif hasattr(value, "__dict__"):
            done[id(value)] = new = copy.copy(value)
            for name, item in vars(value).items():
                new.__dict__[name] = _rebuilt(item, change, done)
        else:
            return value
    return done[id(value)]


def time_block(
    task: Task,
    blueprint: Blueprint,
    module: nn.Module,
    call: Call,
    device: torch.device,
    budget_seconds: float,
    depth: int = 1,
) -> BlockTime | None:
    """Seconds of one block's forward and backward; None when it cannot run with made-up inputs.

    ``depth`` forwards run before their backwards, as in a model with that many such blocks: memory that is taken and
    given back costs time too (twice as much of it, on a CPU, in a model of four layers).
    """
    undo = _install(blueprint, module, device)
    streams = Streams(module, task.seed, device)
    try:
        streams.enter(0, 0)
        args, kwargs = _made((call.args, call.kwargs), module, device)

        def forward() -> list[Tensor]:
            streams.enter(0, 0)
            with precision(task, device):
                fresh_args, fresh_kwargs = tree_map(lambda leaf: _rebuilt(leaf, _same, {}), (args, kwargs))
                return ops.tensors(module(*fresh_args, **fresh_kwargs))

        return _timed(forward, device, budget_seconds, depth)
    except Exception:  # noqa: BLE001 a block that checks values may refuse made-up ones; the caller estimates it
        return None
    finally:
        streams.close()
        undo()


def time_loss(task: Task, output: Any, batch: Any, device: torch.device, budget_seconds: float) -> BlockTime | None:
    """Seconds of the loss function's forward and backward on made-up model outputs; None when it refuses them."""
    try:
        made = _made(output, None, device)
        real = moved(batch, device)

        def forward() -> list[Tensor]:
            with precision(task, device):
                return [as_loss(task.loss(made, real), 1).sum]

        return _timed(forward, device, budget_seconds, depth=1)
    except Exception:  # noqa: BLE001 as above
        return None


def _timed(forward: Callable[[], list[Tensor]], device: torch.device, budget_seconds: float, depth: int) -> BlockTime:
    clock = Clock(device)
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + budget_seconds
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 200):
        start = clock.now()
        results = [[tensor for tensor in forward() if tensor.requires_grad] for _ in range(depth)]
        middle = clock.now()
        gradients = [[torch.ones_like(tensor) for tensor in tensors] for tensors in results]
        ready = clock.now()
        while results:
            outputs = results.pop()
            if outputs:
                torch.autograd.backward(outputs, gradients.pop())
        stop = clock.now()
        clock.settle()
        times.append((clock.seconds(start, middle) / depth, clock.seconds(ready, stop) / depth))
    kept = times[1:]
    return BlockTime(statistics.median(item[0] for item in kept), statistics.median(item[1] for item in kept))


def _made(value: Any, module: nn.Module | None, device: torch.device) -> Any:
    tables = [m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)] if module is not None else []
    highest = min(tables, default=2)

    def make(spec: Spec) -> Tensor:
        if spec.dtype.is_floating_point:
            made = torch.rand(spec.shape, dtype=torch.float32).sub_(0.5).to(device=device, dtype=spec.dtype)
            return made.requires_grad_(spec.requires_grad)
        if spec.dtype is torch.bool:
            return torch.ones(spec.shape, dtype=torch.bool, device=device)
        return torch.randint(highest, spec.shape, device=device).to(spec.dtype)

    return tree_map(lambda leaf: _rebuilt(leaf, make, {}), value)


def _same(tensor: Any) -> Any:
    return tensor


def _install(blueprint: Blueprint, module: nn.Module, device: torch.device) -> Any:
    """Put real values into one block; returns what puts the fakes back."""
    name_of = {id(fake): name for name, fake in (blueprint.parameters | blueprint.buffers).items()}
    before: list[tuple[dict[str, Any], str, Any]] = []
    made: dict[int, Tensor] = {}
    for inner in module.modules():
        registries: list[dict[str, Any]] = [inner._parameters, inner._buffers, inner.__dict__]
        for registry in registries:
            for name, tensor in list(registry.items()):
                if isinstance(tensor, FakeTensor):
                    before.append((registry, name, tensor))
                    if id(tensor) not in made:
                        made[id(tensor)] = _real(blueprint, tensor, name_of.get(id(tensor)), device)
                    registry[name] = made[id(tensor)]

    def undo() -> None:
        for registry, name, tensor in before:
            registry[name] = tensor

    return undo


def _real(blueprint: Blueprint, fake: Tensor, name: str | None, device: torch.device) -> Tensor:
    value = (blueprint.compute(fake).detach() if name is None else blueprint.value(name)).to(device)
    return nn.Parameter(value, requires_grad=fake.requires_grad) if isinstance(fake, nn.Parameter) else value
