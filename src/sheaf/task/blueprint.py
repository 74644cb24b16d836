"""A model built without memory, whose tensors are then made one by one, each from (seed, name) or a weights file."""

import copy
import random
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sheaf.errors import TaskError
from sheaf.task.keras import adopt
from sheaf.task.reach import hidden_tensors, swap_all
from sheaf.task.recorder import Recorder
from sheaf.task.storage import storage_id
from sheaf.task.streams import key
from sheaf.task.task import Task
from sheaf.task.weights import WeightsFile


class Blueprint:
    """The task's model on fake tensors, and the recipe of every value in it.

    ``model`` is the user's module with fake tensors until ``fill`` or ``install`` puts real ones in.
    ``names`` maps each parameter's canonical name (its first) to the other names that share it.
    A model whose constructor needs real values, or does what replaying it would not bring back, is built whole, once,
    from the seed; ``whole`` says so, and why.

    Raises TaskError when the builder raises or returns no module, when a value can be had by nobody (lazy modules, the
    meta device), when a tensor is held where training would not reach it, or when the weights file does not fit.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.whole: str | None = None
        self._recorder = Recorder(task.seed)
        self.model = self._settled()
        self._fakes = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        self.names = _aliases(self.model)
        self._recorder.name_storages(self._fakes)
        self._weights = WeightsFile(Path(task.weights), self.names, self._fakes) if task.weights is not None else None
        self._refuse_meta()

    @property
    def mode(self) -> FakeTensorMode:
        """The mode in which the model's fake tensors live."""
        return self._recorder.mode

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The fake parameters by canonical name, in the model's order."""
        return {name: self._fakes[name] for name in self.names}

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The fake buffers by name, in the model's order."""
        return {name: fake for name, fake in self._fakes.items() if name not in self.names}

    @contextmanager
    def recording(self) -> Any:
        """Record more, such as the construction of an optimizer over the fake parameters."""
        with self._recorder:
            yield

    def compute(self, fake: Tensor) -> Tensor:
        """The real value of any tensor made while recording, on the CPU, in memory of its own."""
        return self._recorder.compute(fake)

    def value(self, name: str) -> Tensor:
        """One parameter or buffer for real, on the CPU, in the task's precision. Nothing else is computed."""
        if self._weights is not None and name in self._weights:
            value = self._weights.read(name).to(self._fakes[name].dtype)
        else:
            value = self.compute(self._fakes[name]).detach()
        return value.to(self.dtype_of(value))

    def dtype_of(self, tensor: Tensor) -> torch.dtype:
        """The dtype in which a tensor of the model is held: float64 under fp64, else its own."""
        return torch.float64 if self.task.precision == "fp64" and tensor.is_floating_point() else tensor.dtype

    def fill(self, device: torch.device) -> nn.Module:
        """Put every real value in, whole, on ``device``; the model is then an ordinary module."""
        return self.install(device, lambda name: self.value(name).to(device))

    def install(self, device: torch.device, parameter: Callable[[str], Tensor | None]) -> nn.Module:
        """Put real tensors in: parameters from ``parameter(canonical name)``, all else as computed, on ``device``.

        A parameter for which that gives None stays fake.
        Shared parameters stay shared; tensors kept as plain attributes are filled too.
        """
        made: dict[int, Tensor] = {}
        for name, fake in self.parameters.items():
            value = parameter(name)
            if value is not None:
                made[id(fake)] = real = nn.Parameter(value, requires_grad=fake.requires_grad)
                copy_attributes(fake, real)
        for views in self._views():
            values = _moved_together(self._recorder.compute_all(views), device, self.dtype_of)
            made.update({id(fake): value for fake, value in zip(views, values, strict=True)})
        for name, fake in self.buffers.items():
            if self._weights is not None and name in self._weights:
                value = self.value(name).to(device)
                made[id(fake)] = made[id(fake)].copy_(value) if id(fake) in made else value
            if fake.requires_grad and fake.is_leaf:
                made[id(fake)].requires_grad_()
        swap_all(self.model, lambda tensor: made.get(id(tensor), tensor))
        return self.model

    def _views(self) -> list[list[Tensor]]:
        """The fakes that are no parameters, those that share memory together."""
        parameters = {id(fake) for fake in self.parameters.values()}
        views: dict[int, dict[int, Tensor]] = {}

        def note(tensor: Tensor) -> Tensor:
            if isinstance(tensor, FakeTensor) and id(tensor) not in parameters:
                storage = storage_id(tensor) if tensor.layout is torch.strided else id(tensor)
                views.setdefault(storage, {})[id(tensor)] = tensor
            return tensor

        swap_all(self.model, note)
        return [list(group.values()) for group in views.values()]

    def _refuse_meta(self) -> None:
        held: Any = self._weights or ()
        missing = [name for name, fake in self._fakes.items() if fake.device.type == "meta" and name not in held]
        if missing:
            raise TaskError(
                f"{', '.join(missing[:3])}{' ...' * (len(missing) > 3)} of the model are on the meta device and have "
                "no values: build the model without device='meta' (Sheaf allocates nothing anyway), or give weights="
            )

    def _settled(self) -> nn.Module:
        """The model; built again where building it first imported modules, which may have drawn numbers meanwhile."""
        known, self._drew = len(sys.modules), False
        model = self._build()
        if len(sys.modules) == known or not self._drew:
            return model
        self._recorder, self.whole = Recorder(self.task.seed), None
        return self._build()

    def _build(self) -> nn.Module:
        first: nn.Module | None = None
        with _seeded(self.task.seed) as drew, warnings.catch_warnings():
            # copy.deepcopy of a parameter asks for its address; a fake has none, and the copy does not need it
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            try:
                with self._recorder:
                    first = _module(self.task.model())
                self._drew = drew()
                self.whole = self._unfit(first)
                if self.whole is None:
                    return self._faked(first)
            except TaskError:
                raise
            except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever wants real values ends here
                self.whole = f"{type(error).__name__}: {error}".splitlines()[0]
        self._recorder = Recorder(self.task.seed)
        with _seeded(self.task.seed) as drew:
            try:
                model = _module(self.task.model())
                self._drew = drew()
                if first is not None and {id(one) for one in first.modules()} & {id(one) for one in model.modules()}:
                    model = copy.deepcopy(model)  # it was there before: the next build must find it as it was
            except TaskError:
                raise
            except (Exception, SystemExit) as error:
                raise TaskError(f"building the model raised {type(error).__name__}: {error}") from error
        return self._faked(model)

    def _unfit(self, model: nn.Module) -> str | None:
        """Why the recorded model cannot be made from its recording; None when it can."""
        for name, parameter in model.named_parameters():
            if not isinstance(parameter, FakeTensor):
                return f"{name} takes a tensor that was there before"
        for attribute, _ in hidden_tensors(model):
            return f"{attribute} holds a tensor inside an object"
        fakes: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            if isinstance(tensor, FakeTensor):
                fakes.append(tensor)
            return tensor

        swap_all(model, note)
        return self._recorder.check(fakes)

    def _faked(self, model: nn.Module) -> nn.Module:
        """The model with a fake for every real tensor, whose values are kept as they are now."""
        hidden = _hidden_storages(model)
        groups: dict[int, list[tuple[Tensor, Tensor]]] = {}
        fakes: dict[int, Tensor] = {}
        alive: list[Tensor] = []

        def swap(tensor: Tensor) -> Tensor:
            storage = storage_id(tensor) if tensor.layout is torch.strided else id(tensor)
            if isinstance(tensor, FakeTensor) or storage in hidden:
                return tensor
            if id(tensor) not in fakes:
                fakes[id(tensor)] = fake = self.mode.from_tensor(tensor)
                alive.append(tensor)
                groups.setdefault(storage, []).append((fake, tensor))
            return fakes[id(tensor)]

        swap_all(model, swap)
        for group in groups.values():
            self._recorder.give([fake for fake, _ in group], [real for _, real in group])
        return model


