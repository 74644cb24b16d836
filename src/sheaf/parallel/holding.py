"""How a worker holds parameters, gradients and optimizer state, and how gradients meet: one interface, three ways."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sheaf.errors import PlanError
from sheaf.parallel.offload import Offload
from sheaf.parallel.portion import Portion
from sheaf.plans.layout import Piece


class Factor:
    """What a gradient sum is multiplied by to be the step's gradient; asking waits for others until it is ``known``."""

    def __init__(self, find: Callable[[], float], known: Callable[[], bool] = lambda: True) -> None:
        self._find, self.known = find, known

    def __call__(self) -> float:
        return self._find()


class Touched:
    """Notes which parameters got a gradient, and tells a listener each time.

    The hooks hold it weakly: a hook is part of its parameter, where no garbage collector looks.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], listener: Callable[[str], object]) -> None:
        self.names: set[str] = set()
        self._listener = listener
        self._handles: list[RemovableHandle] = []
        me: weakref.ref[Touched] = weakref.ref(self)
        for name, parameter in parameters:
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(_hook(me, name)))

    def come(self, name: str) -> None:
        """A parameter got a gradient."""
        self.names.add(name)
        self._listener(name)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _hook(touched: "weakref.ref[Touched]", name: str) -> Callable[[Tensor], None]:
    def accumulated(parameter: Tensor) -> None:
        there = touched()
        if there is not None and parameter.grad is not None:  # torch calls this for no gradient, too
            there.come(name)

    return accumulated


def refuse_sparse(name: str, gradient: Tensor) -> None:
    """Raises PlanError, naming the parameter, when its gradient is not a dense tensor."""
    if gradient.layout is not torch.strided:
        raise PlanError(
            f"parameter {name} got a sparse gradient, which workers cannot add up: build its layer (or call "
            "torch.nn.functional.embedding) with sparse=False"
        )


def laid_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in memory as its parameter is, as autograd leaves it: fused kernels go by memory alone."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


class AbstractHolding(ABC):
    """What the step needs of any way to hold a model. Every method is called on every worker, in the same order.

    Within a step: ``begin_step``; per microbatch ``arm``, backward, ``end_backward`` (or ``idle_round`` where another
    worker has one microbatch more); ``finish``; ``scale`` to clip; ``update``; ``after_update``.
    """

    _touched: Touched
    model: nn.Module
    optimizer: torch.optim.Optimizer
    _host: Offload | None = None
    lockstep: bool = False  # whether workers go through microbatches in rounds

    @abstractmethod
    def begin_step(self) -> None:
        """Forget the last step's gradients."""

    def enter_stage(self, stage: int, *, forward: bool) -> None:  # noqa: B027 - most make no difference
        """A forward or a backward of a pipeline stage begins."""

    def leave_forward(self) -> None:  # noqa: B027 - most keep everything
        """A pipeline stage's forward has run."""

    @abstractmethod
    def arm(self, *, last: bool) -> None:
        """A backward is about to run; ``last`` when it is this worker's last of the step."""

    @abstractmethod
    def end_backward(self) -> None:
        """That backward has run."""

    def gave_up(self) -> None:  # noqa: B027 - most have sent what was complete
        """That backward failed: send what was complete until then, so that all workers on which it did have sent as
        much, and whatever they go on with meets the same.
        """

    def idle_round(self) -> None:
        """Take part in a round in which this worker has no microbatch."""
        raise AssertionError("only holdings in lockstep have rounds")

    @abstractmethod
    def flush(self) -> None:
        """No more backward in this step: start every collective that has not started."""

    @abstractmethod
    def finish(self, used: set[str]) -> None:
        """Wait until gradients are the step's own; parameters that no microbatch used have none."""

    @abstractmethod
    def held(self) -> dict[str, Tensor]:
        """By parameter name, the gradient (or the part of it) that this worker's optimizer sees."""

    @abstractmethod
    def after_update(self) -> None:
        """The optimizer has stepped: make every worker's parameters current."""

    @abstractmethod
    def full_gradients(self) -> dict[str, Tensor]:
        """Whole gradients by parameter name, on every worker (collective)."""

    @abstractmethod
    def full_parameters(self) -> dict[str, Tensor]:
        """Whole parameters by canonical name, on every worker (collective)."""

    @abstractmethod
    def kept(self) -> dict[str, Tensor]:
        """What this worker keeps in a checkpoint: parameters, or its shards of them, as they are in memory."""

    @abstractmethod
    def stepped(self) -> Mapping[str, tuple[Tensor, Piece | None]]:
        """By parameter name, what of it is to be stepped here: a piece, or without one what is held of it whole."""

    def offload(self, portion: Portion) -> None:
        """Have the optimizer step in the host's memory; before anybody looks at it."""
        self._host = Offload(portion, self.stepped())
        self.optimizer = self._host.optimizer

    def update(self) -> None:
        """Let the optimizer step, where its state is."""
        if self._host is None:
            self.optimizer.step()
        else:
            self._host.step()

    def optimizer_names(self) -> dict[int, str]:
        """The parameter name of each tensor that the optimizer steps, by its id."""
        held = (
            {name: tensor for name, (tensor, _) in self.stepped().items()} if self._host is None else self._host.tensors
        )
        return {id(tensor): name for name, tensor in held.items()}

    def reread(self) -> None:
        """Values in ``kept`` are others than those that the optimizer stepped: take them."""
        if self._host is not None:
            self._host.reread()

    def extra(self) -> dict[str, Tensor]:
        """What a checkpoint must keep besides parameters and optimizer state, live (collective)."""
        return {}

    def loaded(self) -> None:
        """A checkpoint's tensors have been put in: make every worker's parameters current."""
        self.after_update()

    @property
    def distinct(self) -> bool:
        """Whether each worker keeps something in ``extra`` or in ``kept`` that no other has."""
        return False

    @property
    def meets_weights(self) -> bool:
        """Whether the gradients of the step under way stay with each worker, and weights meet in their place."""
        return False

    @property
    @abstractmethod
    def sharded(self) -> bool:
        """Whether the gradients in ``held`` are disjoint pieces of the whole."""

    @property
    def touched(self) -> set[str]:
        """Parameters that this worker's backwards gave a gradient in this step."""
        return self._touched.names

    def close(self) -> None:
        """Take every hook off the model, and give its blocks their own forward back."""
        self._touched.close()

    def forward_context(self) -> AbstractContextManager[object]:
        """What the next forward runs in."""
        return nullcontext()

    def scale(self, coefficient: float) -> None:
        """Multiply the step's gradients."""
        gradients = list(self.held().values())
        if gradients:
            torch._foreach_mul_(gradients, coefficient)
