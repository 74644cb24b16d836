"""How flat tensors of several workers become one otherwise than as a sum: AdaSum, and means with neighbours."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sheaf.parallel.world import World


def adasum(
    world: World, flat: Tensor, sizes: Sequence[int], whole: Callable[[Tensor], Tensor] = lambda dots: dots
) -> None:
    """Every worker's ``flat`` becomes the AdaSum of all of them, layer by layer of ``sizes`` (collective).

    Of two, it is (1 - a.b / 2|a|^2) a + (1 - a.b / 2|b|^2) b: their sum where they are orthogonal, their mean where
    they are the same. Of more, pairs are put together, then pairs of those: workers 0 and 1, 2 and 3, then both; those
    beyond the largest power of two begin as the partners of the first ones. Each halves what it holds with its partner
    at each level, so that about as much travels as in an all-reduce (Maleki et al., "Scaling Distributed Training with
    Adaptive Summation", 2020, algorithm 1). ``whole`` makes sums of squares and products (layers, 3), found on slices
    of layers, those of whole layers.
    """
    levels = world.workers.bit_length() - 1
    power, rank = 2**levels, world.rank
    beyond = world.workers - power
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    if beyond:
        world.barrier()  # some backends want all ranks in a group's first messages
    if rank >= power:
        world.trade([(flat, rank - power)], [], "what AdaSum adds")
    elif rank < beyond:
        other = torch.empty_like(flat)
        world.trade([], [(other, rank + power)], "what AdaSum adds")
        dots = whole(_dots(flat, other, ends, 0))
        _put_together(flat, flat.clone(), other, ends, 0, dots)
    low, high = 0, flat.numel()
    parted: list[tuple[int, tuple[int, int], tuple[int, int]]] = []
    for level in range(levels):
        table = torch.zeros(power >> level + 1, len(sizes), 3, dtype=torch.float64)
        if rank < power:
            partner, middle = rank ^ (1 << level), (low + high) // 2
            first = partner > rank
            kept, given = ((low, middle), (middle, high)) if first else ((middle, high), (low, middle))
            theirs = flat.new_empty(kept[1] - kept[0])
            world.trade([(flat[slice(*given)], partner)], [(theirs, partner)], "halves of what AdaSum adds")
            mine = flat[slice(*kept)].clone()
            one, other = (mine, theirs) if first else (theirs, mine)
            table[rank >> level + 1] = _dots(one, other, ends, kept[0])
            dots = whole(world.summed(table, "products of AdaSum")[rank >> level + 1])
            _put_together(flat, one, other, ends, kept[0], dots)
            parted.append((partner, kept, given))
            low, high = kept
        else:
            world.summed(table, "products of AdaSum")
    for partner, kept, given in reversed(parted):
        received = flat.new_empty(given[1] - given[0])
        world.trade([(flat[slice(*kept)], partner)], [(received, partner)], "what AdaSum has added")
        flat[slice(*given)] = received
    if rank < beyond:
        world.trade([(flat, rank + power)], [], "what AdaSum has added")
    elif rank >= power:
        world.trade([], [(flat, rank - power)], "what AdaSum has added")


def summed_among(world: World, present: Sequence[int], flat: Tensor) -> Tensor:
    """The sum of ``flat`` over those who are ``present``, all of whom call this and nobody else; in their order.

    Each adds up a part, and sends it to the others, so that as much travels as in an all-reduce.
    """
    mine, count = list(present).index(world.rank), len(present)
    if count == 1:
        return flat
    given = torch.nn.functional.pad(flat, (0, -flat.numel() % count)).view(count, -1)
    received = torch.empty_like(given)
    received[mine] = given[mine]
    others = [place for place in range(count) if place != mine]
    world.trade(
        [(given[place], present[place]) for place in others],
        [(received[place], present[place]) for place in others],
        "parts of what meets",
    )
    whole = torch.empty_like(given)
    whole[mine] = received.sum(0)
    world.trade(
        [(whole[mine], present[place]) for place in others],
        [(whole[place], present[place]) for place in others],
        "what has met",
    )
    return whole.view(-1)[: flat.numel()]


def neighbours(kind: str, workers: int, meeting: int) -> tuple[int, ...]:
    """From how far before a worker on the circle come the weights that it takes the mean of with its own.

    ``ring``: from both sides (Lian et al., "Can Decentralized Algorithms Outperform Centralized Algorithms?", 2017).
    ``exponential``: from one worker, at 1, 2, 4, ... in turn (Assran et al., "Stochastic Gradient Push", 2019); as each
    also sends to one, the weights of push-sum stay one.

    >>> neighbours("ring", 5, 0), neighbours("ring", 2, 0), [neighbours("exponential", 6, turn) for turn in range(4)]
    ((1, -1), (1,), [(1,), (2,), (4,), (1,)])
    """
    if kind == "ring":
        return (1, -1) if workers > 2 else (1,)
    return (1 << meeting % (workers - 1).bit_length(),)


def mixed(world: World, flat: Tensor, distances: Sequence[int]) -> Tensor:
    """The mean of this worker's ``flat`` and of those of the workers at these ``distances`` before it (collective)."""
    received = [torch.empty_like(flat) for _ in distances]
    sent = [(flat, (world.rank + distance) % world.workers) for distance in distances]
    come = [(one, (world.rank - distance) % world.workers) for one, distance in zip(received, distances, strict=True)]
    world.trade(sent, come, "weights of neighbours")
    # in the order of ranks, so that workers with the same neighbours find the same bits
    known = {world.rank: flat, **{origin: one for one, origin in come}}
    return torch.stack([known[rank] for rank in sorted(known)]).mean(0)


def _overlaps(ends: Sequence[int], start: int, count: int) -> list[tuple[int, slice]]:
    """Which layers, that end at ``ends[1:]``, lie in ``count`` numbers from ``start`` on, and where therein."""
    return [
        (layer, slice(max(low, start) - start, min(high, start + count) - start))
        for layer, (low, high) in enumerate(pairwise(ends))
        if max(low, start) < min(high, start + count)
    ]


def _dots(one: Tensor, other: Tensor, ends: Sequence[int], start: int) -> Tensor:
    """By layer, one.other, |one|^2 and |other|^2 of what lies from ``start`` on, in float64: (layers, 3)."""
    found = torch.zeros(len(ends) - 1, 3, dtype=torch.float64)
    for layer, place in _overlaps(ends, start, one.numel()):
        a, b = one[place].double(), other[place].double()
        found[layer] = torch.stack([a @ b, a @ a, b @ b]).cpu()
    return found


def _put_together(flat: Tensor, one: Tensor, other: Tensor, ends: Sequence[int], start: int, dots: Tensor) -> None:
    for layer, place in _overlaps(ends, start, one.numel()):
        product, square, other_square = dots[layer].tolist()
        factors = [1 - product / (2 * size) if size else 1.0 for size in (square, other_square)]
        there = slice(start + place.start, start + place.stop)
        torch.add(one[place] * factors[0], other[place], alpha=factors[1], out=flat[there])
