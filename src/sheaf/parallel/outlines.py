"""What a stage tells the others of an output that they cannot foresee: its structure, shapes and types, as JSON."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from sheaf.errors import PlanError
from sheaf.parallel.stand_ins import Outline, StandIns


def described(
    output: Any, changed: Sequence[tuple[int, bool]], name: str, given: Sequence[Tensor] = ()
) -> dict[str, Any]:
    """An output, what of ``given`` was changed in place, and what of it is returned.

    Raises PlanError for what JSON cannot say.
    """
    leaves, spec = tree_flatten(output)
    places = {id(tensor): place for place, tensor in enumerate(given)}
    told: list[list[Any]] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            kind = str(leaf.dtype).removeprefix("torch.")
            told.append([list(leaf.shape), kind, leaf.requires_grad, places.get(id(leaf), -1)])
        elif isinstance(leaf, int | float | str | bool | None):
            told.append([leaf])
        else:
            raise PlanError(
                f"{name} returns a {type(leaf).__qualname__}, and what it computes depends on values, so other "
                "pipeline stages cannot know what is in it: return tensors in tuples, lists and dicts"
            )
    return {"spec": treespec_dumps(spec), "leaves": told, "changed": [list(pair) for pair in changed]}


def pictured(told: dict[str, Any], stand_ins: StandIns, device: torch.device) -> Outline:
    """What was described, as fakes."""
    leaves: list[Any] = []
    passed: list[int] = []
    for one in told["leaves"]:
        if len(one) == 1:
            leaves.append(one[0])
            continue
        shape, kind, grad, place = one
        leaves.append(stand_ins.of(shape, kind, requires_grad=grad, device=device))
        passed.append(place)
    output = tree_unflatten(leaves, treespec_loads(told["spec"]))
    return Outline(output, tuple((place, grad) for place, grad in told["changed"]), tuple(passed))
