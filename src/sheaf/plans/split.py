"""Which slice of a tensor each worker holds when a layer is split among workers, and what splitting it costs."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sheaf.plans.layout import apportion


@dataclass(frozen=True)
class Cut:
    """How one dimension is cut among workers: ``outer`` equal runs, in each of which worker *r* holds ``sizes[r]``.

    With outer=1 the workers hold contiguous slices, of any sizes. With outer=3 a dimension that holds queries, keys
    and values one after the other is cut in each of the three alike.

    >>> cut = Cut.even(30, 4)
    >>> cut, cut.length, cut.local_length(3), cut.ranges(1)
    (Cut(sizes=(8, 8, 7, 7), outer=1), 30, 7, ((8, 16),))
    >>> Cut.even(12, 2, outer=3, unit=2).ranges(0)
    ((0, 2), (4, 6), (8, 10))
    """

    sizes: tuple[int, ...]
    outer: int = 1

    @classmethod
    def even(cls, length: int, workers: int, *, outer: int = 1, unit: int = 1) -> "Cut":
        """As even as whole units allow; ``length`` must be a multiple of ``outer * unit``. Early workers have more."""
        units, rest = divmod(length, outer * unit)
        if rest:
            raise ValueError(f"{length} is no multiple of outer={outer} times unit={unit}")
        return cls(tuple(share * unit for share in apportion(units, [1] * workers)), outer)

    @property
    def length(self) -> int:
        """Of the whole dimension."""
        return self.outer * sum(self.sizes)

    @property
    def run(self) -> int:
        """Of one of the ``outer`` runs."""
        return sum(self.sizes)

    def offset(self, worker: int) -> int:
        """Where a worker's slice of a run begins."""
        return sum(self.sizes[:worker])

    def local_length(self, worker: int) -> int:
        """Of a worker's part of the dimension."""
        return self.outer * self.sizes[worker]

    def ranges(self, worker: int) -> tuple[tuple[int, int], ...]:
        """The (start, stop) that a worker holds, in order."""
        first = self.offset(worker)
        return tuple(
            (start * self.run + first, start * self.run + first + self.sizes[worker]) for start in range(self.outer)
        )


@dataclass(frozen=True)
class Slice:
    """A tensor of which each worker holds a slice along one dimension."""

    dim: int
    cut: Cut

    def local_shape(self, shape: Sequence[int], worker: int) -> tuple[int, ...]:
        """Of the worker's part of a tensor of that whole shape."""
        return (*shape[: self.dim], self.cut.local_length(worker), *shape[self.dim + 1 :])


@dataclass(frozen=True)
class Move:
    """One collective among the workers that split a layer, for one microbatch.

    ``operation`` is all_reduce, all_gather, reduce_scatter or all_to_all; ``size_bytes`` is that of the whole tensor,
    or of what one worker deals out to all; ``why`` says in a few words what needs it.
    """

    block: str
    operation: str
    size_bytes: int
    backward: bool
    why: str


def pattern(name: str) -> str:
    """A name with its numbers left open, so that the layers of a stack are alike.

    >>> pattern("h.11.attn.c_attn.weight")
    'h.*.attn.c_attn.weight'
    """
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)


def holders(names: Iterable[str]) -> tuple[str, ...]:
    """Globs of the modules that hold parameters, numbers left open.

    >>> holders(["blocks.1.experts.up", "blocks.1.experts.down", "blocks.3.experts.up"])
    ('blocks.*.experts',)
    """
    return tuple(dict.fromkeys(pattern(name).rpartition(".")[0] or name for name in names))


@dataclass(frozen=True)
class SplitFacts:
    """What splitting a model's layers among ``degree`` workers does, for microbatches of ``samples`` samples.

    ``slices`` maps parameters that are split to how; all others are whole on each worker. ``moves`` are the
    collectives of one microbatch in order. ``work`` maps a block to the share of its arithmetic that the busiest
    worker does (1 where all do all of it), ``activations`` to the share of what it keeps for backward. ``closed`` names
    modules that had to be kept whole, with the reason. ``partial`` are parameters that are whole on each worker, and
    used in split work, so that each finds a part of their gradients. ``dealt`` maps modules that one worker computes
    for all, experts in a list, to that worker.
    """

    degree: int
    samples: int
    slices: dict[str, Slice]
    moves: tuple[Move, ...] = ()
    closed: dict[str, str] = field(default_factory=dict[str, str])
    work: dict[str, float] = field(default_factory=dict[str, float])
    activations: dict[str, float] = field(default_factory=dict[str, float])
    partial: tuple[str, ...] = ()
    dealt: dict[str, int] = field(default_factory=dict[str, int])

    @cached_property
    def held(self) -> dict[Any, Any]:
        """By name a whole parameter, and as the worker that holds most has it, as far as somebody asked."""
        return {}

    @cached_property
    def done(self) -> dict[str, Any]:
        """By name a whole block, and as the worker that does most of it has it, as far as somebody asked."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """As values that JSON knows."""
        return {
            "degree": self.degree,
            "samples": self.samples,
            "slices": {name: [one.dim, list(one.cut.sizes), one.cut.outer] for name, one in self.slices.items()},
            "moves": [[move.block, move.operation, move.size_bytes, move.backward, move.why] for move in self.moves],
            "closed": self.closed,
            "work": self.work,
            "activations": self.activations,
            "partial": list(self.partial),
            "dealt": self.dealt,
        }

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> "SplitFacts":
        """What ``to_dict`` gave."""
        slices = {name: Slice(dim, Cut(tuple(sizes), outer)) for name, (dim, sizes, outer) in told["slices"].items()}
        return cls(
            degree=told["degree"],
            samples=told["samples"],
            slices=slices,
            moves=tuple(Move(*move) for move in told["moves"]),
            closed=told["closed"],
            work=told["work"],
            activations=told["activations"],
            partial=tuple(told["partial"]),
            dealt=dict(told.get("dealt", {})),
        )
