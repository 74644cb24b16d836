"""A plan becomes a step: called on every worker, with a process group or alone."""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from sheaf.errors import PlanError
from sheaf.graph import cut
from sheaf.parallel.devices import default_device, refuse_uncarried
from sheaf.parallel.exchange import Exchange
from sheaf.parallel.experts import ExpertsRunner, calling, come_home, expert_facts, lists, shared
from sheaf.parallel.gathered import Gathered
from sheaf.parallel.holding import AbstractHolding, Factor
from sheaf.parallel.ledger import Ledger
from sheaf.parallel.local import LocalSteps
from sheaf.parallel.microbatch import with_microbatch
from sheaf.parallel.paced import pace
from sheaf.parallel.parts import PartsPost, PartsRunner, Segments, segments, whole_outside
from sheaf.parallel.passing import Passing
from sheaf.parallel.pipeline import Pipeline
from sheaf.parallel.portion import Portion
from sheaf.parallel.post import Post
from sheaf.parallel.precision import LossScale
from sheaf.parallel.recompute import again, recompute, refuse_again
from sheaf.parallel.replicated import Replicated
from sheaf.parallel.rows import Tables, tables
from sheaf.parallel.rows.pulling import Pulling, pulling
from sheaf.parallel.runner import AbstractRunner, Expectation, Parts, WholeModel
from sheaf.parallel.server.assemble import refuse_served, serve
from sheaf.parallel.server.beside import Losses
from sheaf.parallel.server.replica import held_in_part, serve_replicas
from sheaf.parallel.sharded import Sharded
from sheaf.parallel.shares import AbstractDealer, Dealt, dealer
from sheaf.parallel.spread import Spread
from sheaf.parallel.stages import Stages, placed
from sheaf.parallel.stand_ins import StandIns, originals
from sheaf.parallel.statistics import BatchStatistics
from sheaf.parallel.step import Step
from sheaf.parallel.ties import Ties
from sheaf.parallel.together import Together
from sheaf.parallel.wants import looks, refuse_closure, refuse_looking, refuse_offloaded, refuse_scaled
from sheaf.parallel.world import World
from sheaf.plans import Plan
from sheaf.plans.offload import OPTIMIZER
from sheaf.plans.server import counted
from sheaf.plans.split import SplitFacts
from sheaf.split.closing import close
from sheaf.split.lengthwise import Lengthwise
from sheaf.split.mode import Splitting
from sheaf.split.rehearsal import rehearse
from sheaf.split.sending import Sending
from sheaf.split.sequences import sequences
from sheaf.task import Blueprint, Streams, Task
from sheaf.task.probe import elementwise


def build(task: Task, plan: Plan, *, device: torch.device | None = None) -> Step:
    """The step of a task under a plan, on this worker.

    Call it on every worker of an initialised default process group with as many ranks as the plan has workers, or
    alone for a plan of one worker. ``device`` is this worker's (default: the CPU, or this rank's accelerator).

    Raises PlanError with the reason why the plan cannot run here.
    """
    device = device or default_device()
    refuse_uncarried(device)
    spread = Spread(plan, device)
    try:
        return _build(task, plan, spread)
    except BaseException:
        spread.close()
        raise


