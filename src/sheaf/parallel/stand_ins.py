"""What other stages' blocks would return, without values: from a run on fake tensors, kept by the shapes of inputs."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from sheaf.parallel.remote import Remote
from sheaf.split.tensor import Split


class StandIns:
    """Runs blocks and functions on fake tensors of ``mode``; ``paused`` is entered around whole blocks."""

    def __init__(self, mode: FakeTensorMode, paused: Callable[[], AbstractContextManager[object]]) -> None:
        mode.allow_non_fake_inputs = True  # what is computed from the batch alone is real in every stage
        self.mode, self._paused = mode, paused
        self._known: dict[Any, tuple[list[Any], Any]] = {}

    def block(self, name: str, block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A block's output, as fakes."""
        key = (name, torch.is_grad_enabled(), signature((args, kwargs)))
        known = self._known.get(key)
        if known is None:
            with self._paused(), self.mode, self._buffers(block):
                output = forward(*args, **kwargs)
            leaves, spec = tree_flatten(output)
            known = [cut_off(leaf) for leaf in leaves], spec
            if all(isinstance(leaf, Tensor | int | float | str | bool | None) for leaf in leaves):
                self._known[key] = known
        return tree_unflatten(*known)

    def function(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A function's result, as fakes."""
        with self.mode:
            return function(*args, **kwargs)

    def like(self, tensor: Tensor) -> Tensor:
        """A fake of the same shape, type and device."""
        shown = tensor.local if isinstance(tensor, Split) else tensor
        with self.mode:
            made = torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device=shown.device)
            return made.requires_grad_(shown.requires_grad)

    def of(self, shape: list[int], dtype: str, *, requires_grad: bool) -> Tensor:
        """A fake from a description."""
        with self.mode:
            return torch.empty(shape, dtype=getattr(torch, dtype)).requires_grad_(requires_grad)

    @contextmanager
    def _buffers(self, block: nn.Module) -> Iterator[None]:
        """A block's buffers are real in every stage, and must stay as they are."""
        held = [(module, dict(module._buffers)) for module in block.modules()]
        for module, buffers in held:
            module._buffers.update({key: self.like(buffer) for key, buffer in buffers.items() if buffer is not None})
        try:
            yield
        finally:
            for module, buffers in held:
                module._buffers.update(buffers)


def cut_off(leaf: Any) -> Any:
    """A tensor without its history, that still says whether it has a gradient."""
    return leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def blank(leaf: Any) -> Any:
    """Zeros of a tensor's shape."""
    return torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device) if isinstance(leaf, Tensor) else leaf


def blanks(value: Any) -> Any:
    """Zeros for every tensor."""
    return tree_map(blank, value)


def signature(value: Any) -> Any:
    """What output shapes depend on: the shapes of tensors, and plain values."""
    leaves, spec = tree_flatten(value)
    return str(spec), tuple(_leaf(leaf) for leaf in leaves)


def _leaf(leaf: Any) -> Any:
    if isinstance(leaf, Remote) and leaf.entry.fake is not None:
        return tuple(leaf.shape), leaf.dtype, leaf.entry.fake.requires_grad
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.requires_grad
    return leaf if isinstance(leaf, int | float | str | bool | None) else type(leaf).__qualname__
