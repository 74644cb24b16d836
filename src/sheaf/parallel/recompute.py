"""Recomputation: a block keeps its input only, and runs forward again in backward.

Chen et al., 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv:1604.06174).
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sheaf.task import Streams


def recompute(blocks: Iterable[nn.Module], streams: Streams) -> None:
    """Make every block recompute itself in backward, drawing from its random streams what it drew at first."""
    for block in blocks:
        block.forward = _recomputing(block.forward, streams)


def _recomputing(forward: Callable[..., Any], streams: Streams) -> Callable[..., Any]:
    def recomputing(*positional: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*positional, **named)
        position = streams.position()
        return checkpoint(
            forward,
            *positional,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), streams.at(position)),
            **named,
        )

    return recomputing
