"""Gradients summed over workers with fewer bytes; what is lost is added to the next step's (error feedback).

Error feedback: Seide et al., "1-Bit Stochastic Gradient Descent", 2014; Karimireddy et al., "Error Feedback Fixes
SignSGD", 2019.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from sheaf.cluster.primitives import Pending
from sheaf.parallel.codecs import AbstractCodec, Cast, Int8
from sheaf.parallel.world import World
from sheaf.plans.compression import Compression, matrix, top_count


class AbstractCompressor(ABC):
    """Sums one flat tensor again and again. Collective: every worker starts and waits in the same order."""

    _world: World
    _lost: Tensor  # what coding has cost this worker's tensors, in their order, and then padding

    def give_back(self, start: int, unused: Tensor) -> None:
        """Nobody takes this part of the sum, from ``start`` on: each worker brings its share of it to the next one.

        So it is when coding still owed something to a parameter that has no gradient in this step.
        """
        self._lost.view(-1)[start : start + unused.numel()].add_(unused.reshape(-1), alpha=1 / self._world.workers)

    @abstractmethod
    def start(self, flat: Tensor) -> Pending:
        """Begin to sum; once waited for, ``flat`` (one-dimensional) is about the sum, the same on every worker."""

    @abstractmethod
    def kept(self) -> dict[str, Tensor]:
        """What a checkpoint must keep of this worker, live."""


class Coded(AbstractCompressor):
    """Each worker gets a part of every other's tensor in code, adds, codes the sum, and all gather it.

    Both codings lose, and each loss comes back: the first where the tensor is, the second where the part is.
    """

    def __init__(self, world: World, codec: AbstractCodec, example: Tensor) -> None:
        self._world, self._codec = world, codec
        shard = math.ceil(example.numel() / world.workers / codec.chunk) * codec.chunk
        self._lost = example.new_zeros(world.workers, shard)
        self._lost_sum = example.new_zeros(1, shard)

    def start(self, flat: Tensor) -> Pending:
        given = self._lost
        given.view(-1)[: flat.numel()] += flat
        coded = self._codec.encode(given)
        self._lost = given - self._codec.decode(coded, flat.dtype)
        received = torch.empty_like(coded)

        def finish() -> None:
            total = self._codec.decode(received, flat.dtype).sum(0, keepdim=True) + self._lost_sum
            sent = self._codec.encode(total)
            self._lost_sum = total - self._codec.decode(sent, flat.dtype)
            gathered = torch.empty_like(received)
            self._world.all_gather(gathered.view(-1), sent.view(-1), "compressed gradients").wait()
            flat.copy_(self._codec.decode(gathered, flat.dtype).view(-1)[: flat.numel()])

        return self._world.all_to_all(received, coded, "compressed gradients").then(finish)

    def kept(self) -> dict[str, Tensor]:
        return {"lost": self._lost, "lost_sum": self._lost_sum}


class TopK(AbstractCompressor):
    """Of each worker's tensor the numbers of largest magnitude travel, with their places.

    Aji and Heafield, "Sparse Communication for Distributed Gradient Descent", 2017.
    """

    def __init__(self, world: World, ratio: float, example: Tensor) -> None:
        self._world, self._count = world, top_count(ratio, example.numel())
        self._lost = torch.zeros_like(example)

    def start(self, flat: Tensor) -> Pending:
        self._lost += flat
        places = self._lost.abs().topk(self._count).indices
        values = self._lost[places]
        self._lost[places] = 0
        sent = torch.cat([values.view(torch.uint8), places.to(torch.int32).view(torch.uint8)])
        received = sent.new_empty(self._world.workers * sent.numel())

        def finish() -> None:
            flat.zero_()
            for row in received.view(self._world.workers, -1):  # in rank order: the same sum on every worker
                numbers, where = row.split([values.numel() * values.itemsize, 4 * self._count])
                flat.index_add_(0, where.clone().view(torch.int32), numbers.clone().view(flat.dtype))

        return self._world.all_gather(received, sent, "largest gradients").then(finish)

    def kept(self) -> dict[str, Tensor]:
        return {"lost": self._lost}


class PowerSGD(AbstractCompressor):
    """Matrices travel as two thin factors, found by one step of power iteration from the last step's.

    Vogels et al., "PowerSGD", 2019, algorithm 1. Tensors of ``shapes`` that it would not make smaller travel whole.
    """

    def __init__(self, world: World, rank: int, example: Tensor, shapes: Sequence[torch.Size]) -> None:
        self._world, self._sizes = world, [shape.numel() for shape in shapes]
        found = {index: matrix(shape, rank) for index, shape in enumerate(shapes)}
        self._matrices = {index: one for index, one in found.items() if one is not None}
        self._lost = torch.zeros_like(example)
        generator = torch.Generator().manual_seed(0)  # the same on every worker, as it must be
        self._right = {
            index: torch.randn(columns, rank, generator=generator).to(example)
            for index, (_, columns) in self._matrices.items()
        }

    def start(self, flat: Tensor) -> Pending:
        self._lost += flat
        given = self._lost.split(self._sizes)
        matrices = {index: given[index].view(shape) for index, shape in self._matrices.items()}
        lefts = {index: matrix @ self._right[index] for index, matrix in matrices.items()}
        whole = [index for index in range(len(given)) if index not in matrices]
        first = torch.cat([*(left.view(-1) for left in lefts.values()), *(given[index] for index in whole)])

        def finish() -> None:
            parts = first.split([*(left.numel() for left in lefts.values()), *(self._sizes[index] for index in whole)])
            out = flat.split(self._sizes)
            bases = {
                index: torch.linalg.qr(part.view_as(lefts[index])).Q for index, part in zip(lefts, parts, strict=False)
            }
            mine = {index: matrices[index].T @ basis for index, basis in bases.items()}
            for index, basis in bases.items():
                matrices[index].addmm_(basis, mine[index].T, alpha=-1)
            for index, part in zip(whole, parts[len(lefts) :], strict=True):
                out[index].copy_(part)
                given[index].zero_()
            if not mine:
                return
            second = torch.cat([factor.reshape(-1) for factor in mine.values()])
            self._world.all_reduce(second, "second factors of gradients").wait()
            for (index, basis), part in zip(
                bases.items(), second.split([factor.numel() for factor in mine.values()]), strict=True
            ):
                self._right[index] = part.view_as(mine[index]).clone()
                torch.mm(basis, self._right[index].T, out=out[index].view(self._matrices[index]))

        return self._world.all_reduce(first, "first factors of gradients").then(finish)

    def kept(self) -> dict[str, Tensor]:
        return {"lost": self._lost} | {f"right{index}": value for index, value in self._right.items()}


def compressor(
    compression: Compression, world: World, example: Tensor, shapes: Sequence[torch.Size]
) -> AbstractCompressor:
    """What sums tensors like ``example`` (flat, made of tensors of ``shapes`` end to end) as the plan says."""
    if compression.kind == "topk":
        return TopK(world, compression.ratio, example)
    if compression.kind == "powersgd":
        return PowerSGD(world, compression.rank, example, shapes)
    codecs = {"bf16": Cast(torch.bfloat16), "fp16": Cast(torch.float16), "int8": Int8()}
    return Coded(world, codecs[compression.kind], example)
