"""A plan becomes a step: called on every worker, with a process group or alone."""

import os
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sheaf.errors import PlanError
from sheaf.graph import cut, is_composite
from sheaf.parallel.exchange import Exchange
from sheaf.parallel.experts import ExpertsRunner, come_home, expert_facts, shared
from sheaf.parallel.gathered import Gathered
from sheaf.parallel.holding import AbstractHolding, Factor
from sheaf.parallel.ledger import Ledger
from sheaf.parallel.local import LocalSteps
from sheaf.parallel.parts import PartsPost, PartsRunner, segments, whole_outside
from sheaf.parallel.passing import Passing
from sheaf.parallel.pipeline import Pipeline
from sheaf.parallel.portion import Portion
from sheaf.parallel.post import Post
from sheaf.parallel.precision import LossScale
from sheaf.parallel.recompute import recompute
from sheaf.parallel.replicated import Replicated
from sheaf.parallel.runner import Expectation, Parts, WholeModel
from sheaf.parallel.server.assemble import refuse_served, serve
from sheaf.parallel.sharded import Sharded
from sheaf.parallel.shares import dealer
from sheaf.parallel.spread import Spread
from sheaf.parallel.stages import Stages, placed
from sheaf.parallel.stand_ins import StandIns, originals
from sheaf.parallel.statistics import BatchStatistics
from sheaf.parallel.step import Step
from sheaf.parallel.ties import Ties
from sheaf.parallel.together import is_by_rows
from sheaf.parallel.world import World
from sheaf.plans import Plan
from sheaf.plans.split import SplitFacts
from sheaf.plans.stages import default_microbatch
from sheaf.split.closing import close
from sheaf.split.lengthwise import Lengthwise
from sheaf.split.mode import Splitting
from sheaf.split.rehearsal import rehearse
from sheaf.split.sending import Sending
from sheaf.task import Blueprint, Streams, Task, keras
from sheaf.task.probe import elementwise


def build(task: Task, plan: Plan, *, device: torch.device | None = None) -> Step:
    """The step of a task under a plan, on this worker.

    Call it on every worker of an initialised default process group with as many ranks as the plan has workers, or
    alone for a plan of one worker. ``device`` is this worker's (default: the CPU, or this rank's accelerator).

    Raises PlanError with the reason why the plan cannot run here.
    """
    spread = Spread(plan, device or default_device())
    try:
        return _build(task, plan, spread)
    except BaseException:
        spread.close()
        raise


def _build(task: Task, plan: Plan, spread: Spread) -> Step:
    world = spread.world
    if plan.workers != world.workers:
        raise PlanError(
            f"the plan {plan} is for {plan.workers} workers and {world.workers} are here: "
            "start as many as it names, or plan for as many as there are"
        )
    blueprint = Blueprint(task)
    task = blueprint.task = with_microbatch(task, plan, blueprint.model)
    blocks = cut(blueprint.model)
    splits = split_facts(task, plan, world)
    found = segments(plan, blueprint, blocks) if plan.split_parts else None
    _refuse_slices(task, plan, blueprint, splits)
    _refuse_sparse(blueprint.model, plan)
    _refuse_scaled(task, plan)
    expectation, scale, exchange = Expectation(float(task.batch)), LossScale(task), Exchange(world)

    def factor() -> float:
        weight = exchange.told().weight
        return expectation.weight / (weight * scale.value) if weight else 0.0

    stages = placed(task, plan, blueprint, blocks, world) if plan.pp > 1 else None
    portion = _portion(blueprint, plan, spread, splits, stages)
    if plan.server:
        return serve(task, plan, spread, portion)
    untouched = originals(blocks, blueprint.dtype_of, blueprint.mode) if stages or found else {}
    if plan.meets_locally.every:
        holding = LocalSteps(portion, spread.replicas, factor, plan, exchange, expectation)
    else:
        apart = found.apart if found else tuple(splits.slices) if splits and plan.expert_parts else ()
        holding = _hold(portion, plan, spread.replicas, factor, blocks, apart, stages, spread.place.pp)
    splitting = _splitting(plan, holding.model, portion, spread, splits)
    sending = _sending(holding.model, portion, spread, splits, blocks)
    streams = Streams(holding.model, task.seed, world.device)
    if plan.recompute == "full":
        mode = sending or splitting
        around = nullcontext if mode is None else lambda: mode
        recompute([block for block in blocks.values() if is_composite(block)], streams, around)
    number = world.number("sheaf/builds") if plan.stolen else 0
    merged = world.workers > 1 or plan.recompute != "none"
    parts = Parts(
        task=task,
        spread=spread,
        holding=holding,
        dealer=dealer(plan, spread.place.dp, world.counter, f"sheaf/stolen/{number}"),
        exchange=exchange,
        expectation=expectation,
        scale=scale,
        streams=streams,
        statistics=BatchStatistics(holding.model, world, tells=spread.leads) if merged else None,
        splitting=splitting,
        sending=sending,
    )
    placing = stages or found
    ties = _ties(plan, splits, stages, spread, portion, holding)
    if placing is None:
        return Step(plan, portion, ExpertsRunner(parts) if sending is not None else WholeModel(parts), ties)
    post = PartsPost(world, found.split) if found else Post(spread.stages, plan.num_stages)
    homes = {
        id(parameter): (name, placing.homes[name])
        for name, parameter in holding.model.named_parameters()
        if name in placing.homes
    }
    count = len(found.split) if found else plan.num_stages
    stand_ins = StandIns(blueprint.mode, untouched)
    ledger = Ledger(homes, post, stand_ins, splitting)
    complete = stages.complete if stages else True
    passing = Passing(blocks, placing.blocks, count, ledger, stand_ins, complete=complete)
    if parts.statistics is not None:
        parts.statistics.follow(passing.runs)
    if found:
        assert isinstance(post, PartsPost)
        by_rows = [name for name, original in untouched.items() if is_by_rows(original)]
        return Step(plan, portion, PartsRunner(parts, plan, passing, post, found, by_rows))
    assert stages is not None
    return Step(plan, portion, Pipeline(parts, plan, passing, post), ties)