def _build(task: Task, plan: Plan, spread: Spread) -> Step:
    world = spread.world
    if plan.workers != world.workers:
        raise PlanError(
            f"the plan {plan} is for {counted(plan.computing, plan.serves.serving)} and {world.workers} are here: "
            "start as many as it names, or plan for as many as there are"
        )
    blueprint = Blueprint(task)
    task = blueprint.task = with_microbatch(task, plan, blueprint.model)
    refuse_again(plan, blueprint.model)
    blocks = cut(blueprint.model, plan.begins)
    splits = split_facts(task, plan, world)
    found = segments(plan, blueprint, blocks) if plan.split_parts else None
    rows = tables(task, plan, blueprint)
    _refuse_slices(task, plan, blueprint, splits, rows)
    refuse_scaled(task, plan)
    refuse_offloaded(task, plan, blueprint)
    expectation, scale = Expectation(float(task.batch)), LossScale(task)
    exchange = Losses(world) if plan.server else Exchange(world)
    factor = _factor(plan, world, exchange, expectation, scale)
    stages = placed(task, plan, blueprint, blocks, world) if plan.pp > 1 else None
    portion = _portion(blueprint, plan, spread, splits, stages, rows)
    if plan.server and plan.computing == plan.dp:
        return serve(task, plan, spread, portion)
    if plan.meets_locally.rounds:
        return pace(task, plan, spread, portion)
    lent = blocks if stages or found else lists(blueprint.model, splits)
    untouched = originals(lent, blueprint.dtype_of, blueprint.mode, world.device)
    holding = _apart(task, plan, spread, portion, factor, exchange, expectation, stages.tied if stages else ())
    if holding is None:
        held = found.apart if found else tuple(splits.slices) if splits and plan.expert_parts else ()
        holding = _hold(portion, plan, spread, factor, blocks, held, stages, rows)
    splitting = _splitting(plan, holding.model, portion, spread, splits)
    streams = Streams(holding.model, task.seed, world.device)
    sending = _sending(holding.model, portion, spread, splits, blocks)
    sending = sending or calling(holding.model, portion, spread.experts, splits, streams, untouched)
    pulled = _pulled(task, spread, holding, rows, deals := _dealer(plan, spread), found)
    placing = stages or found
    # one that the trace did not come by is no stage's block: others follow it function by function
    known = {name: blocks[name] for name in placing.blocks} if placing else blocks
    recompute(again(plan, known).values(), streams, _around(sending or splitting or nullcontext(), pulled))
    parts = Parts(
        task=task,
        spread=spread,
        holding=holding,
        dealer=deals,
        exchange=exchange,
        expectation=expectation,
        scale=scale,
        streams=streams,
        statistics=_statistics(plan, spread, holding.model),
        splitting=splitting,
        sending=sending,
        pulling=pulled,
    )
    ties = _ties(plan, splits, stages, spread, portion, holding)
    if placing is None:
        return _step(plan, portion, ExpertsRunner(parts) if sending is not None else WholeModel(parts), ties)
    post = PartsPost(world, found.split) if found else Post(spread.stages, plan.num_stages)
    homes = {
        id(parameter): (name, placing.homes[name])
        for name, parameter in holding.model.named_parameters()
        if name in placing.homes
    }
    count = len(found.split) if found else plan.num_stages
    stand_ins = StandIns(blueprint.mode, untouched)
    ledger = Ledger(homes, post, stand_ins, splitting)
    together = Together(streams, holding.model, untouched if found else {}, draws=not plan.again)
    passing = Passing(blocks, placing.blocks, count, ledger, stand_ins, complete=stages is None or stages.complete)
    if parts.statistics is not None:
        parts.statistics.follow(passing.runs)
    if found:
        assert isinstance(post, PartsPost)
        return Step(plan, portion, PartsRunner(parts, plan, passing, post, found, together))
    assert stages is not None
    return _step(plan, portion, Pipeline(parts, plan, passing, post), ties)


def _step(plan: Plan, portion: Portion, runner: AbstractRunner, ties: list[Ties]) -> Step:
    return serve_replicas(plan, portion, runner, ties) if plan.server else Step(plan, portion, runner, ties)


def refuse(task: Task, plan: Plan) -> SplitFacts | None:
    """Raise PlanError where ``build`` would on any worker, without workers; gives how layers are split, if they are.

    What depends on values that training computes shows only then.
    """
    blueprint, world = Blueprint(task), World.alone()
    task = blueprint.task = with_microbatch(task, plan, blueprint.model)
    blocks = cut(blueprint.model, plan.begins)
    refuse_again(plan, blueprint.model)
    rows = tables(task, plan, blueprint)
    refuse_scaled(task, plan)
    refuse_closure(task)
    refuse_offloaded(task, plan, blueprint)
    refuse_looking(plan, looking=looks(task))
    if plan.server:
        refuse_served(task, plan, blueprint)
    splits = split_facts(task, plan, world)
    _refuse_slices(task, plan, blueprint, splits, rows)
    if plan.cp > 1:
        assert task.microbatch is not None
        sequences(task, plan.cp, samples=min(task.microbatch, task.num_samples))
    if plan.split_parts:
        segments(plan, blueprint, blocks)
    if plan.pp > 1:
        placed(task, plan, blueprint, blocks, world)
    return splits


def _portion(
    blueprint: Blueprint, plan: Plan, spread: Spread, splits: SplitFacts | None, stages: Stages | None, rows: Tables
) -> Portion:
    slices = {**(splits.slices if splits else {}), **rows.dealt}
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
        lengthwise.lends = not plan.again  # what runs again gathers again
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
    if splits is None or spread.experts is None or splits.dealt:
        return None
    slices = splits.slices
    held = {id(value): (name, slices[name]) for name, value in portion.own(model).items() if name in slices}
    mode = Sending(spread.experts, held, shared(model, slices.__contains__))
    come_home(blocks.values(), mode)
    return mode


def _around(
    mode: AbstractContextManager[object], pulled: Pulling | None
) -> Callable[[], AbstractContextManager[object]]:
    """What a block runs again in."""
    return (lambda: mode) if pulled is None else lambda: pulled.around(mode)


def _statistics(plan: Plan, spread: Spread, model: nn.Module) -> BatchStatistics | None:
    """Batch statistics, where they are set aside while microbatches run: of all, or of each replica by itself."""
    if plan.workers == 1 and not plan.again:
        return None
    return BatchStatistics(model, spread.world if plan.serves.exact else spread.replica, tells=spread.leads)


