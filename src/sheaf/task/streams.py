"""Random streams keyed by (seed, step, microbatch, module name), so that no plan changes what is drawn.

Every module that may draw (torch's own drawing modules, and every module of a class that torch does not own, since
its forward may call ``F.dropout``) runs under a stream of its own; when it returns, its caller's stream goes on where
it stood. A module called twice in a forward has two streams; which call it is, is counted within the call of the module
around it, so that a block draws the same whether or not its earlier calls ran in this process.

A model may recompute parts of itself in backward (``torch.utils.checkpoint``), and what it then draws must be what it
drew at first. The CPU generator's state carries the number it was seeded with, which draws do not depend on once it
is seeded; it is used here as a tag that says how many calls had been made when the state was taken. Whoever puts an
earlier state back, as a checkpoint does, puts the tag back with it, and the calls that follow are found by it.
"""

import ctypes
import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sheaf.errors import TaskError

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


class _Call:
    """One call of a module in a microbatch's forward: its stream's seed, which of the calls within the module around it
    it is, and how many calls there were at its end.
    """

    __slots__ = ("end", "name", "seed", "time")

    def __init__(self, name: str, seed: int, time: int = 0) -> None:
        self.name, self.seed, self.time = name, seed, time
        self.end: int | None = None


class _Record:
    """The calls of one microbatch's forward in order, each found again by the tag of the generator's state."""

    def __init__(self, seed: int, step: int, microbatch: int) -> None:
        self._parts = (seed, "stream", step, microbatch)
        self.ambient = key(*self._parts)
        self._tag = self.ambient
        self._times: dict[tuple[int, str], int] = {}
        self._calls: list[_Call] = []
        self._starts: dict[int, int] = {}
        self._foreign: set[int] = set()

    def add(self, name: str, tag: int, *, within: _Call | None, keep: bool) -> _Call:
        """A new call of a module in forward; one that is not kept cannot be found again."""
        outer = self.ambient if within is None else within.seed
        time = self._times.get((outer, name), 0)
        self._times[outer, name] = time + 1
        call = _Call(name, key(outer, name, time), time)
        if tag != self._tag:  # the model seeded or set the generator itself, so this tag tells no place
            self._foreign.add(tag)
        self._tag = call.seed
        if keep:
            self._calls.append(call)
            self._starts[call.seed] = len(self._calls)
        return call

    def end(self, call: _Call, tag: int) -> int:
        """A call in forward has ended; the tag its caller's state gets from here on."""
        kept = call.seed in self._starts
        call.end = len(self._calls)
        self._tag = self.tag(call) if kept else tag
        return self._tag

    def tag(self, call: _Call) -> int:
        """The tag of the caller's state once this call has ended."""
        return (self.ambient + (call.end or 0)) % 2**63

    def find(self, name: str, tag: int) -> _Call | None:
        """The call that forward made of this module where it stood at ``tag``; None where that cannot be told."""
        place = self._starts.get(tag, (tag - self.ambient) % 2**63)
        if tag in self._foreign or not 0 <= place < len(self._calls):
            return None
        call = self._calls[place]
        return call if call.name == name and call.end is not None else None

    def unknown(self, name: str) -> int:
        """The seed of a module's stream in a call that cannot be told."""
        return key(*self._parts, name, "again")


class _Frame:
    """A module that is running: its caller's generator states, and which call of the record it is."""

    __slots__ = ("call", "replay", "seeded", "states")

    def __init__(self, states: list[Any], call: _Call | None, *, replay: bool) -> None:
        self.states, self.call, self.replay = states, call, replay
        self.seeded: list[Any] = []


@dataclass(frozen=True)
class Position:
    """Where the streams of a model stand: the microbatch's calls, and the generators' states."""

    record: _Record
    states: tuple[Any, ...]  # not of Tensor: a checker of types may pick which element to check with Python's generator
    python: tuple[Any, ...]
    numpy: dict[str, Any]