def refuse(task: Task, plan: Plan) -> SplitFacts | None:
    """Raise PlanError where ``build`` would on any worker, without workers; gives how layers are split, if they are.

    What depends on values that training computes shows only then.
    """
    blueprint, world = Blueprint(task), World.alone()
    task = blueprint.task = with_microbatch(task, plan, blueprint.model)
    blocks = cut(blueprint.model)
    _refuse_sparse(blueprint.model, plan)
    _refuse_scaled(task, plan)
    if plan.server:
        refuse_served(task, plan, blueprint)
    splits = split_facts(task, plan, world)
    _refuse_slices(task, plan, blueprint, splits)
    if plan.split_parts:
        segments(plan, blueprint, blocks)
    if plan.pp > 1:
        placed(task, plan, blueprint, blocks, world)
    return splits


def _portion(
    blueprint: Blueprint, plan: Plan, spread: Spread, splits: SplitFacts | None, stages: Stages | None
) -> Portion:
    slices = splits.slices if splits else None
    if stages is None:
        return Portion(blueprint, slices=slices, rank=spread.part)
    mine = range(spread.place.pp, plan.num_stages, plan.pp)
    return Portion(
        blueprint,
        slices=slices,
        rank=spread.place.tp,
        names=stages.held(mine),
        second=stages.second(mine, plan.pp),
    )


def split_facts(task: Task, plan: Plan, world: World) -> SplitFacts | None:
    """How the plan splits the task's layers, the same on every worker; None where it does not (collective)."""
    if plan.split_degree == 1:
        return None
    assert task.microbatch is not None
    samples = min(task.microbatch, task.num_samples)

    def found() -> dict[str, Any]:
        if plan.expert_parts:
            return expert_facts(task, plan, samples).to_dict()
        return rehearse(
            task,
            plan.split_degree,
            samples=samples,
            sequence=bool(plan.sequence),
            whole=whole_outside(plan) if plan.split_parts else lambda name: plan.part(name) == "whole",
        ).to_dict()

    return SplitFacts.from_dict(world.agreed(found))


def _splitting(
    plan: Plan, model: nn.Module, portion: Portion, spread: Spread, splits: SplitFacts | None
) -> Splitting | None:
    if plan.cp > 1 and spread.layers is not None:
        lengthwise = Lengthwise(spread.layers, model.parameters())
        lengthwise.lends = plan.recompute == "none"  # what runs again gathers again
        return lengthwise
    if splits is None or spread.layers is None:
        return None
    held = {
        id(parameter): (name, splits.slices[name])
        for name, parameter in portion.own(model).items()
        if name in splits.slices
    }
    names = _partial(plan, splits)
    partial = [parameter for name, parameter in portion.own(model).items() if name in names]
    mode = Splitting(spread.layers, held, sequence=bool(plan.sequence), partial=partial)
    close(model, splits.closed, mode)
    return mode


def _sending(
    model: nn.Module, portion: Portion, spread: Spread, splits: SplitFacts | None, blocks: dict[str, nn.Module]
) -> Sending | None:
    if splits is None or spread.experts is None:
        return None
    slices = splits.slices
    held = {id(value): (name, slices[name]) for name, value in portion.own(model).items() if name in slices}
    mode = Sending(spread.experts, held, shared(model, slices.__contains__))
    come_home(blocks.values(), mode)
    return mode


def _ties(
    plan: Plan,
    splits: SplitFacts | None,
    stages: Stages | None,
    spread: Spread,
    portion: Portion,
    holding: AbstractHolding,
) -> list[Ties]:
    """Whose gradients several workers find parts of: those that split layers, then the stages of a pipeline."""
    ties: list[Ties] = []
    partial = [name for name in _partial(plan, splits) if portion.holds(name)]
    if partial:
        ties.append(Ties(partial, spread.parted, portion, holding, gives=True))
    if stages and stages.tied:
        gives = spread.speaks(sliced=not spread.lengthwise)
        ties.append(Ties(stages.tied, spread.copies, portion, holding, gives=gives))
    return ties


