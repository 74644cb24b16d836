"""How a worker holds the model that steps alone between meetings with a parameter server."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sheaf.parallel.portion import Portion
from sheaf.parallel.server.beside import Beside
from sheaf.parallel.server.places import Arena
from sheaf.parallel.world import World
from sheaf.plans.layout import Piece


class Departing(Beside):
    """As beside a server, but with the task's own optimizer on this worker's own weights.

    What it lays out for shards is by how far these have departed from the values it pulled last, its *anchors*.
    ``weight`` is that of the losses it has stepped by since. In lock-step the whole is the mean of all workers'
    weights, by these weights (``among``, collective); otherwise it is what the shards have.
    """

    def __init__(self, portion: Portion, device: torch.device, among: World | None) -> None:
        super().__init__(portion, device)
        self._among = among
        self.weight = torch.zeros((), dtype=torch.float64)
        self.anchors: list[Arena] = []

    @property
    def distinct(self) -> bool:
        return True

    def begin(self) -> None:
        """The weights are those that the shards have, too."""
        self.anchors = [arena.form.arena() for arena in self.client.out]
        for anchor in self.anchors:
            for piece in anchor.form.pieces:
                anchor.views[piece.name].copy_(self._part(piece.name, piece.start, piece.stop))

    def depart(self, factor: float) -> list[list[int]]:
        """Lay out for the shards what the weights departed by, times ``factor``; by shard, the places of its pieces."""
        for arena, anchor in zip(self.client.out, self.anchors, strict=True):
            for piece in arena.form.pieces:
                own = self._part(piece.name, piece.start, piece.stop).to("cpu")
                torch.sub(anchor.views[piece.name], own, out=arena.views[piece.name]).mul_(factor)
        return [list(range(len(arena.form.pieces))) for arena in self.client.out]

    def arrive(self) -> None:
        """Go on from the values that were pulled last."""
        for arena, anchor in zip(self.client.values, self.anchors, strict=True):
            anchor.copy_(arena.views)
        self.weight.zero_()
        self.take()

    def kept(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.parameters.items()}

    def extra(self) -> dict[str, Tensor]:
        named = {"weight": self.weight}
        for shard, anchor in enumerate(self.anchors):
            named |= {f"anchor/{shard}/{name}": view for name, view in anchor.views.items()}
        return named

    def loaded(self) -> None:
        """Nothing: every worker has its own."""

    def stepped(self) -> Mapping[str, tuple[Tensor, Piece | None]]:
        return {name: (value, None) for name, value in self.parameters.items()}

    def full_parameters(self) -> dict[str, Tensor]:
        if self._among is None:
            return super().full_parameters()
        whole = {name: value.detach() for name, value in self.parameters.items()}
        total = float(self._among.summed(self.weight.reshape(1).clone(), "weights of losses")[0])
        for name, value in self.parameters.items():
            if total and value.requires_grad:
                whole[name] = whole[name] * (float(self.weight) / total)
                self._among.wait(self._among.all_reduce(whole[name], "weights"))
        return whole

    def _part(self, name: str, start: int, stop: int) -> Tensor:
        return self.parameters[name].detach().reshape(-1)[start:stop]
