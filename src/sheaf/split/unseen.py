"""What torch runs without asking any mode: custom functions of autograd, and a model's own checkpoints.

A custom function that is given slices gets them whole: it would lose their gradients. A checkpoint runs again in
backward, where the mode is left; it is brought back for that.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint as checkpoints
from torch.utils._pytree import tree_iter

from sheaf.split.sent import Sent
from sheaf.split.tensor import Split


class AbstractSeeing(TorchFunctionMode, ABC):
    """A mode that a forward runs in, and that must see this too. It may be entered again inside itself."""

    def __init__(self) -> None:
        super().__init__()
        self._depth = 0

    def __enter__(self) -> "AbstractSeeing":  # noqa: PYI034 - Self is no runtime type
        """A forward begins, or goes on inside itself."""
        if not self._depth:
            _enter(self)
            self.begin()
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        """Forward ends: what is under way comes, unless it failed."""
        if self._depth == 1 and raised[0] is None:
            self.settle()
        self._depth -= 1
        if not self._depth:
            _leave(self)
            self.end()
        super().__exit__(*raised)

    def begin(self) -> None:
        """A forward begins."""

    def end(self) -> None:
        """It has ended, or failed."""

    @abstractmethod
    def settle(self) -> None:
        """Let everything come that is under way (collective)."""

    @abstractmethod
    def look(self, given: Sequence[Any]) -> None:
        """A function that the mode does not see is about to be given these."""

    @abstractmethod
    def is_away(self, value: Any) -> bool:
        """Whether a tensor is not here as it looks."""

    @abstractmethod
    def whole(self, value: Any, why: str) -> Any:
        """The same value with every tensor as it looks, in containers too (collective)."""


class _Running(threading.local):
    """The modes that a thread is in."""

    def __init__(self) -> None:
        self.modes: list[AbstractSeeing] = []


_running = _Running()
_apply: Callable[..., Any] = vars(Function)["apply"].__func__
_frames: Callable[..., Iterator[Any]] = checkpoints._checkpoint_without_reentrant_generator


_lock = threading.Lock()
_count = 0  # of modes that run, on any thread


def _enter(mode: AbstractSeeing) -> None:
    """A mode begins on this thread; torch's own functions are exchanged while any runs."""
    global _count  # noqa: PLW0603 - torch is one for the whole process, too
    _running.modes.append(mode)
    with _lock:
        _count += 1
        if _count == 1:
            Function.apply = classmethod(apply)  # pyright: ignore[reportAttributeAccessIssue]
            checkpoints._checkpoint_without_reentrant_generator = frames


def _leave(mode: AbstractSeeing) -> None:
    """It ends."""
    global _count  # noqa: PLW0603
    _running.modes.remove(mode)
    with _lock:
        _count -= 1
        if not _count:
            Function.apply = classmethod(_apply)  # pyright: ignore[reportAttributeAccessIssue]
            checkpoints._checkpoint_without_reentrant_generator = _frames


def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    """Stands in for torch.autograd.Function.apply."""
    if not _running.modes:
        return _apply(cls, *args, **kwargs)
    if cls is checkpoints.CheckpointFunction:  # would leave the mode, and the graph of slices, in backward
        function, keeps_random_state, *given = args
        return checkpoints.checkpoint(function, *given, use_reentrant=False, preserve_rng_state=keeps_random_state)
    if cls.__module__ == checkpoints.__name__:
        return _apply(cls, *args, **kwargs)
    leaves, mode = list(tree_iter((args, kwargs))), _running.modes[-1]
    mode.look(leaves)
    if any(mode.is_away(leaf) for leaf in leaves):
        args, kwargs = mode.whole(args, cls.__name__), mode.whole(kwargs, cls.__name__)
    return _apply(cls, *args, **kwargs)


def frames(function: Callable[..., Any], keeps_random_state: bool, context: Any, *rest: Any, **named: Any) -> Any:
    """Stands in for what torch.utils.checkpoint.checkpoint is made of; one with contexts of its own keeps them."""
    if not _running.modes:
        return _frames(function, keeps_random_state, context, *rest, **named)
    if context is checkpoints.noop_context_fn:
        mode = _running.modes[-1]
        context = lambda: (nullcontext(), mode)  # noqa: E731
    again, kept = _of_slices(function, rest)
    return _frames(again, keeps_random_state, context, *kept, **named)


def _of_slices(function: Callable[..., Any], given: Sequence[Any]) -> tuple[Callable[..., Any], Sequence[Any]]:
    """The same function, of slices in place of what is cut, and of rows in place of what is sent: a checkpoint inside
    of another would keep a ``Split`` or a ``Sent`` without its gradient. The arguments of ``function`` stand last in
    ``given``.
    """
    laid = {place - len(given): _laid(one) for place, one in enumerate(given) if isinstance(one, Split | Sent)}

    def again(*args: Any, **kwargs: Any) -> Any:
        made = list(args)
        for place, lay in laid.items():
            made[place] = lay(args[place])
        return function(*made, **kwargs)

    if not laid:
        return function, given
    return again, [one.local if isinstance(one, Split | Sent) else one for one in given]


def _laid(one: Split | Sent) -> Callable[[Tensor], Split | Sent]:
    """Makes the like of it from its ``local``, which is not held here."""
    if isinstance(one, Sent):
        return partial(Sent, places=one.places, origin=one.origin)
    like = partial(Split, dim=one.axis, cut=one.cut, origin=one.origin, scale=one.scale, held=one.held)
    shadow = one.shadow

    def lay(local: Tensor) -> Split:
        made = like(local)
        made.shadow = shadow
        return made

    return lay
