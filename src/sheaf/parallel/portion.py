"""What of a task's model one worker holds: which parameters, and which slice of each. It is used as a blueprint is."""

from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from sheaf.plans.split import Slice
from sheaf.split.moves import sliced
from sheaf.task import Blueprint, Task
from sheaf.task.blueprint import copy_attributes


class Portion:
    """A blueprint seen by worker ``rank`` of those that split its layers.

    ``slices`` says which parameters are held as slices, ``names`` which are held at all (None: all). Parameters that
    are not held stay fake in the installed model.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        *,
        slices: Mapping[str, Slice] | None = None,
        rank: int = 0,
        names: Collection[str] | None = None,
        second: Collection[str] = (),
    ) -> None:
        self.blueprint, self.slices, self.rank = blueprint, dict(slices or {}), rank
        self._names = None if names is None else frozenset(names)
        self._second = frozenset(second)

    @property
    def task(self) -> Task:
        """The blueprint's."""
        return self.blueprint.task

    @property
    def mode(self) -> Any:
        """The blueprint's."""
        return self.blueprint.mode

    @property
    def names(self) -> dict[str, tuple[str, ...]]:
        """Canonical names of all parameters of the model, held or not, with their aliases."""
        return self.blueprint.names

    @property
    def model(self) -> nn.Module:
        """The blueprint's."""
        return self.blueprint.model

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """Fakes of what is held, by canonical name, in the model's order; slices have the slice's shape."""
        held = {name: fake for name, fake in self.blueprint.parameters.items() if self.holds(name)}
        made: dict[str, Tensor] = {}
        with self.blueprint.recording(), torch.no_grad():
            for name, fake in held.items():
                found = self.slices.get(name)
                if found is None:
                    made[name] = fake
                else:
                    part = sliced(fake.detach(), found.dim, found.cut, self.rank)
                    made[name] = nn.Parameter(part, requires_grad=fake.requires_grad)
                    copy_attributes(fake, made[name])
        return made

    @property
    def every(self) -> dict[str, Tensor]:
        """Fakes of all parameters of the model, those that are not held whole."""
        return {name: self.parameters.get(name, fake) for name, fake in self.blueprint.parameters.items()}

    @cached_property
    def as_trained(self) -> dict[str, Tensor]:
        """As ``every``, in the dtype in which they are trained: what an optimizer is made over."""
        made = dict[str, Tensor]()
        with self.blueprint.recording(), torch.no_grad():
            for name, fake in self.every.items():
                made[name] = fake
                if self.dtype_of(fake) != fake.dtype:
                    wide = nn.Parameter(fake.detach().to(self.dtype_of(fake)), requires_grad=fake.requires_grad)
                    copy_attributes(fake, wide)
                    made[name] = wide
        return made

    @property
    def cuts(self) -> dict[str, list[int]]:
        """By parameter held as a slice: its dimension, in how many runs that is cut, and each worker's of one."""
        return {name: [found.dim, found.cut.outer, *found.cut.sizes] for name, found in self.slices.items()}

    @property
    def complete(self) -> bool:
        """Whether every parameter is held, if only a slice of it."""
        return self._names is None

    def holds(self, name: str) -> bool:
        """Whether this worker holds a parameter, or a slice of it."""
        return self._names is None or name in self._names

    def counts(self, name: str) -> bool:
        """Whether this worker is of the first stage that holds a parameter."""
        return self.holds(name) and name not in self._second

    def recording(self) -> Any:
        """The blueprint's."""
        return self.blueprint.recording()

    def compute(self, fake: Tensor) -> Tensor:
        """The blueprint's."""
        return self.blueprint.compute(fake)

    def dtype_of(self, tensor: Tensor) -> torch.dtype:
        """The blueprint's."""
        return self.blueprint.dtype_of(tensor)

    def value(self, name: str) -> Tensor:
        """This worker's part of a parameter, or a whole buffer, for real, on the CPU."""
        whole, found = self.blueprint.value(name), self.slices.get(name)
        return whole if found is None else sliced(whole, found.dim, found.cut, self.rank).contiguous().clone()

    def fill(self, device: torch.device) -> nn.Module:
        """The model with this worker's part of every parameter that it holds."""
        return self.install(device, lambda name: self.value(name).to(device))

    def install(self, device: torch.device, parameter: Callable[[str], Tensor]) -> nn.Module:
        """The model with ``parameter(canonical name)`` for each parameter that is held."""
        model = self.blueprint.install(device, lambda name: parameter(name) if self.holds(name) else None)
        self._place(model, device)
        return model

    def _place(self, model: nn.Module, device: torch.device) -> None:
        """Make fakes that stay as wide as the parameters they stand for are held, on the same device."""
        made: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for key, value in module._parameters.items():
                moves = value is not None and value.device.type != device.type
                if isinstance(value, FakeTensor) and (moves or self.dtype_of(value) != value.dtype):
                    if id(value) not in made:
                        with self.mode:
                            wide = torch.empty(tuple(value.shape), dtype=self.dtype_of(value), device=device)
                            made[id(value)] = nn.Parameter(wide, requires_grad=value.requires_grad)
                    module._parameters[key] = made[id(value)]

    def own(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The installed parameters that are held, by canonical name."""
        return {name: value for name, value in model.named_parameters() if self.holds(name)}
