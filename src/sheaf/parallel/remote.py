"""A tensor that another stage computes: it has a shape and a type here, and no values."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sheaf.errors import PlanError
from sheaf.split.tensor import Split


class Entry:
    """Where a tensor of the model's own forward is computed, and under which name all stages know it.

    ``real`` is its value, where it is here; ``fake`` stands for it elsewhere, and is made when it is first asked for
    where only ``looks`` are given: a fake that nobody changes, and ``copied``, which makes another like it.
    ``version`` is what the counter of changes stood at when it got its name.
    """

    __slots__ = ("_copied", "_fake", "_looks", "name", "real", "stage", "version")

    def __init__(
        self,
        stage: int,
        name: str,
        real: Tensor | None = None,
        fake: Tensor | None = None,
        version: int = 0,
        *,
        looks: Tensor | None = None,
        copied: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.stage, self.name, self.real, self._fake, self.version = stage, name, real, fake, version
        self._looks, self._copied = looks, copied

    @property
    def fake(self) -> Tensor | None:
        """What stands for it, and may be changed in place."""
        if self._fake is None and self._looks is not None:
            assert self._copied is not None
            self._fake = self._copied(self._looks)
            self.version = self._fake._version
        return self._fake

    @property
    def looks(self) -> Tensor | None:
        """What it was said to look like, where nobody has asked for a fake that may be changed."""
        return self._looks if self._fake is None and self.real is None else None

    @property
    def shown(self) -> Tensor:
        """Something with its shape, dtype, device and strides, only to be looked at."""
        for tensor in (self.real, self._fake, self._looks):
            if tensor is not None:
                return tensor
        raise AssertionError(self.name)

    @property
    def key(self) -> tuple[str, int]:
        """Name and number of changes since, the same in every stage."""
        tensor = self.real if self.real is not None else self._fake
        return self.name, 0 if tensor is None else version_of(tensor) - self.version


def version_of(tensor: Tensor) -> int:
    """How often it was changed in place."""
    return tensor.local._version if isinstance(tensor, Split) else tensor._version


class _Same(torch.autograd.Function):
    """The same memory, as what was computed from it."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:  # noqa: ARG004 - nothing is kept
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004 - nothing is kept
        return gradients[0]


def no_leaf(leaf: Tensor) -> Tensor:
    """The same tensor in a way that it may be changed in place, which a leaf that has a gradient may not."""
    with torch.enable_grad():
        return _Same.apply(leaf)  # pyright: ignore[reportReturnType] - what apply returns is untyped


class Remote(Tensor):
    """Stands for a tensor of another stage; every function that meets one goes through ``Passing``."""

    entry: Entry

    @staticmethod
    def __new__(cls: "type[Remote]", entry: Entry) -> "Remote":  # noqa: PYI034 - Self is no runtime type
        """Look like the entry's fake."""
        fake = entry.shown
        made: Remote = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, fake.shape, strides=fake.stride(), dtype=fake.dtype, device=fake.device, requires_grad=False
        )
        made.entry = entry
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raises PlanError: a block got another stage's tensor by a way that nothing sees."""
        raise PlanError(
            f"{func} reached a tensor of another pipeline stage by a way that cannot be followed (an attribute, a "
            "closure, a custom autograd.Function): put the modules that share it in one stage, with stages=..."
        )

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Remote({self.entry.name} of stage {self.entry.stage}, shape={tuple(self.shape)})"
