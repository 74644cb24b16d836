"""Which part of which parameter lies on which shard: dense ones in contiguous runs of bytes, embeddings by rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sheaf.plans.layout import Held, Piece, apportion

_ALIGNED_BYTES = 16


def spread(
    parameters: Sequence[Held], sizes: Mapping[str, int], rows: Mapping[str, int], count: int
) -> list[tuple[Piece, ...]]:
    """By shard, its pieces of the trained parameters; at most one of each parameter.

    ``sizes`` are bytes of a number by dtype. ``rows`` has the parameters that are cut between rows, with the numbers in
    a row; each is shared out over all shards. The others are laid end to end and cut into runs of equal bytes.
    Offsets are in bytes, each a multiple of 16.

    >>> held = [Held("w", 6, "float32"), Held("b", 2, "float32"), Held("e", 6, "float32")]
    >>> [[(p.name, p.start, p.stop) for p in shard] for shard in spread(held, {"float32": 4}, {"e": 2}, 2)]
    [[('w', 0, 4), ('e', 0, 4)], [('w', 4, 6), ('b', 0, 2), ('e', 4, 6)]]
    """
    trained = [held for held in parameters if held.trained and held.num_elements]
    dense = [held for held in trained if held.name not in rows]
    total = sum(held.num_elements * sizes[held.dtype] for held in dense)
    cuts: list[list[tuple[str, int, int, int]]] = [[] for _ in range(count)]
    begin = 0
    for held in dense:
        size = sizes[held.dtype]
        edges = [
            min(held.num_elements, max(0, -(-(total * shard // count - begin) // size))) for shard in range(count + 1)
        ]
        edges[0], edges[-1] = 0, held.num_elements
        for shard in range(count):
            if edges[shard] < edges[shard + 1]:
                cuts[shard].append((held.name, edges[shard], edges[shard + 1], size))
        begin += held.num_elements * size
    for held in trained:
        if held.name in rows:
            start = 0
            for shard, share in enumerate(apportion(held.num_elements // rows[held.name], [1] * count)):
                stop = start + share * rows[held.name]
                if start < stop:
                    cuts[shard].append((held.name, start, stop, sizes[held.dtype]))
                start = stop
    return [_placed(shard) for shard in cuts]


def _placed(cuts: list[tuple[str, int, int, int]]) -> tuple[Piece, ...]:
    pieces: list[Piece] = []
    offset = 0
    for name, start, stop, size in cuts:
        pieces.append(Piece(name, start, stop, offset))
        offset += -(-(stop - start) * size // _ALIGNED_BYTES) * _ALIGNED_BYTES
    return tuple(pieces)


@dataclass(frozen=True)
class Form:
    """How a shard's numbers lie in one run of bytes, the same at both ends: its pieces and their dtypes."""

    pieces: tuple[Piece, ...]
    dtypes: tuple[torch.dtype, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all pieces, with what aligns them."""
        ends = [
            piece.offset + piece.num_elements * dtype.itemsize
            for piece, dtype in zip(self.pieces, self.dtypes, strict=True)
        ]
        return max(ends, default=0)

    def arena(self) -> "Arena":
        """Room for as many numbers."""
        return Arena(self)


class Arena:
    """Room for one shard's numbers: ``raw`` as bytes for the wire, ``views`` as flat tensors by parameter name."""

    def __init__(self, form: Form) -> None:
        self.form = form
        held = torch.zeros(form.size_bytes, dtype=torch.uint8)
        self.raw: memoryview = held.numpy().data
        self.views: dict[str, Tensor] = {}
        for piece, dtype in zip(form.pieces, form.dtypes, strict=True):
            stop = piece.offset + piece.num_elements * dtype.itemsize
            self.views[piece.name] = held[piece.offset : stop].view(dtype)

    def copy_(self, values: Mapping[str, Tensor]) -> None:
        """Take over values of the same names and sizes."""
        for name, view in self.views.items():
            view.copy_(values[name])


def forms_of(model: nn.Module, parameters: dict[str, nn.Parameter], shards: int) -> list[Form]:
    """How the trained parameters lie on the shards; embeddings by rows."""
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    rows = {name: value.shape[1] for name, value in parameters.items() if any(value is table for table in tables)}
    held = [Held(name, value.numel(), str(value.dtype), value.requires_grad) for name, value in parameters.items()]
    sizes = {str(value.dtype): value.itemsize for value in parameters.values()}
    kinds = {name: value.dtype for name, value in parameters.items()}
    return [Form(pieces, tuple(kinds[piece.name] for piece in pieces)) for pieces in spread(held, sizes, rows, shards)]
