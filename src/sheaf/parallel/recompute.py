"""Recomputation: a block keeps its input only, and runs forward again in backward.

Chen et al., 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv:1604.06174).
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch._C._autograd as autograd_internals
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from sheaf.errors import PlanError, nearest
from sheaf.graph.cut import cut, is_composite, opened
from sheaf.graph.facts import within
from sheaf.plans import Plan
from sheaf.plans.again import AGAIN, is_again, matches
from sheaf.task import Streams
from sheaf.task.streams import Position


class _Again(threading.local):
    running = False


_again = _Again()


def running_again() -> bool:
    """Whether a block of the plan is being recomputed now, on this thread."""
    return _again.running


def again(plan: Plan, blocks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The blocks that run forward again under a plan, by name: of those that it names, all that keep more than their
    input.
    """
    return {name: block for name, block in blocks.items() if is_again(plan, name) and is_composite(block)}


def refuse_again(plan: Plan, model: nn.Module) -> None:
    """Raise PlanError for a part of a plan that is to run again, and is no block of the model, or spares nothing."""
    blocks, gone = cut(model, plan.begins), opened(model, plan.begins)
    for glob in (glob for glob, answer in plan.parts if answer == AGAIN):
        named = [name for name in blocks if matches(glob, name)]
        if not named:
            around = next((name for name in blocks if name and matches(f"{name}.*", glob)), None)
            hint = f"is inside of {around}: use {around}={AGAIN}" if around else nearest(glob, blocks)
            raise PlanError(f"{glob}={AGAIN} names no block of the model, and blocks run again whole; {hint}")
        pieces = any(within(name, block) for name in named for block in gone)  # of one that a stage begins inside of
        if not pieces and not any(is_composite(blocks[name]) for name in named):
            most = next((name for name, block in blocks.items() if is_composite(block)), "")
            hint = f", or {most}={AGAIN}" if most else ""
            raise PlanError(
                f"{glob}={AGAIN}: {named[0]} is one module, which keeps no more than its input and what it computes, "
                f"so nothing is spared by running it again: drop it{hint}"
            )


def recompute(
    blocks: Iterable[nn.Module],
    streams: Streams,
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Make every block recompute itself in backward, drawing from its random streams what it drew at first.

    It runs again inside ``around()``.

    Backward raises PlanError where a block does not compute again what it computed at first.
    """
    for block in blocks:
        block.forward = _recomputing(streams.name_of(block), block.forward, streams, around)


def _recomputing(
    name: str, forward: Callable[..., Any], streams: Streams, around: Callable[[], AbstractContextManager[object]]
) -> Callable[..., Any]:
    def explained(*positional: Any, **named: Any) -> Any:
        with nullcontext() if running_again() else _explaining(name):
            return forward(*positional, **named)

    def recomputing(*positional: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*positional, **named)
        position = streams.position()
        return checkpoint(
            explained,
            *positional,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), _at_first(streams, position, around)),
            **named,
        )

    return recomputing


@contextmanager
def _at_first(
    streams: Streams, position: Position, around: Callable[[], AbstractContextManager[object]]
) -> Iterator[None]:
    """Run a block again as at first."""
    before, _again.running = _again.running, True
    try:
        with streams.at(position), around():
            yield
    finally:
        _again.running = before


def _explaining(name: str) -> AbstractContextManager[object]:
    """Inside a checkpoint's forward: say in the plan's words what goes wrong when backward asks for a saved tensor."""
    pack, unpack = autograd_internals._top_saved_tensors_default_hooks(True)

    def explained(packed: Any) -> Any:
        try:
            return unpack(packed)
        except CheckpointError as error:
            raise PlanError(
                f"{name} did not compute again in backward what it computed in forward, so it keeps state outside "
                "itself, such as a cache: switch that off (config.use_cache=False for a model of transformers), or use "
                f"recompute=none. PyTorch says: {str(error).strip().splitlines()[0]}"
            ) from error

    return torch.autograd.graph.saved_tensors_hooks(pack, explained)
