"""How far two observations of one step are apart, as plain numbers; nothing is judged here."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sheaf.parity.observation import Observation

OUTPUT, LOSS, GRADIENT, BUFFER, WEIGHT = "output", "loss", "gradient", "buffer", "weight"
JUDGED = (LOSS, GRADIENT, BUFFER, WEIGHT)  # outputs tell where, not whether
_PIECE = 2**22  # elements that are looked at in float64 at once
MISSING = math.inf  # the departure of what one side has and the other lacks, or that is not a number


class Key(NamedTuple):
    """What is compared: a kind, the name of a tensor or block, and the microbatch where there is one."""

    kind: str
    name: str
    microbatch: int | None = None


def departures(found: Observation, wanted: Observation) -> dict[Key, float]:
    """The L2 norm of the difference for each tensor, the absolute difference for each number.

    Names are those of ``wanted``, in its order; a gradient that only ``found`` has counts as MISSING too.
    """
    apart: dict[Key, float] = {Key(LOSS, ""): _apart(found.loss, wanted.loss)}
    if found.skipped != wanted.skipped:
        apart[Key(LOSS, "skipped")] = MISSING
    for index, (total, weight) in wanted.losses.items():
        other = found.losses.get(index, (math.nan, math.nan))
        apart[Key(LOSS, "sum", index)] = _apart(other[0], total)
        apart[Key(LOSS, "weight", index)] = _apart(other[1], weight)
    for index in found.losses.keys() - wanted.losses.keys():
        apart[Key(LOSS, "sum", index)] = MISSING
    for (index, block, call), print_ in wanted.prints.items():
        other_print = found.prints.get((index, block, call))
        if other_print is not None:
            key = Key(OUTPUT, block, index)
            apart[key] = max(apart.get(key, 0.0), *(_apart(a, b) for a, b in zip(other_print, print_, strict=True)))
    for kind, tensors, others in (
        (GRADIENT, wanted.gradients, found.gradients),
        (BUFFER, wanted.buffers, found.buffers),
        (WEIGHT, wanted.weights, found.weights),
    ):
        for name, tensor in tensors.items():
            apart[Key(kind, name)] = difference(others.get(name), tensor)
    for name in found.gradients.keys() & wanted.weights.keys() - wanted.gradients.keys():
        apart[Key(GRADIENT, name)] = MISSING
    return apart


def sizes(observation: Observation) -> dict[Key, float]:
    """What the departures from this observation are relative to: L2 norms and absolute values."""
    size: dict[Key, float] = {Key(LOSS, ""): abs(observation.loss)}
    for index, (total, weight) in observation.losses.items():
        size[Key(LOSS, "sum", index)], size[Key(LOSS, "weight", index)] = abs(total), abs(weight)
    for (index, block, _), (_, length, _) in observation.prints.items():
        key = Key(OUTPUT, block, index)
        size[key] = max(size.get(key, 0.0), length)
    for kind, tensors in (
        (GRADIENT, observation.gradients),
        (BUFFER, observation.buffers),
        (WEIGHT, observation.weights),
    ):
        size |= {Key(kind, name): norm(tensor) for name, tensor in tensors.items()}
    return size


def backgrounds(observation: Observation) -> dict[Key, float]:
    """For each gradient, weight and buffer, the L2 norm it would have, were its elements as large as all on average.

    The yardstick for tensors that are zero but for rounding, such as the gradient of an attention's key bias.
    """
    result: dict[Key, float] = {}
    for kind, tensors in (
        (GRADIENT, observation.gradients),
        (BUFFER, observation.buffers),
        (WEIGHT, observation.weights),
    ):
        floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        elements = sum(tensor.numel() for tensor in floating.values())
        overall = math.hypot(*(norm(tensor) for tensor in floating.values()))
        for name, tensor in floating.items():
            result[Key(kind, name)] = overall * math.sqrt(tensor.numel() / max(1, elements))
    return result


def largest(several: Iterable[Mapping[Key, float]]) -> dict[Key, float]:
    """Key by key, the largest of several runs' departures."""
    result: dict[Key, float] = {}
    for apart in several:
        for key, value in apart.items():
            result[key] = max(value, result.get(key, 0.0))
    return result


def difference(found: Tensor | None, wanted: Tensor) -> float:
    """The L2 norm of the difference in float64; exactly 0.0 for equal tensors, infinite where they cannot be compared.

    >>> difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])), difference(None, torch.ones(1))
    (0.5, inf)
    """
    if found is None or found.shape != wanted.shape:
        return MISSING
    if torch.equal(found, wanted):
        return 0.0
    pieces = zip(found.flatten().split(_PIECE), wanted.flatten().split(_PIECE), strict=True)
    apart = math.hypot(*(torch.linalg.vector_norm(a.double() - b.double()).item() for a, b in pieces))
    return apart if math.isfinite(apart) else MISSING


def norm(tensor: Tensor) -> float:
    """The L2 norm in float64."""
    return math.hypot(*(torch.linalg.vector_norm(a.double()).item() for a in tensor.flatten().split(_PIECE)))


def _apart(found: float, wanted: float) -> float:
    apart = 0.0 if found == wanted else abs(found - wanted)
    return apart if math.isfinite(apart) else MISSING
