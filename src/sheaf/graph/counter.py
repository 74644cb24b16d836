"""Counts what every block does while a model runs, on fake or on real tensors: one pass, forward and backward.

A block's forward is what runs between its hooks. Its backward is found through autograd: every node bears the number
of the moment at which the forward made it, so a node belongs to the block that ran at that moment (torch's anomaly
mode and profiler link forward and backward in the same way).
"""

import bisect
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.autograd import _get_sequence_nr
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from sheaf.graph import ops
from sheaf.graph.crossings import Crossings
from sheaf.graph.facts import GLUE


@dataclass
class Work:
    """What one direction of one block does."""

    flops: float = 0.0
    moved_bytes: int = 0
    kernels: int = 0


@dataclass
class Tally:
    """What one block does in a microbatch, as it is being counted."""

    forward: Work = field(default_factory=Work)
    backward: Work = field(default_factory=Work)
    saved: dict[int, int] = field(default_factory=dict[int, int])  # storages -> bytes
    saved_inputs: dict[int, int] = field(default_factory=dict[int, int])
    inputs: dict[int, int] = field(default_factory=dict[int, int])
    input_bytes: int = 0
    fresh_input_bytes: int = 0
    output_bytes: int = 0
    input_shapes: list[str] = field(default_factory=list[str])
    calls: int = 0
    draws: bool = False
    batch_dependent: bool = False


