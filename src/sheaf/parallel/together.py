"""Whether the microbatches of a round may go through a split part as one batch, and how they are put together.

One pass instead of one for each microbatch reads a slice's weights once, and makes one gradient of each. The answer is
the same, up to the order in which numbers are added, where each row of what the part returns depends on the same row of
what it is given: linear layers and functions of single elements, nothing that mixes samples or looks at the batch in
another way. Dropout draws for each microbatch what it would draw alone. The loss is computed of each microbatch by
itself, as it always is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from sheaf.parallel.stand_ins import Original
from sheaf.task import Streams

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


class Together:
    """``members`` are the microbatches that run at once, as (step, index, samples); none: one runs, as usual. ``rows``
    names the blocks of a model, ``untouched`` as they were built, that compute row by row; made before anything else
    takes their forward. ``draws`` as for ``is_by_rows``.
    """

    def __init__(
        self, streams: Streams, model: nn.Module, untouched: Mapping[str, Original], *, draws: bool = False
    ) -> None:
        self._streams = streams
        self.rows = frozenset(name for name, original in untouched.items() if is_by_rows(original, draws=draws))
        self.members: tuple[tuple[int, int, int], ...] = ()
        for name in self.rows:
            for module in model.get_submodule(name).modules():
                if type(module) is nn.Dropout:
                    self._follow(module)

    def _follow(self, module: nn.Dropout) -> None:
        """Let a dropout draw for each microbatch by itself."""
        own = module.forward

        def forward(input: Tensor) -> Tensor:  # noqa: A002 - as torch names it
            given = input
            if not self.members or not module.training or not module.p:
                return own(given)
            samples = sum(count for _, _, count in self.members)
            each, rest = divmod(given.shape[0] if given.ndim else 0, samples)
            if rest or not given.is_contiguous():  # a mask is drawn in the order in which a tensor lies in memory
                raise NotAlikeError
            made: list[Tensor] = []
            start = 0
            for step, index, count in self.members:
                self._streams.draw_as(step, index)
                made.append(F.dropout(given.narrow(0, start, each * count), module.p))
                start += each * count
            return torch.cat(made)

        module.forward = forward


def is_by_rows(original: Original, *, draws: bool = False) -> bool:
    """Whether each row of a block's output depends on the same row of its input alone, as far as its modules tell.

    ``draws``: dropouts may draw, as ``Together`` lets them; not where blocks run again in backward.
    """
    if getattr(original.forward, "__func__", None) is not type(original.block).forward:
        return False
    return all(
        (type(module) in (*_ROWS, nn.Sequential) or _is_still(module) or (draws and _drops(module)))
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        for module, own in original.held
    )


def _drops(module: nn.Module) -> bool:
    return type(module) is nn.Dropout and not module.inplace


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
