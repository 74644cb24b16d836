"""How one of several workers of a replica holds its part beside a parameter server.

Each place in a replica (a stage, a slice of the layers) has a server of its own, whose workers are those of that place
in every replica. What several places hold, such as a norm between split layers or an embedding that two stages use, is
served at the first of them; the others take it from there, so that copies stay the same to the last bit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sheaf.parallel.alike import Alike
from sheaf.parallel.optimizers import sliced_optimizer
from sheaf.parallel.portion import Portion
from sheaf.parallel.server.beside import Beside
from sheaf.parallel.spread import Spread


class PartBeside(Beside):
    """As for a whole replica, but that what is pushed and pulled is what this worker is the first to hold.

    ``tied`` are parameters that several stages hold. ``take`` and ``norm`` are collective in the replica.
    """

    def __init__(self, portion: Portion, spread: Spread, tied: Sequence[str]) -> None:
        super().__init__(portion, spread.world.device, sliced_optimizer(portion, {}))
        self._replica = spread.replica
        self.first = spread.place.dp == 0
        self.served = {
            name: value
            for name, value in self.parameters.items()
            if portion.counts(name) and (name in portion.slices or spread.leads)
        }
        fakes = portion.blueprint.parameters
        trained = [name for name, fake in fakes.items() if fake.requires_grad and fake.numel()]
        self._copies: list[Alike] = []
        if spread.mesh.tp > 1:
            whole = [name for name in trained if portion.counts(name) and name not in portion.slices]
            self._copies.append(Alike(whole, spread.parted, portion, gives=spread.leads))
        if shared := [name for name in tied if name in trained]:
            self._copies.append(Alike(shared, spread.copies, portion, gives=True))

    def take(self) -> None:
        super().take()
        for copies in self._copies:
            copies.meet(self.parameters)

    def norm(self) -> Tensor | None:
        """The norm of the replica's own gradient."""
        held = self.held()
        dtype = next((gradient.dtype for gradient in held.values()), torch.get_default_dtype())
        mine = [gradient for name, gradient in held.items() if name in self.served]
        square = torch.zeros(1, dtype=torch.float64)
        if mine:
            square += torch.nn.utils.get_total_norm(mine).to("cpu", torch.float64) ** 2
        return self._replica.summed(square, "gradient norm").sqrt()[0].to(dtype)
