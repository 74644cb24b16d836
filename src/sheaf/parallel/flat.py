"""One flat group of parameters on one worker: the whole, this worker's shard of it, and the pieces in the shard."""

import torch
from torch import Tensor, nn

from sheaf.parallel.holding import refuse_sparse
from sheaf.plans.layout import Flat, Piece


class FlatTensors:
    """The tensors of one ``Flat``. ``whole`` may be freed and refilled; the parameters are views of it for ever.

    With ``apart`` the shard has memory of its own, so that the whole can be freed; otherwise it is a view of it.
    """

    def __init__(self, flat: Flat, rank: int, shapes: dict[str, torch.Size], device: torch.device, *, apart: bool):
        self.flat, self.rank = flat, rank
        self.dtype = getattr(torch, flat.parameters[0].dtype)
        self.whole = torch.zeros(flat.padded_elements, dtype=self.dtype, device=device)
        self._whole_bytes = self.whole.untyped_storage().nbytes()
        own = self.whole.narrow(0, flat.start(rank), flat.sizes[rank])
        self.shard = torch.zeros_like(own) if apart else own
        self.gradient_shard = torch.zeros(flat.sizes[rank] if self.trained else 0, dtype=self.dtype, device=device)
        self.views = {name: part.view(shapes[name]) for name, part in self.split(self.whole).items()}
        self.names = [parameter.name for parameter in flat.parameters]
        self.pieces: tuple[Piece, ...] = flat.pieces(rank)
        if apart:
            self.free()

    @property
    def trained(self) -> bool:
        """Whether its parameters get gradients."""
        return self.flat.parameters[0].trained

    @property
    def storage(self) -> int:
        """The identity of the memory that the parameters view."""
        return self.whole.untyped_storage()._cdata

    def split(self, whole: Tensor) -> dict[str, Tensor]:
        """A tensor laid out like the whole, cut at the parameters' edges; padding is left out."""
        sizes = [parameter.num_elements for parameter in self.flat.parameters]
        parts = whole[: sum(sizes)].split(sizes)
        return {parameter.name: part for parameter, part in zip(self.flat.parameters, parts, strict=True)}

    def put(self, name: str, value: Tensor) -> None:
        """Store this worker's piece of a parameter's whole value."""
        for piece in self.pieces:
            if piece.name == name:
                self.shard.narrow(0, piece.offset, piece.num_elements).copy_(value.flatten()[piece.start : piece.stop])

    def part_of(self, shard: Tensor, piece: Piece) -> Tensor:
        """A piece as a view of a tensor laid out like the shard."""
        return shard.narrow(0, piece.offset, piece.num_elements)

    def free(self) -> None:
        """Give the whole's memory back; the parameters stay, empty."""
        self.whole.untyped_storage().resize_(0)

    def allocate(self) -> None:
        """Take memory for the whole again, values unset."""
        self.whole.untyped_storage().resize_(self._whole_bytes)

    def gradients_into(self, out: Tensor, parameters: dict[str, nn.Parameter], factor: float) -> None:
        """Lay the parameters' gradients end to end into ``out``, times ``factor``, and drop them; zero for none.

        Raises PlanError for a sparse gradient.
        """
        for name, view in self.split(out).items():
            gradient = parameters[name].grad
            if gradient is None:
                view.zero_()
            else:
                refuse_sparse(name, gradient)
                torch.mul(gradient.reshape(-1), factor, out=view)
                parameters[name].grad = None
        out[self.flat.num_elements :].zero_()