def _module(built: object) -> nn.Module:
    if not isinstance(built, nn.Module):
        other = type(built).__module__.startswith("keras.")
        hint = ": set KERAS_BACKEND=torch before Keras is first imported" if other else ""
        raise TaskError(f"model() returned {type(built).__name__}; it must return a torch.nn.Module{hint}")
    adopt(built)
    broken: list[str] = []
    for name, tensor in (*built.named_parameters(), *built.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            broken.append(
                f"{name} is lazy: its shape is known only after a first forward; give the shape in model() "
                "(nn.Linear(in, out) for nn.LazyLinear(out)), so that the model can be planned before it runs"
            )
        elif tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
            broken.append(
                f"{name} has a gradient hook, which sees other pieces of the gradient under other plans; "
                "do it in forward instead, such as F.linear(x, self.weight * mask) for a masked weight"
            )
    if broken:
        raise TaskError(broken)
    return built.train()


def _hidden_storages(model: nn.Module) -> set[int]:
    """Storages of tensors that no swap reaches. Raises TaskError when a parameter or a buffer is among them."""
    named = {
        storage_id(tensor): name
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if tensor.layout is torch.strided and tensor.numel()
    }
    hidden: set[int] = set()
    for attribute, tensor in hidden_tensors(model):
        if tensor.layout is torch.strided:
            storage = storage_id(tensor)
            if storage in named:
                raise TaskError(
                    f"{named[storage]} is also held inside {attribute}, where its trained values would not arrive: "
                    "keep it as an attribute of a module only, and hand it over in forward"
                )
            hidden.add(storage)
    return hidden


def _moved_together(
    values: list[Tensor], device: torch.device, dtype_of: Callable[[Tensor], torch.dtype]
) -> list[Tensor]:
    """Tensors of one memory on a device, still of one memory."""
    if len(values) == 1 or len({value.dtype for value in values}) > 1:
        return [
            value.detach() if value.is_meta else value.detach().to(device=device, dtype=dtype_of(value))
            for value in values
        ]
    first = values[0].detach()
    whole = first.new_empty(0).set_(first.untyped_storage()).to(device=device, dtype=dtype_of(first))
    return [whole.as_strided(value.shape, value.stride(), value.storage_offset()) for value in values]


@contextmanager
def _seeded(seed: int) -> Any:
    """Python's, numpy's and torch's global generators from the seed, put back afterwards.

    Gives a function that says whether Python's or numpy's has been drawn from.
    """
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    ambient = key(seed, "build")
    random.seed(ambient)
    np.random.seed(ambient % 2**32)
    torch.default_generator.manual_seed(ambient)
    before = _drawn_from()
    try:
        yield lambda: _drawn_from() != before
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def _drawn_from() -> tuple[Any, Any]:
    """Where Python's and numpy's global generators stand."""
    return random.getstate(), np.random.get_state(legacy=False)["state"]["pos"]


def _aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Canonical parameter names with their aliases. Raises TaskError for memory shared behind torch's back."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    storages: dict[int, list[tuple[str, int, int]]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            continue
        low = int(parameter.storage_offset())
        high = low + 1 + sum((size - 1) * step for size, step in zip(parameter.shape, parameter.stride(), strict=True))
        others = storages.setdefault(storage_id(parameter), [])
        for other, begin, end in others:
            if low < end and begin < high:
                raise TaskError(
                    f"parameters {other} and {name} are different objects over the same memory; "
                    "to share them, assign one nn.Parameter to both modules"
                )
        others.append((name, low, high))
    return {first: tuple(rest) for first, *rest in names.values()}


_PLAIN = frozenset(FakeTensorMode().from_tensor(torch.empty(0)).__dict__) | {"_is_param"}


def copy_attributes(fake: Tensor, real: Tensor) -> None:
    """Give what stands for a parameter what a model has noted on it, which optimizers may group by."""
    for name, value in fake.__dict__.items():
        if name not in _PLAIN:
            setattr(real, name, value)
