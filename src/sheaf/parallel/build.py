"""A plan becomes a step: called on every worker, with a process group or alone."""

from dataclasses import replace

import torch
from torch import nn

from sheaf.errors import PlanError
from sheaf.graph import cut, is_composite
from sheaf.parallel.exchange import Exchange
from sheaf.parallel.gathered import Gathered
from sheaf.parallel.holding import AbstractHolding, Factor
from sheaf.parallel.precision import LossScale
from sheaf.parallel.recompute import recompute
from sheaf.parallel.replicated import Replicated
from sheaf.parallel.sharded import Sharded
from sheaf.parallel.shares import dealer
from sheaf.parallel.step import Expectation, Step
from sheaf.parallel.world import World
from sheaf.plans import Plan
from sheaf.task import Blueprint, Streams, Task
from sheaf.task.probe import elementwise


def build(task: Task, plan: Plan, *, device: torch.device | None = None) -> Step:
    """The step of a task under a plan, on this worker.

    Call it on every worker of an initialised default process group with as many ranks as the plan has workers, or
    alone for a plan of one worker. ``device`` is this worker's (default: the CPU, or this rank's accelerator).

    Raises PlanError listing every reason why the plan cannot run here.
    """
    world = World(device or default_device())
    task = with_microbatch(task, plan)
    broken = _broken(task, plan, world)
    if broken:
        raise PlanError(broken)
    blueprint = Blueprint(task)
    blocks = cut(blueprint.model)
    _refuse_sparse(blueprint.model, plan)
    expectation, scale, exchange = Expectation(float(task.batch)), LossScale(task), Exchange(world)

    def factor() -> float:
        weight = exchange.told().weight
        return expectation.weight / (weight * scale.value) if weight else 0.0

    holding = _hold(blueprint, plan, world, factor, blocks)
    streams = Streams(holding.model, task.seed, world.device)
    if plan.recompute == "full":
        recompute([block for block in blocks.values() if is_composite(block)], streams)
    deal = dealer(plan, world.rank, world.counter, f"sheaf/stolen/{_next_build()}")
    return Step(task, plan, world, holding, deal, exchange, expectation, scale, streams)


def with_microbatch(task: Task, plan: Plan) -> Task:
    """The task with its microbatch decided: its own, the plan's, or an equal share of the batch.

    Raises PlanError when both give one and they differ, since the task's decides the answer.
    """
    if task.microbatch is not None and plan.microbatch not in (None, task.microbatch):
        raise PlanError(
            f"the plan says microbatch={plan.microbatch} and the task microbatch={task.microbatch}: "
            "leave it out of one of them"
        )
    chosen = task.microbatch or plan.microbatch or -(-task.batch // plan.dp)
    if chosen > task.batch:
        raise PlanError(f"microbatch={chosen} is larger than batch={task.batch}: lower it or raise batch")
    return replace(task, microbatch=chosen)


def default_device() -> torch.device:
    """This worker's device: the accelerator of its local rank, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


_builds = 0


def _next_build() -> int:
    """How many steps were built in this process before; the same on every worker, as building is collective."""
    global _builds  # noqa: PLW0603 - a name for the shared counter that no earlier step of this group used
    _builds += 1
    return _builds


def _hold(
    blueprint: Blueprint, plan: Plan, world: World, factor: Factor, blocks: dict[str, nn.Module]
) -> AbstractHolding:
    if plan.zero == 0:
        return Replicated(blueprint, world, factor, plan.bucket_bytes)
    if plan.zero == 3:
        return Gathered(blueprint, world, factor, blocks, plan)
    return Sharded(blueprint, world, factor, plan.bucket_bytes, shard_gradients=plan.zero == 2)


def _broken(task: Task, plan: Plan, world: World) -> list[str]:
    broken: list[str] = []
    if plan.workers != world.workers:
        broken.append(
            f"the plan {plan} is for {plan.workers} workers and {world.workers} are here: "
            "start as many as it names, or plan for as many as there are"
        )
    if plan.zero and not elementwise(task.optimizer):
        broken.append(
            f"zero={plan.zero} gives each worker slices of parameters, and this optimizer's update of a slice depends "
            f"on the rest of the parameter: use dp={plan.dp} without zero, or an elementwise optimizer such as AdamW"
        )
    return broken


def _refuse_sparse(model: nn.Module, plan: Plan) -> None:
    sparse = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
    ]
    if sparse and not plan.serial:
        raise PlanError(f"{sparse[0]} makes sparse gradients, which {plan} cannot add up: build it with sparse=False")