def _partial(plan: Plan, splits: SplitFacts | None) -> tuple[str, ...]:
    """Whole parameters of which each worker that splits layers finds a part of the gradient."""
    return splits.partial if splits is not None and plan.tp > 1 else ()


def _refuse_slices(task: Task, plan: Plan, blueprint: Blueprint, splits: SplitFacts | None) -> None:
    """Raise PlanError where the plan steps slices of parameters, and the optimizer cannot."""
    shapes = [fake.shape for fake in blueprint.parameters.values()]
    sliced = splits is not None and bool(splits.slices)
    if not (plan.zero or sliced) or elementwise(task.optimizer, shapes):
        return
    key, what = ("zero", f"zero={plan.zero}") if plan.zero else ("tp", f"tp={plan.tp}")
    if plan.expert_parts:
        key, what = "ep", "ep"
    raise PlanError(
        f"{what} gives each worker slices of parameters, and this optimizer's update of a slice depends "
        f"on the rest of the parameter: use dp={plan.workers} without {key}, or an elementwise optimizer such as AdamW"
    )


def with_microbatch(task: Task, plan: Plan, model: nn.Module | None = None) -> Task:
    """The task with its microbatch decided: its own, the plan's, or an equal share of the batch.

    ``model`` is the task's, of any tensors, where it has been built before. Raises PlanError when task and plan give
    one and they differ, since the task's decides the answer; and when neither gives one though the model computes
    with the statistics of a microbatch or draws random numbers in each, since the answer would depend on the plan.
    """
    if task.microbatch is not None and plan.microbatch not in (None, task.microbatch):
        raise PlanError(
            f"the plan says microbatch={plan.microbatch} and the task microbatch={task.microbatch}: "
            "leave it out of one of them"
        )
    chosen = task.microbatch or plan.microbatch
    if chosen is None:
        name = _depends_on_microbatch(Blueprint(task).model if model is None else model)
        if name is not None:
            raise PlanError(
                f"neither the task nor the plan gives a microbatch, and {name} makes the answer depend on it: "
                f"give the task one, such as microbatch={max(1, task.batch // 4)}"
            )
        chosen = default_microbatch(plan, task.batch)
    if chosen > task.batch:
        raise PlanError(f"microbatch={chosen} is larger than batch={task.batch}: lower it or raise batch")
    return replace(task, microbatch=chosen)


def default_device() -> torch.device:
    """This worker's device: the current accelerator, or that of torchrun's local rank when none was set; else the CPU.

    The accelerator becomes the current one.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    index, local = torch.accelerator.current_device_index(), os.environ.get("LOCAL_RANK", "")
    if index == 0 and local.isdecimal() and dist.is_initialized() and int(local) < torch.accelerator.device_count():
        index = int(local)
        torch.accelerator.set_device_index(index)
    return torch.device(accelerator.type, index)


def _depends_on_microbatch(model: nn.Module) -> str | None:
    """The first of torch's own modules that draws, or mixes the samples of a microbatch, and what it is."""
    for name, module in model.named_modules():
        if module.training and (_mixes(module) or _draws(module)):
            return f"{name or 'the model'} ({type(module).__name__})"
    return None


def _mixes(module: nn.Module) -> bool:
    if keras.is_batch_norm(module):
        return True
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return module.track_running_stats
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _draws(module: nn.Module) -> bool:
    if keras.is_layer(module):
        return keras.may_draw(module)
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, nn.MultiheadAttention):
        return module.dropout > 0
    if isinstance(module, nn.RNNBase):
        return module.dropout > 0 and module.num_layers > 1
    if isinstance(module, nn.RReLU):
        return module.lower < module.upper
    return isinstance(module, nn.FractionalMaxPool2d | nn.FractionalMaxPool3d)


def _hold(
    portion: Portion,
    plan: Plan,
    replicas: World,
    factor: Factor,
    blocks: dict[str, nn.Module],
    apart: Collection[str],
    stages: Stages | None,
    first: int,
) -> AbstractHolding:
    if plan.zero == 0:
        return Replicated(portion, replicas, factor, plan.bucket_bytes, apart, plan.compression)
    if plan.zero == 3:
        calls, mine = (stages.blocks, range(first, plan.num_stages, plan.pp)) if stages else (None, (0,))
        return Gathered(portion, replicas, factor, blocks, plan, calls, mine)
    return Sharded(portion, replicas, factor, plan.bucket_bytes, shard_gradients=plan.zero == 2)


def _refuse_sparse(model: nn.Module, plan: Plan) -> None:
    sparse = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
    ]
    if sparse and not plan.serial:
        raise PlanError(f"{sparse[0]} makes sparse gradients, which {plan} cannot add up: build it with sparse=False")


def _refuse_scaled(task: Task, plan: Plan) -> None:
    if task.precision == "fp16" and not plan.exact:
        raise PlanError(
            f"{plan} does not go with precision='fp16', whose loss scale all workers must change together by gradients "
            "that met whole: use bf16 or fp32"
        )