class Counter(TorchDispatchMode):
    """Counts kernels, their operations and bytes per block; enter it inside the fake mode, around a step.

    ``draws`` and ``batch_dependent`` collect names of modules, ``changed`` storages that the forward wrote to.
    ``place`` is the name of the innermost module that runs, or that raised.

    ``opened`` are modules whose own modules are blocks: what they do between those counts with the block before.
    ``crossings`` is told of what forward makes and uses.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: dict[str, nn.Module],
        opened: Collection[nn.Module],
        crossings: Crossings,
    ) -> None:
        super().__init__()
        self._opened = {id(module) for module in opened}
        self._depth = 0  # how many of the opened modules run
        self._resting = False  # whether the owner has returned, and what its opened module does counts with it
        self._crossings = crossings
        self.tallies: dict[str, Tally] = {name: Tally() for name in blocks}
        self.order: list[str] = []
        self.draws: dict[str, None] = {}
        self.batch_dependent: dict[str, None] = {}
        self.changed: set[int] = set()
        self._model = model
        self._block_of = {id(module): name for name, module in blocks.items()}
        self._lasting = set(ops.storage_bytes([*model.parameters(), *model.buffers()]))
        self._owner_of_parameter = self._parameter_owners(blocks)
        self._counted: set[int] = set()  # saved storages that some block has counted
        self._given: set[int] = set()  # storages that were some block's input
        self._apart: list[Any] = []  # keeps storages' identities from being used again
        self._modules: list[tuple[int, str]] = []
        self._default = GLUE
        self._owner = GLUE
        self._moments: list[int] = []  # the first autograd number of each stretch of forward
        self._stretches: list[str] = []
        self._backward_owner = GLUE

    @property
    def place(self) -> str:
        """The innermost module that runs; the model itself is an empty name."""
        return self._modules[-1][1] if self._modules else ""

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count all that runs inside."""
        with ExitStack() as stack:
            handles: list[RemovableHandle] = []
            stack.callback(lambda: [handle.remove() for handle in handles])
            for name, module in self._model.named_modules():
                handles += self._hooks(name, module)
            stack.enter_context(saved_tensors_hooks(self._pack, lambda tensor: tensor))
            stack.enter_context(self)
            yield

    @contextmanager
    def within(self, name: str, given: Any) -> Iterator[None]:
        """Count what runs inside as the block of that name, with those inputs: the loss function."""
        self._default, before = name, self._default
        self._modules.clear()
        self._enter(name, given)
        yield
        self._default = before
        self._switch(before)

    def give(self, name: str, values: Any) -> None:
        """Say which tensors are given to a block that is no module: what GLUE gets is the batch."""
        self._enter(name, values)
        self.order.remove(name)

    def tally(self, name: str) -> Tally:
        """The tally of a block, GLUE and LOSS included."""
        return self.tallies.setdefault(name, Tally())

    def owner_of(self, number: int) -> str:
        """The block that ran when autograd made the node of that number."""
        at = bisect.bisect_right(self._moments, number) - 1
        return self._stretches[at] if at >= 0 else GLUE

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operator and count it."""
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return func(*args, **kwargs)
        if ops.decomposes(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        ops.refuse_mixed(func, args)
        result = ops.as_run(func, func(*args, **kwargs))
        if ops.is_kernel(func):
            self._count(func, args, kwargs, result)
        return result

    def _count(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        backward = in_backward()
        tally = self.tally(self._owner_in_backward() if backward else self._owner)
        work = tally.backward if backward else tally.forward
        work.flops += ops.flops(func, args, kwargs, result)
        work.moved_bytes += ops.moved_bytes(func, args, kwargs, result)
        work.kernels += 1
        if backward:
            return
        self._crossings.note((args, kwargs), result, len(self.order))
        if ops.draws(func, args, kwargs):
            tally.draws = True
            self.draws[self.place] = None
        if ops.uses_batch_statistics(func, args, kwargs):
            tally.batch_dependent = True
            self.batch_dependent[self.place] = None
        if written := self._lasting.intersection(ops.storage_bytes(ops.changed(func, args, kwargs))):
            self.changed |= written
            tally.batch_dependent = True
            self.batch_dependent[self.place] = None

    def _owner_in_backward(self) -> str:
        if torch.is_grad_enabled() and self._owner != self._default:  # the block runs forward again
            return self._owner
        node: Any = torch._C._current_autograd_node()  # None between nodes, whatever the stub says
        if node is not None:
            parameter = getattr(node, "variable", None)  # a node that adds to a parameter's gradient
            if parameter is not None:
                self._backward_owner = self._owner_of_parameter.get(id(parameter), GLUE)
            else:
                self._backward_owner = self.owner_of(node._sequence_nr())
        return self._backward_owner  # between nodes the engine adds gradients up: still the last node's work

    def _switch(self, owner: str) -> None:
        self._owner = owner
        number = _get_sequence_nr()
        if self._moments and self._moments[-1] == number:
            self._stretches[-1] = owner
        else:
            self._moments.append(number)
            self._stretches.append(owner)

    def _hooks(self, name: str, module: nn.Module) -> list[RemovableHandle]:
        block = self._block_of.get(id(module))

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._modules.append((id(module), name))
            if block is not None and (self._owner == self._default or self._resting or in_backward()):
                self._enter(block, (args, kwargs))
                return None if in_backward() else self._given_to(block, module, args, kwargs)
            if id(module) in self._opened and not in_backward():
                self._depth += 1
            return None

        def after(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
            while self._modules and self._modules.pop()[0] != id(module):
                pass
            given = None
            if block is not None and self._owner == block:
                if not in_backward():
                    given = self._gives(block, output)
                    output = output if given is None else given
                    self.tally(block).output_bytes += sum(ops.stored_bytes(tensor) for tensor in ops.tensors(output))
                self._resting = self._depth > 0 and not in_backward()
                if not self._resting:
                    self._switch(self._default)
            elif id(module) in self._opened and not in_backward():
                self._depth -= 1
                if not self._depth and self._resting:
                    self._resting = False
                    self._switch(self._default)
            return given

        return [
            module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True),
        ]

    def _given_to(self, block: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ARG002
        """A block is about to run: other arguments for it, or None."""
        return None

    def _gives(self, block: str, output: Any) -> Any:  # noqa: ARG002
        """A block has run: another output in place of its own, or None."""
        return None

    def _enter(self, block: str, values: Any) -> None:
        self._resting = False
        self._switch(block)
        if in_backward():  # the model recomputes a part of itself
            return
        tally = self.tally(block)
        if not tally.calls:
            self.order.append(block)
        tally.calls += 1
        given = ops.tensors(values)
        self._apart += ops.kept_apart(given)
        storages = ops.storage_bytes(given)
        tally.inputs.update(storages)
        tally.input_shapes += [f"{tensor.dtype}{list(tensor.shape)}{tensor.requires_grad}" for tensor in given]
        tally.input_bytes += sum(ops.stored_bytes(tensor) for tensor in given)
        tally.fresh_input_bytes += sum(size for key, size in storages.items() if key not in self._given)
        self._given.update(storages)

    def _pack(self, tensor: Tensor) -> Tensor:
        tally = self.tally(self._owner)
        for key, size in ops.storage_bytes([tensor]).items():
            if self._keep(tally, key, size):
                self._apart += ops.kept_apart([tensor])
        return tensor

    def _keep(self, tally: Tally, key: int, size: int) -> bool:
        """Count a storage that autograd keeps; False where it lasts anyway, or was counted before."""
        if key in self._lasting or key in self._counted:
            return False
        self._counted.add(key)
        (tally.saved_inputs if key in tally.inputs else tally.saved)[key] = size
        return True

    def _parameter_owners(self, blocks: dict[str, nn.Module]) -> dict[int, str]:
        owner: dict[int, str] = {}
        for name, module in blocks.items():
            for parameter in module.parameters():
                owner.setdefault(id(parameter), name)
        return owner


def in_backward() -> bool:
    """Whether autograd runs backward."""
    return torch._C._current_graph_task_id() != -1