class Streams:
    """Gives each module of a model its random stream while a microbatch runs forward.

    Attach once; call ``enter(step, microbatch)`` before each forward.
    """

    def __init__(self, model: nn.Module, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._generators = _generators(device)
        self._record = self._others = _Record(seed, 0, 0)
        self._replaying = False
        self._frames: list[_Frame] = []
        self._handles: list[RemovableHandle] = []
        self._names = {module: name for name, module in model.named_modules()}
        for module, name in self._names.items():
            if may_draw(module):
                self._attach(name, module)

    def enter(self, step: int, microbatch: int) -> None:
        """Move to a microbatch; its draws depend on nothing that ran before."""
        self._record = _Record(self._seed, step, microbatch)
        self._frames.clear()
        ambient = self._record.ambient
        random.seed(ambient)
        np.random.seed(ambient % 2**32)
        self._seed_all(ambient)

    def position(self) -> Position:
        """Where the streams stand now, to come back to when a block is run again in backward."""
        return Position(
            self._record,
            tuple(generator.get_state() for generator in self._generators),
            random.getstate(),
            np.random.get_state(legacy=False),
        )

    @contextmanager
    def at(self, position: Position) -> Iterator[None]:
        """Run again what ran at an earlier position, then come back: it draws what it drew at first."""
        here, frames, replaying = self.position(), self._frames, self._replaying
        self._frames, self._replaying = [], True
        self._move(position)
        try:
            yield
        finally:
            self._move(here)
            self._frames, self._replaying = frames, replaying

    @property
    def under_way(self) -> int:
        """The seed of the stream that what is called now draws from, or makes streams of its own from."""
        call = self._frames[-1].call if self._frames else None
        return self._record.ambient if call is None else call.seed

    @contextmanager
    def for_another(self, under_way: int) -> Iterator[None]:
        """Run what another worker, where that stream is under way, would run itself; then come back."""
        here, frames, replaying = self.position(), self._frames, self._replaying
        self._record, self._frames, self._replaying = (
            self._others,
            [_Frame([], _Call("", under_way), replay=False)],
            False,
        )
        self._seed_all(under_way)
        try:
            yield
        finally:
            self._move(here)
            self._frames, self._replaying = frames, replaying

    def draw_as(self, step: int, microbatch: int) -> None:
        """Let the module under way draw from here on what it draws where another microbatch came to it the same way."""
        seed = _Record(self._seed, step, microbatch).ambient
        for frame in self._frames:
            assert frame.call is not None
            seed = key(seed, frame.call.name, frame.call.time)
        self._seed_all(seed)

    def forget_others(self) -> None:
        """A microbatch begins, for this worker and those that it runs modules for."""
        self._others = _Record(self._seed, 0, 0)

    def name_of(self, module: nn.Module) -> str:
        """A module's name in the model."""
        return self._names.get(module) or type(module).__name__

    def close(self) -> None:
        """Detach from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _move(self, position: Position) -> None:
        self._record = position.record
        for generator, state in zip(self._generators, position.states, strict=True):
            generator.set_state(state)
        random.setstate(position.python)
        np.random.set_state(position.numpy)

    def _attach(self, name: str, module: nn.Module) -> None:
        def before(_module: nn.Module, _arguments: Any) -> None:
            replay = self._replaying or torch._C._current_graph_task_id() != -1
            record, tag = self._record, self._generators[0].initial_seed()
            states = [generator.get_state() for generator in self._generators]
            if replay:
                call = record.find(name, tag)
            else:
                within = self._frames[-1].call if self._frames else None
                call = record.add(name, tag, within=within, keep=module.training or torch.is_grad_enabled())
            frame = _Frame(states, call, replay=replay)
            self._frames.append(frame)
            self._seed_all(call.seed if call is not None else record.unknown(name))
            if call is None:
                frame.seeded = [generator.get_state() for generator in self._generators]

        def after(_module: nn.Module, _arguments: Any, _output: Any) -> None:
            if not self._frames:
                return
            frame = self._frames.pop()
            if frame.call is None:
                self._refuse_draws(name, frame)
            elif frame.replay:
                _write_tag(frame.states[0], self._record.tag(frame.call))
            else:
                _write_tag(frame.states[0], self._record.end(frame.call, _tag_of(frame.states[0])))
            for generator, state in zip(self._generators, frame.states, strict=True):
                generator.set_state(state)

        # First in, last out: hooks of others on the same module run inside its stream.
        self._handles.append(module.register_forward_pre_hook(before, prepend=True))
        self._handles.append(module.register_forward_hook(after, always_call=True))

    def _refuse_draws(self, name: str, frame: _Frame) -> None:
        """A module ran in backward and none of forward's calls is known to be the same: it must not have drawn."""
        states = [generator.get_state() for generator in self._generators]
        if all(torch.equal(*pair) for pair in zip(states, frame.seeded, strict=True)):
            return
        error = TaskError(
            f"{name or 'the model'} runs again in backward and draws random numbers, and the generator's state was not "
            "put back to where forward had it, so it would draw others than forward did: switch the model's own "
            "checkpointing off and use the plan's recompute=full, or checkpoint with preserve_rng_state=True"
        )
        if torch._C._current_graph_task_id() == -1:
            raise error

        def refuse() -> None:
            raise error

        # A checkpoint stops its recomputation early by an exception, which swallows those that hooks raise.
        torch.autograd.Variable._execution_engine.queue_callback(refuse)

    def _seed_all(self, seed: int) -> None:
        for generator in self._generators:
            generator.manual_seed(seed)


def _tag_of(state: Tensor) -> int:
    """The number that a CPU generator's state was seeded with, which is where its state begins."""
    return ctypes.c_uint64.from_address(state.data_ptr()).value


def _write_tag(state: Tensor, tag: int) -> None:
    ctypes.c_uint64.from_address(state.data_ptr()).value = tag


def _generators(device: torch.device) -> list[torch.Generator]:
    generators = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index  # pyright: ignore[reportUnnecessaryComparison] - torch's stub says int
        generators.append(torch.cuda.default_generators[index])
    return generators
