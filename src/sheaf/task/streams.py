"""Random streams keyed by (seed, step, microbatch, module name), so that no plan changes what is drawn.

Every module that may draw (torch's own drawing modules, and every module of a class that torch does not own, since
its forward may call ``F.dropout``) runs under a stream of its own; when it returns, its caller's stream goes on where
it stood. A module called twice in a forward has two streams.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

_DRAWING = (
    nn.modules.dropout._DropoutNd,
    nn.RReLU,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


def key(*parts: int | str) -> int:
    """A 63-bit seed from any parts; equal parts give equal seeds on every machine.

    >>> key(0, "init", "wte.weight") == key(0, "init", "wte.weight") != key(1, "init", "wte.weight")
    True
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def may_draw(module: nn.Module) -> bool:
    """Whether a module's own forward may draw random numbers, as far as its class tells."""
    return isinstance(module, _DRAWING) or not type(module).__module__.startswith("torch.nn.modules.")


@dataclass(frozen=True)
class Position:
    """Where the streams of a model stand: step, microbatch, how often each module was called, generator states."""

    step: int
    microbatch: int
    calls: tuple[tuple[str, int], ...]
    states: tuple[torch.Tensor, ...]


class Streams:
    """Gives each module of a model its random stream while a microbatch runs forward.

    Attach once; call ``enter(step, microbatch)`` before each forward.
    """

    def __init__(self, model: nn.Module, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._generators = _generators(device)
        self._step, self._microbatch = 0, 0
        self._calls: dict[str, int] = {}
        self._saved: list[list[torch.Tensor]] = []
        self._handles: list[RemovableHandle] = []
        for name, module in model.named_modules():
            if may_draw(module):
                self._attach(name, module)

    def enter(self, step: int, microbatch: int) -> None:
        """Move to a microbatch; its draws depend on nothing that ran before."""
        self._step, self._microbatch = step, microbatch
        self._calls.clear()
        self._saved.clear()
        ambient = key(self._seed, "stream", step, microbatch)
        random.seed(ambient)
        self._seed_all(ambient)

    def position(self) -> Position:
        """Where the streams stand now, to come back to when a block is run again in backward."""
        return Position(
            self._step,
            self._microbatch,
            tuple(self._calls.items()),
            tuple(generator.get_state() for generator in self._generators),
        )

    @contextmanager
    def at(self, position: Position) -> Iterator[None]:
        """Run at an earlier position, then come back: what a recomputed block draws is what it drew at first."""
        here, saved = self.position(), self._saved
        self._saved = []
        self._move(position)
        try:
            yield
        finally:
            self._move(here)
            self._saved = saved

    def close(self) -> None:
        """Detach from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _move(self, position: Position) -> None:
        self._step, self._microbatch = position.step, position.microbatch
        self._calls = dict(position.calls)
        for generator, state in zip(self._generators, position.states, strict=True):
            generator.set_state(state)

    def _attach(self, name: str, module: nn.Module) -> None:
        def before(_module: nn.Module, _arguments: Any) -> None:
            call = self._calls.get(name, 0)
            self._calls[name] = call + 1
            self._saved.append([generator.get_state() for generator in self._generators])
            self._seed_all(key(self._seed, "stream", self._step, self._microbatch, name, call))

        def after(_module: nn.Module, _arguments: Any, _output: Any) -> None:
            if self._saved:
                for generator, state in zip(self._generators, self._saved.pop(), strict=True):
                    generator.set_state(state)

        # First in, last out: hooks of others on the same module run inside its stream.
        self._handles.append(module.register_forward_pre_hook(before, prepend=True))
        self._handles.append(module.register_forward_hook(after, always_call=True))

    def _seed_all(self, seed: int) -> None:
        for generator in self._generators:
            generator.manual_seed(seed)


def _generators(device: torch.device) -> list[torch.Generator]:
    generators = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()
        generators.append(torch.cuda.default_generators[device.index or torch.cuda.current_device()])
    return generators
