"""A tensor of tokens by expert whose rows are where their experts are: to the model it is its own microbatch's."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd import Function

from sheaf.errors import PlanError
from sheaf.plans.split import Cut
from sheaf.split.moves import Team
from sheaf.split.places import AbstractPlaces


@runtime_checkable
class Swapping(Team, Protocol):
    """Replicas that can send each other tensors of several sizes at once."""

    def swap(self, pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]], why: str) -> list[Tensor]:
        """What every one has for this one, in rank order; ``pieces`` go to them in rank order, ``shapes`` come."""
        ...


class Unsendable(PlanError):
    """Parameter ``name``, or what was sent for it, is used in a way that cannot be followed."""

    def __init__(self, broken: str | Sequence[str], name: str = "") -> None:
        super().__init__(broken)
        self.name = name


class Sent(Tensor):
    """Looks like the rows of the replica's own microbatch at these ``places``, contiguous.

    ``local`` is what all replicas have for this worker's experts. ``origin`` names the parameter it was sent for.
    """

    local: Tensor
    places: AbstractPlaces
    origin: str
    home: Tensor | None

    def __new__(  # noqa: PYI034 - Self is no runtime type
        cls,
        local: Tensor,
        places: AbstractPlaces,
        origin: str,  # noqa: ARG004 - __init__ keeps it
    ) -> "Sent":
        """A tensor without memory."""
        return torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, places.shape(local.shape[-1]), dtype=local.dtype, device=local.device, requires_grad=False
        )

    def __init__(self, local: Tensor, places: AbstractPlaces, origin: str) -> None:
        """Wrap rows that have been sent."""
        super().__init__()
        self.local, self.places, self.origin = local, places, origin
        # the same rows, brought back; of which version of ``local``, and whether with its history
        self.home, self.version, self.traced = None, -1, False

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raises PlanError: a function got here that the mode did not see."""
        raise PlanError(
            f"{func} reached tokens that are sent to experts unseen (a compiled extension does that): leave the module "
            "out of the plan's =ep parts"
        )

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Sent({tuple(self.shape)}, {self.places}, local={tuple(self.local.shape)})"

    def like(self, local: Tensor) -> "Sent":
        """Other rows at the same places."""
        return Sent(local, self.places, self.origin)

    def goes_with(self, other: "Sent") -> bool:
        """Whether two have their rows at the same places."""
        return self.places == other.places


class AbstractTrip(ABC):
    """One way of rows, ``outward`` to their experts or back.

    ``wanted`` says whether it has a gradient, ``used`` whether any replica's loss depends on what arrived.
    """

    outward: bool
    wanted: bool
    used: bool

    @abstractmethod
    def move(self, tensor: Tensor, *, outward: bool) -> Tensor:
        """What every replica has for this one (collective)."""


@dataclass
class Trip(AbstractTrip):
    """Rows at their ``places``: to the experts that ``cut`` deals out, or back."""

    team: Swapping
    cut: Cut
    places: AbstractPlaces
    outward: bool
    wanted: bool
    why: str
    used: bool = True

    def move(self, tensor: Tensor, *, outward: bool) -> Tensor:
        """Own rows to all rows of own experts, or back."""
        places, given, width = self.places, (self.cut, self.team.rank), tensor.shape[-1]
        pieces = places.leaving(tensor, *given) if outward else places.returning(tensor, *given)
        shapes = places.arriving(*given, width) if outward else places.returned(*given, width)
        flags = tensor.dtype is torch.bool
        pieces = [piece.contiguous().view(torch.uint8) if flags else piece.contiguous() for piece in pieces]
        received = self.team.swap(pieces, shapes, self.why)
        joined = places.laid(received, *given) if outward else torch.cat(received)
        return joined.view(torch.bool) if flags else joined


class Travel(Function):
    """Rows go one way forward, and their gradient the other way backward.

    A token goes along from trip to trip, so that backward makes the trips of every replica in one order, and all of
    them, whatever its loss depends on. It is looked at before each: a block that is recomputed in backward is so before
    its last trip, on every replica.
    """

    @staticmethod
    def forward(ctx: Any, token: Tensor, rows: Tensor, trip: AbstractTrip) -> tuple[Tensor, Tensor]:
        ctx.trip = trip
        ctx.save_for_backward(token)
        ctx.set_materialize_grads(False)
        moved = trip.move(rows, outward=trip.outward)
        ctx.like = moved.shape, moved.dtype, moved.device
        if not trip.wanted:
            ctx.mark_non_differentiable(moved)
        return token.clone(), moved

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        token, gradient = gradients
        _ = ctx.saved_tensors
        trip: AbstractTrip = ctx.trip
        if not (trip.wanted and trip.used):
            return token, None, None
        if gradient is None:
            shape, dtype, device = ctx.like
            gradient = torch.zeros(shape, dtype=dtype, device=device)
        moved = trip.move(gradient, outward=not trip.outward)
        return token, (moved if ctx.needs_input_grad[1] else None), None


def reached(loss: Tensor) -> tuple[frozenset[int], frozenset[Any]]:
    """The trips whose rows the loss depends on, by id, and all nodes; what only the token leads to does not count."""
    found: set[int] = set()
    met: set[Any] = set()
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in met:
            continue
        met.add(node)
        trip = getattr(node, "trip", None)
        after = node.next_functions
        if isinstance(trip, AbstractTrip):
            found.add(id(trip))
            after = after[1:2]
        stack += [other for other, _ in after]
    return frozenset(found), frozenset(met)
