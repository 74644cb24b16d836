"""How a worker beside a parameter server holds the model: all of it, with gradients of its own and no optimizer."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sheaf.errors import NonFiniteLoss
from sheaf.parallel.exchange import Exchange
from sheaf.parallel.holding import AbstractHolding, Touched, refuse_sparse
from sheaf.parallel.optimizers import whole_optimizer
from sheaf.parallel.portion import Portion
from sheaf.parallel.server.client import Client
from sheaf.parallel.server.places import Arena
from sheaf.plans.layout import Piece


class Losses(Exchange):
    """Collects this worker's losses; they travel with its gradient, not by a collective."""

    def send(self) -> None:
        """Nothing: the push tells."""


class Beside(AbstractHolding):
    """Gradients add up in ``parameter.grad``; ``put`` lays them out by shard, ``take`` brings values back.

    ``optimizer`` is one over a stand-in, for those who look at its settings: the shards have the real ones. Without
    it, it is the task's own over the parameters here.
    """

    client: Client

    def __init__(self, portion: Portion, device: torch.device, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model = portion.fill(device)
        self.parameters = portion.own(self.model)
        self.optimizer = optimizer or whole_optimizer(portion, self.parameters)
        self.served = self.parameters  # those that this worker pushes gradients of, and pulls
        self._touched = Touched(self.parameters.items(), lambda _: None)
        self.index = 0  # of the step that full_parameters waits for
        self.first = False  # whether this is worker 0, who gives the whole

    @property
    def sharded(self) -> bool:
        return False

    def begin_step(self) -> None:
        self._touched.names.clear()
        for parameter in self.parameters.values():
            parameter.grad = None

    def arm(self, *, last: bool) -> None:
        """Nothing: gradients leave when all microbatches have run."""

    def end_backward(self) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def finish(self, used: set[str]) -> None:
        """Nothing: gradients meet on the shards."""

    def after_update(self) -> None:
        """Nothing: values come with the pull."""

    def held(self) -> dict[str, Tensor]:
        return {name: value.grad for name, value in self.parameters.items() if value.grad is not None}

    def full_gradients(self) -> dict[str, Tensor]:
        return self.held()

    def full_parameters(self) -> dict[str, Tensor]:
        """On worker 0, what the shards have once every worker has come so far; elsewhere this worker's own."""
        own = {name: value.detach() for name, value in self.parameters.items()}
        if not self.first:
            return own
        self.client.read(self.index)
        return own | whole(self.client.values, own)

    def kept(self) -> dict[str, Tensor]:
        return {}

    def stepped(self) -> Mapping[str, tuple[Tensor, Piece | None]]:
        return {}

    def clip(self, step: int, largest: float | None, factor: float) -> float | None:
        """Scale this worker's own gradient, to a norm of at most ``largest``; the norm before.

        Raises NonFiniteLoss when the norm is no number.
        """
        gradients = list(self.held().values())
        if gradients and factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        norm = self.norm() if largest is not None else None
        if largest is None or norm is None:
            return None
        if not bool(norm.isfinite()):
            advice = "The loss is a number but its gradient is not: look for sqrt or log at zero, or 0/0."
            raise NonFiniteLoss(step, 0, float(norm), advice)
        if gradients:
            torch._foreach_mul_(gradients, float((largest / (norm + 1e-6)).clamp(max=1.0)))
        return float(norm)

    def norm(self) -> Tensor | None:
        """The norm of this worker's own gradient; None where it has none."""
        gradients = list(self.held().values())
        return torch.nn.utils.get_total_norm(gradients) if gradients else None

    def put(self) -> list[list[int]]:
        """Lay the gradients out for the shards; by shard, the places of the pieces that have one."""
        found: list[list[int]] = []
        for arena in self.client.out:
            used: list[int] = []
            for place, piece in enumerate(arena.form.pieces):
                gradient = self.parameters[piece.name].grad
                if gradient is not None:
                    refuse_sparse(piece.name, gradient)
                    arena.views[piece.name].copy_(gradient.reshape(-1)[piece.start : piece.stop])
                    used.append(place)
            found.append(used)
        return found

    def take(self) -> None:
        """Put the values that were pulled last into the model."""
        with torch.no_grad():
            for arena in self.client.values:
                for piece in arena.form.pieces:
                    value = self.parameters[piece.name].detach()
                    if value.is_contiguous():
                        value.view(-1)[piece.start : piece.stop].copy_(arena.views[piece.name])
            scattered = {name: value for name, value in self.parameters.items() if not value.is_contiguous()}
            for name, flat in whole(self.client.values, scattered).items():
                scattered[name].copy_(flat)


def whole(arenas: list[Arena], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, on the device and in the shape of those of that name, from what lies on each shard."""
    made: dict[str, Tensor] = {}
    for arena in arenas:
        for piece in arena.form.pieces:
            if piece.name in like:
                if piece.name not in made:
                    made[piece.name] = torch.empty(like[piece.name].shape, dtype=like[piece.name].dtype)
                made[piece.name].view(-1)[piece.start : piece.stop] = arena.views[piece.name]
    return {name: value.to(like[name].device) for name, value in made.items()}
