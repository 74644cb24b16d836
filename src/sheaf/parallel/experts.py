"""Replicas that send tokens to each other's experts go through a step round by round, one microbatch each in a round.

A replica without one goes along idle: it runs the forward of another microbatch, sends no tokens of it, computes what
its experts are sent, and takes part in backward for them alone.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sheaf.errors import PlanError
from sheaf.graph import is_composite
from sheaf.parallel.runner import WholeModel
from sheaf.parallel.shares import Dealt
from sheaf.plans import Plan
from sheaf.plans.split import SplitFacts, holders
from sheaf.split.experts import experts
from sheaf.split.sending import Sending
from sheaf.split.sent import Sent
from sheaf.task import Microbatch, Task

EXPERTS = "ep"


class ExpertsRunner(WholeModel):
    """Each replica one microbatch forward and backward, then the next; all of them together."""

    @property
    def leads(self) -> bool:
        """Whether what runs is this replica's own microbatch."""
        return not self._sending.is_idle

    @property
    def _sending(self) -> Sending:
        assert self.parts.sending is not None
        return self.parts.sending

    def run(self, step: int, microbatches: Sequence[Microbatch]) -> None:
        """All rounds of a step; losses are sent and gradients meet from the last one on."""
        parts = self.parts
        assert isinstance(parts.dealer, Dealt)
        mine = [microbatch for microbatch, _ in parts.dealer.deal(step, microbatches)]
        rounds = parts.dealer.rounds(microbatches)
        for number in range(rounds):
            idle = number >= len(mine)
            microbatch = microbatches[0] if idle else mine[number]
            batch = parts.fetched(step, microbatch)
            start, waited = time.perf_counter(), parts.spread.waited_seconds
            with parts.statistics_of_microbatch(), self._sending.microbatch(idle=idle):
                loss = self.forward(step, microbatch, batch, counts=not idle)
                if not idle:
                    self.collect(microbatch, loss)
                roots = self._sending.finish(loss.sum)
                if loss.sum.requires_grad and not idle:
                    roots.append((loss.sum, parts.seed(loss.sum)))
                last = number == rounds - 1
                if last:
                    parts.exchange.send()
                parts.holding.arm(last=last)
                if roots:
                    torch.autograd.backward([root for root, _ in roots], [gradient for _, gradient in roots])
                parts.holding.end_backward()
            self.timed(start, waited)


def come_home(blocks: Iterable[nn.Module], sending: Sending) -> None:
    """Let tokens come home before a block of several modules begins, and when it ends.

    A block of one module leaves them where they are, but shows the microbatch's own to those who look at its output.
    """

    def home(value: Any) -> Any:
        return tree_map(lambda leaf: sending.back(leaf) if isinstance(leaf, Sent) else leaf, value)

    def before(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        return home(args), home(kwargs)

    def after(module: nn.Module, _arguments: Any, output: Any) -> Any:
        if is_composite(module):
            return home(output)
        if sending.is_observed:
            with torch.no_grad():
                home(output)
        return output

    for block in blocks:
        if is_composite(block):
            block.register_forward_pre_hook(before, with_kwargs=True)
        block.register_forward_hook(after)


def expert_facts(task: Task, plan: Plan, samples: int) -> SplitFacts:
    """How the plan's parts are dealt out by expert.

    Raises PlanError naming a part that holds no stack of experts, and where the model has some.
    """
    found = experts(task, plan.dp, samples=samples, wanted=lambda name: plan.part(name) == EXPERTS)
    for glob, answer in plan.parts:
        alone = Plan(dp=plan.dp, parts=((glob, EXPERTS),))
        if answer == EXPERTS and not any(alone.part(name) for name in found.slices):
            raise PlanError(_nothing(task, plan, samples, f"{glob}={answer}", found))
    return found


def _nothing(task: Task, plan: Plan, samples: int, part: str, found: SplitFacts) -> str:
    anywhere = holders(experts(task, plan.dp, samples=samples).slices)
    why = next(iter(found.closed.values()), "")
    because = f" ({why})" if why and not anywhere else ""
    if anywhere:
        return f"{part} holds no experts to send tokens to; use {','.join(f'{name}={EXPERTS}' for name in anywhere)}"
    return (
        f"{part} holds no experts to send tokens to, and neither does the rest of the model{because}: experts are "
        "parameters stacked along their first dimension that bmm, matmul or einsum multiplies with one row of tokens "
        f"each; use dp={plan.dp} with zero=3, or tp={plan.dp}"
    )


def shared(model: nn.Module, sliced: Callable[[str], bool]) -> list[Tensor]:
    """Parameters and buffers of which every replica has the whole."""
    return [*(tensor for name, tensor in model.named_parameters() if not sliced(name)), *model.buffers()]
