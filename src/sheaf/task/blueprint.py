"""A model built without memory, whose tensors are then made one by one, each from (seed, name) or a weights file."""

import random
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sheaf.errors import TaskError
from sheaf.task.recorder import Recorder, replace_tensors
from sheaf.task.streams import key
from sheaf.task.task import Task


class Blueprint:
    """The task's model on fake tensors, and the recipe of every value in it.

    ``model`` is the user's module with fake tensors until ``fill`` or ``install`` puts real ones in.
    ``names`` maps each parameter's canonical name (its first) to the other names that share it.
    A model whose constructor needs real values (it cannot be built on fake tensors) is built whole, once, from the
    seed; ``whole`` says so, and why.

    Raises TaskError when the builder raises or returns no module, or when the weights file does not fit.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.whole: str | None = None
        self._recorder = Recorder(task.seed)
        self._kept: dict[int, Tensor] = {}  # id of a fake -> its real value, of a model built whole
        self.model = self._build()
        self._fakes = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        self.names = _aliases(self.model)
        self._recorder.name_storages(self._fakes)
        self._weights = _Weights(Path(task.weights), self) if task.weights is not None else None

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
        """The real value of any tensor made while recording, on the CPU."""
        return self._kept[id(fake)] if id(fake) in self._kept else self._recorder.compute(fake)

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

    def install(self, device: torch.device, parameter: Callable[[str], Tensor]) -> nn.Module:
        """Put real tensors in: parameters from ``parameter(canonical name)``, all else as computed, on ``device``.

        Shared parameters stay shared; tensors kept as plain attributes are filled too.
        """
        made: dict[int, Tensor] = {}
        for name, fake in self._fakes.items():
            if name in self.names:
                real = nn.Parameter(parameter(name), requires_grad=fake.requires_grad)
                _copy_attributes(fake, real)
            else:
                real = self.value(name).to(device)
            made[id(fake)] = real

        def swap(tensor: Tensor) -> Tensor:
            if id(tensor) not in made and isinstance(tensor, FakeTensor):
                value = self.compute(tensor).detach()
                made[id(tensor)] = value.to(device=device, dtype=self.dtype_of(value))
            return made.get(id(tensor), tensor)

        _swap_all(self.model, swap)
        return self.model

    def _build(self) -> nn.Module:
        with _seeded(self.task.seed), warnings.catch_warnings():
            # copy.deepcopy of a parameter asks for its address; a fake has none, and the copy does not need it
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            try:
                with self._recorder:
                    return _module(self.task.model())
            except TaskError:
                raise
            except Exception as error:  # noqa: BLE001 - any constructor that wants real values ends here
                self.whole = f"{type(error).__name__}: {error}".splitlines()[0]
        self._recorder = Recorder(self.task.seed)
        with _seeded(self.task.seed):
            try:
                model = _module(self.task.model())
            except TaskError:
                raise
            except Exception as error:
                raise TaskError(f"building the model raised {type(error).__name__}: {error}") from error
        return self._faked(model)

    def _faked(self, model: nn.Module) -> nn.Module:
        fakes: dict[int, Tensor] = {}
        alive: list[Tensor] = []

        def swap(tensor: Tensor) -> Tensor:
            if id(tensor) not in fakes:
                fakes[id(tensor)] = fake = self.mode.from_tensor(tensor)
                alive.append(tensor)
                self._kept[id(fake)] = tensor
            return fakes[id(tensor)]

        _swap_all(model, swap)
        return model


def _module(built: object) -> nn.Module:
    if not isinstance(built, nn.Module):
        raise TaskError(f"model() returned a {type(built).__name__}; it must return a torch.nn.Module")
    return built.train()


@contextmanager
def _seeded(seed: int) -> Any:
    """Python's, numpy's and torch's global generators from the seed, put back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    ambient = key(seed, "build")
    random.seed(ambient)
    np.random.seed(ambient % 2**32)
    torch.default_generator.manual_seed(ambient)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def _aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Canonical parameter names with their aliases. Raises TaskError for memory shared behind torch's back."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    storages: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        other = storages.setdefault(torch._C._storage_id(parameter), name)
        if other != name and parameter.numel():
            raise TaskError(
                f"parameters {other} and {name} are different objects over the same memory; "
                "to share them, assign one nn.Parameter to both modules"
            )
    return {first: tuple(rest) for first, *rest in names.values()}


def _swap_all(model: nn.Module, swap: Callable[[Tensor], Tensor]) -> None:
    for module in model.modules():
        registries: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for registry in registries:
            for name, tensor in registry.items():
                if tensor is not None:
                    registry[name] = swap(tensor)
        for name, value in list(module.__dict__.items()):
            if name not in ("_parameters", "_buffers", "_modules"):
                changed = replace_tensors(value, swap)
                if changed is not value:
                    module.__dict__[name] = changed


_PLAIN = frozenset(FakeTensorMode().from_tensor(torch.empty(0)).__dict__) | {"_is_param"}


def _copy_attributes(fake: Tensor, real: Tensor) -> None:
    for name, value in fake.__dict__.items():
        if name not in _PLAIN:
            setattr(real, name, value)


class _Weights:
    """A safetensors file whose tensors are read one at a time."""

    def __init__(self, path: Path, blueprint: Blueprint) -> None:
        try:
            self._file = safe_open(path, framework="pt")
        except Exception as error:
            raise TaskError(f"weights={str(path)!r} is not a safetensors file: {error}") from error
        held = set(self._file.keys())
        self._key = {
            name: next((alias for alias in (name, *aliases) if alias in held), None)
            for name, aliases in blueprint.names.items()
        } | {name: name if name in held else None for name in blueprint.buffers}
        broken = [
            f"weights hold no {name}, a parameter of the model" for name in blueprint.names if not self._key[name]
        ]
        used = {*blueprint.buffers, *blueprint.names, *(a for rest in blueprint.names.values() for a in rest)}
        broken += [f"weights hold {name}, which the model does not have" for name in sorted(held - used)]
        for name, fake in (blueprint.parameters | blueprint.buffers).items():
            if self._key[name] and tuple(self._file.get_slice(self._key[name]).get_shape()) != tuple(fake.shape):
                found = tuple(self._file.get_slice(self._key[name]).get_shape())
                broken.append(f"weights hold {name} with shape {found}; the model wants {tuple(fake.shape)}")
        if broken:
            raise TaskError(broken)

    def __contains__(self, name: str) -> bool:
        return self._key.get(name) is not None

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        return self._file.get_tensor(self._key[name])
