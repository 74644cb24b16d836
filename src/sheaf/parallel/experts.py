"""Replicas that send tokens to each other's experts go through a step round by round, one microbatch each in a round.

A replica without one goes along idle: it computes what its experts are sent, and takes part in backward for them
alone. Where experts lie in a stack it runs the forward of another microbatch for that, and sends no tokens of it.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sheaf.errors import PlanError
from sheaf.graph import is_composite
from sheaf.parallel.calls import Calling
from sheaf.parallel.portion import Portion
from sheaf.parallel.runner import WholeModel
from sheaf.parallel.shares import Dealt
from sheaf.parallel.stand_ins import Original, StandIns
from sheaf.plans import Plan
from sheaf.plans.split import SplitFacts, holders
from sheaf.split.experts import experts
from sheaf.split.listed import listed
from sheaf.split.sending import Sending
from sheaf.split.sent import Sent
from sheaf.split.team import GroupTeam
from sheaf.task import Loss, Microbatch, Streams, Task

EXPERTS = "ep"


class ExpertsRunner(WholeModel):
    """Each replica one microbatch forward and backward, then the next; all of them together."""

    @property
    def leads(self) -> bool:
        """Whether what runs is this replica's own microbatch."""
        return not self._sending.is_idle

    @property
    def _sending(self) -> Sending | Calling:
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
            serves = idle and isinstance(self._sending, Calling)
            batch = None if serves else parts.fetched(step, microbatch)
            start, waited = time.perf_counter(), parts.spread.waited_seconds
            with parts.statistics_of_microbatch(), self._sending.microbatch(idle=idle):
                loss = None if serves else self.forward(step, microbatch, batch, counts=not idle)
                if loss is not None and not idle:
                    self.collect(microbatch, loss)
                roots = self._finished(loss)
                if loss is not None and loss.sum.requires_grad and not idle:
                    roots.append((loss.sum, parts.seed(loss.sum)))
                last = number == rounds - 1
                if last:
                    parts.exchange.send()
                parts.holding.arm(last=last)
                if roots:
                    torch.autograd.backward([root for root, _ in roots], [gradient for _, gradient in roots])
                parts.holding.end_backward()
            self.timed(start, waited)

    def _finished(self, loss: Loss | None) -> list[tuple[Tensor, Tensor]]:
        with self.parts.holding.forward_context():
            if isinstance(self._sending, Calling):
                return self._sending.finish(None if loss is None else loss.sum)
            assert loss is not None
            return self._sending.finish(loss.sum)

    def close(self) -> None:
        """Give experts in lists their own forward back."""
        if isinstance(self._sending, Calling):
            self._sending.close()


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

    Raises PlanError naming a part that holds no experts, and where the model has some.
    """

    def is_wanted(name: str) -> bool:
        return plan.part(name) == EXPERTS

    stacks = experts(task, plan.dp, samples=samples, wanted=is_wanted)
    unmet = _unmet(plan, stacks)
    if not unmet:
        return stacks
    lists = listed(task, plan.dp, samples=samples, wanted=is_wanted)
    if stacks.slices and lists.slices:
        raise PlanError(
            f"{plan} names experts that lie in stacks ({', '.join(holders(stacks.slices))}) and experts that lie in "
            f"lists ({', '.join(holders(lists.dealt))}), which travel in different ways: name the ones or the others"
        )
    unmet = _unmet(plan, lists) if lists.slices else unmet
    if unmet:
        raise PlanError(_nothing(task, plan, samples, unmet, stacks.closed | lists.closed))
    if plan.again:
        raise PlanError(
            f"{holders(lists.dealt)[0]} lies in a list of modules, whose rows would travel again in backward: use "
            "recompute=none, and no part that runs again"
        )
    return lists


def _unmet(plan: Plan, found: SplitFacts) -> str:
    """The first of the plan's parts in which nothing was found."""
    for glob, answer in plan.parts:
        alone = Plan(dp=plan.dp, parts=((glob, EXPERTS),))
        if answer == EXPERTS and not any(alone.part(name) for name in found.slices):
            return f"{glob}={answer}"
    return ""


def _nothing(task: Task, plan: Plan, samples: int, part: str, closed: Mapping[str, str]) -> str:
    anywhere = holders(experts(task, plan.dp, samples=samples).slices)
    anywhere = anywhere or holders(listed(task, plan.dp, samples=samples).dealt)
    why = next(iter(closed.values()), "")
    because = f" ({why})" if why and not anywhere else ""
    if anywhere:
        return f"{part} holds no experts to send tokens to; use {','.join(f'{name}={EXPERTS}' for name in anywhere)}"
    return (
        f"{part} holds no experts to send tokens to, and neither does the rest of the model{because}: experts are "
        "parameters stacked along their first dimension that bmm, matmul or einsum multiplies with one row of tokens "
        "each, or grouped_mm with tokens sorted by expert (of transformers' ways the default, "
        "experts_implementation='grouped_mm'), or modules in a list, each called with rows that no other of them "
        "computed; "
        f"use dp={plan.dp} with zero=3, or tp={plan.dp}"
    )


def lists(model: nn.Module, splits: SplitFacts | None) -> dict[str, nn.Module]:
    """The modules in lists that replicas deal out."""
    return {name: model.get_submodule(name) for name in (splits.dealt if splits is not None else ())}


def calling(
    model: nn.Module,
    portion: Portion,
    team: GroupTeam | None,
    splits: SplitFacts | None,
    streams: Streams,
    untouched: Mapping[str, Original],
) -> Calling | None:
    """The mode in which replicas compute these for each other; None where there are none."""
    if splits is None or team is None or not splits.dealt:
        return None
    return Calling(team, model, splits.dealt, streams, StandIns(portion.mode, untouched))


def shared(model: nn.Module, sliced: Callable[[str], bool]) -> list[Tensor]:
    """Parameters and buffers of which every replica has the whole."""
    return [*(tensor for name, tensor in model.named_parameters() if not sliced(name)), *model.buffers()]
