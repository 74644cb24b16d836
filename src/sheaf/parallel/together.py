"""Whether the microbatches of a round may go through a split part as one batch, and how they are put together.

One pass instead of one for each microbatch reads a slice's weights once, and makes one gradient of each. The answer is
the same, up to the order in which numbers are added, where each row of what the part returns depends on the same row of
what it is given: linear layers and functions of single elements, nothing that draws random numbers, mixes samples or
looks at the batch in another way. The loss is computed of each microbatch by itself, as it always is.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from sheaf.parallel.stand_ins import Original

_ROWS = (
    nn.Identity,
    nn.Linear,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.Hardtanh,
    nn.Hardswish,
)


class NotAlikeError(BaseException):
    """Microbatches put together would not give the shapes that they give one by one."""


def is_by_rows(original: Original) -> bool:
    """Whether each row of a block's output depends on the same row of its input alone, as far as its modules tell."""
    if getattr(original.forward, "__func__", None) is not type(original.block).forward:
        return False
    return all(
        (type(module) in (*_ROWS, nn.Sequential) or _is_still(module))
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        for module, own in original.held
    )


def _is_still(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd) and (module.p == 0 or not module.training)


def put_together(batches: Sequence[Any], rows: Sequence[int]) -> Any:
    """One batch of several, row after row; None where they hold anything but tensors with a row for each sample.

    >>> put_together([(torch.zeros(2, 3),), (torch.ones(1, 3),)], (2, 1))[0].shape
    torch.Size([3, 3])
    """
    flat = [tree_flatten(batch) for batch in batches]
    if any(spec != flat[0][1] for _, spec in flat):
        return None
    made: list[Tensor] = []
    for leaves in zip(*(leaves for leaves, _ in flat), strict=True):
        if not all(
            isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == count
            for leaf, count in zip(leaves, rows, strict=True)
        ):
            return None
        if len({(leaf.shape[1:], leaf.dtype, leaf.device) for leaf in leaves}) > 1:
            return None
        made.append(torch.cat(leaves))
    return tree_unflatten(made, flat[0][1])
