"""Times every block of a running model in place: forward by hooks on modules, backward by hooks on autograd's nodes."""

import bisect
import time
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd import _get_sequence_nr
from torch.utils.hooks import RemovableHandle

from sheaf.graph import ops
from sheaf.graph.facts import GLUE, LOSS


class Clock:
    """Seconds on a device: the host's clock on a CPU, the device's own events on an accelerator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> Any:
        """A moment, in the order of the work that was given to the device."""
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(device=self._device, enable_timing=True)
        event.record()
        return event

    def settle(self) -> None:
        """Wait until the device has done all it was given."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize()

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds between two moments; call ``settle`` first."""
        return end - start if self._device.type == "cpu" else start.elapsed_time(end) / 1000


class Stopwatch:
    """Splits a microbatch's time among blocks, GLUE and LOSS, by noting when the work passes from one to the next.

    ``opened`` are modules whose own modules are blocks: what they do between those counts with the block before.
    """

    def __init__(self, blocks: dict[str, nn.Module], clock: Clock, opened: Collection[nn.Module]) -> None:
        self._clock = clock
        self._opened = tuple(opened)
        self._depth = 0  # how many of the opened modules run
        self._resting = False  # whether the owner has returned, and its opened module goes on
        self._blocks = blocks
        self._owner = GLUE
        self._notes: list[tuple[str, bool, Any]] = []  # owner, in backward, moment
        self._moments: list[int] = []
        self._stretches: list[str] = []
        self._in_backward = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note all that runs inside; ``forward``, ``loss``, ``backward`` and ``stop`` mark a microbatch."""
        handles: list[RemovableHandle] = []
        for name, module in self._blocks.items():
            handles += self._hooks(name, module)
        for module in self._opened:
            handles += [module.register_forward_pre_hook(self._open), module.register_forward_hook(self._leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forward(self) -> None:
        """A microbatch's forward starts."""
        self._notes.clear()
        self._moments.clear()
        self._stretches.clear()
        self._in_backward = False
        self._switch(GLUE)

    def loss(self, output: Any) -> None:
        """The loss function starts."""
        self._mark_nodes(output)
        self._switch(LOSS)

    def backward(self) -> None:
        """The backward starts."""
        self._in_backward = True
        self._note(LOSS)

    def stop(self) -> tuple[dict[str, float], dict[str, float]]:
        """The microbatch ended: seconds of each block in forward, and in backward."""
        self._note(GLUE)
        self._clock.settle()
        forward: dict[str, float] = defaultdict(float)
        backward: dict[str, float] = defaultdict(float)
        for (owner, in_backward, start), (_, _, end) in zip(self._notes, self._notes[1:], strict=False):
            (backward if in_backward else forward)[owner] += self._clock.seconds(start, end)
        return forward, backward

    def _note(self, owner: str) -> None:
        self._notes.append((owner, self._in_backward, self._clock.now()))

    def _switch(self, owner: str) -> None:
        self._owner = owner
        self._note(owner)
        self._moments.append(_get_sequence_nr())
        self._stretches.append(owner)

    def _hooks(self, name: str, module: nn.Module) -> list[RemovableHandle]:
        def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
            if (self._owner == GLUE or self._resting) and not self._in_backward:
                self._resting = False
                self._mark_nodes((args, kwargs))
                self._switch(name)

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            if self._owner == name and not self._in_backward:
                self._resting = self._depth > 0
                if not self._resting:
                    self._switch(GLUE)
                self._mark_nodes(output)

        return [
            module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
            module.register_forward_hook(after),
        ]

    def _open(self, _module: nn.Module, _args: Any) -> None:
        self._depth += not self._in_backward

    def _leave(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._depth -= not self._in_backward
        if not self._depth and self._resting:
            self._resting = False
            self._switch(GLUE)
            self._mark_nodes(output)

    def _mark_nodes(self, value: Any) -> None:
        """When backward reaches the node that made a tensor at a block's edge, its work passes to that node's block."""
        for tensor in ops.tensors(value):
            node = tensor.grad_fn
            if node is not None:
                at = bisect.bisect_right(self._moments, node._sequence_nr()) - 1
                owner = self._stretches[at] if at >= 0 else GLUE
                node.register_prehook(self._passer(owner))

    def _passer(self, owner: str) -> Any:
        def note(_gradients: Any) -> None:
            self._note(owner)

        return note