def _dealer(plan: Plan, spread: Spread) -> AbstractDealer:
    if plan.server and not plan.serves.exact:
        return Dealt((1,), 0)  # what the server deals is this replica's own
    number = spread.world.number("sheaf/builds") if plan.stolen else 0
    return dealer(plan, spread.place.dp, spread.world.counter, f"sheaf/stolen/{number}")


def _pulled(
    task: Task,
    spread: Spread,
    holding: AbstractHolding,
    rows: Tables,
    deals: AbstractDealer,
    found: Segments | None,
) -> Pulling | None:
    if not rows.dealt:
        return None
    between = sorted(set(rows.dealt) & set(found.homes)) if found else []
    if between:
        raise PlanError(f"{between[0]} is looked up between blocks, which split parts cut: use sparse in place of rows")
    assert isinstance(holding, Replicated)
    pulled = pulling(task, spread.world, holding.model, rows, deals, holding.touched.add)
    holding.pull(pulled.store)
    return pulled


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
    if plan.tp > 1 and plan.compress != "none" and not plan.local:
        # coded beside slices, which differ, whole gradients come out differently too: the first worker's count
        whole = [name for name in portion.parameters if name not in portion.slices and name not in partial]
        ties.append(Ties(whole, spread.parted, portion, holding, gives=spread.leads))
    if stages and stages.tied:
        gives = spread.apart or spread.speaks(sliced=not spread.lengthwise)
        ties.append(Ties(stages.tied, spread.copies, portion, holding, gives=gives))
    return ties


def _partial(plan: Plan, splits: SplitFacts | None) -> tuple[str, ...]:
    """Whole parameters of which each worker that splits layers finds a part of the gradient."""
    return splits.partial if splits is not None and plan.tp > 1 else ()


def _factor(plan: Plan, world: World, exchange: Exchange, expectation: Expectation, scale: LossScale) -> Factor:
    def find() -> float:
        weight = exchange.told().weight
        return expectation.weight / (weight * scale.value) if weight else 0.0

    # An accelerator's host is done with a backward long before the device: there it is right to wait. And where other
    # things are sent in a backward, they must meet gradients in the same order everywhere.
    if plan.computing > plan.dp or plan.parts or plan.zero >= 2 or world.device.type != "cpu":
        return Factor(find)
    return Factor(find, lambda: exchange.known)


def _refuse_slices(task: Task, plan: Plan, blueprint: Blueprint, splits: SplitFacts | None, rows: Tables) -> None:
    """Raise PlanError where the plan steps slices of parameters, and the optimizer cannot."""
    shapes = [fake.shape for fake in blueprint.parameters.values()]
    sliced = bool(rows.dealt) or (splits is not None and bool(splits.slices))
    if not (plan.zero or sliced) or elementwise(task.optimizer, shapes):
        return
    key, what = ("zero", f"zero={plan.zero}") if plan.zero else ("tp", f"tp={plan.tp}")
    if plan.by_parts:
        key = what = "ep" if plan.expert_parts else "rows" if rows.dealt else "tp"
    raise PlanError(
        f"{what} gives each worker slices of parameters, and this optimizer's update of a slice depends "
        f"on the rest of the parameter: use dp={plan.workers} without {key}, or an elementwise optimizer such as AdamW"
    )


def _apart(
    task: Task,
    plan: Plan,
    spread: Spread,
    portion: Portion,
    factor: Factor,
    exchange: Exchange,
    expectation: Expectation,
    tied: Sequence[str],
) -> AbstractHolding | None:
    """How it is held where replicas, of several workers each, go on by themselves."""
    if plan.server:
        return held_in_part(task, plan, spread, portion, tied)
    if plan.meets_locally.every:
        return LocalSteps(portion, spread, factor, plan, exchange, expectation, tied)
    return None


def _hold(
    portion: Portion,
    plan: Plan,
    spread: Spread,
    factor: Factor,
    blocks: dict[str, nn.Module],
    apart: Collection[str],
    stages: Stages | None,
    rows: Tables,
) -> AbstractHolding:
    replicas, first = spread.replicas, spread.place.pp
    size = plan.bucket_bytes
    if plan.zero == 0:
        held = Replicated(portion, replicas, factor, size, (*apart, *rows.dealt), plan.compression, rows)
    elif plan.zero == 3:
        calls, mine = (stages.blocks, range(first, plan.num_stages, plan.pp)) if stages else (None, (0,))
        held = Gathered(portion, replicas, factor, blocks, plan, calls, mine, spread.weights)
    else:
        held = Sharded(portion, replicas, factor, size, spread.weights, shard_gradients=plan.zero == 2)
    if plan.offload == OPTIMIZER:
        held.offload(portion)
    return held
