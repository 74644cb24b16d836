"""A plan with ``server`` becomes a step: shards and their backups beside the workers, and this worker's side."""

import torch

from sheaf.errors import PlanError
from sheaf.graph import cut
from sheaf.parallel.optimizers import sliced_optimizer
from sheaf.parallel.portion import Portion
from sheaf.parallel.precision import LossScale
from sheaf.parallel.recompute import again, recompute
from sheaf.parallel.runner import Expectation, Parts, WholeModel
from sheaf.parallel.server.beside import Beside, Losses
from sheaf.parallel.server.borrowing import Borrower, Lent
from sheaf.parallel.server.client import Client
from sheaf.parallel.server.departing import Departing
from sheaf.parallel.server.log import Terms
from sheaf.parallel.server.meeting import MeetingStep
from sheaf.parallel.server.places import Form, forms_of
from sheaf.parallel.server.seating import Seating, take_seats
from sheaf.parallel.server.serving import ServingStep
from sheaf.parallel.server.step import ServedStep
from sheaf.parallel.server.stolen import StolenStep
from sheaf.parallel.shares import AbstractDealer, Dealt, dealer
from sheaf.parallel.spread import Spread
from sheaf.parallel.statistics import BatchStatistics, keeps_statistics
from sheaf.parallel.wants import looks, tried
from sheaf.parallel.world import World
from sheaf.plans import Plan
from sheaf.task import Blueprint, Streams, Task
from sheaf.task.probe import elementwise

LEASE_SECONDS = 10.0  # a worker, or the seat of a shard, that is silent for so long is given up


def refuse_served(task: Task, plan: Plan, blueprint: Blueprint) -> None:
    """Raise PlanError listing why a plan with ``server`` cannot run this task."""
    served, broken = plan.serves, list[str]()
    trained = [name for name, fake in blueprint.parameters.items() if fake.requires_grad and fake.numel()]
    if served.shards > len(trained):
        broken.append(
            f"server={plan.server}: {served.shards} shards for {len(trained)} trained parameters: use at most "
            f"server={max(1, len(trained))}"
        )
    if not plan.local and not elementwise(task.optimizer, [fake.shape for fake in blueprint.parameters.values()]):
        broken.append(
            f"server={plan.server} steps pieces of parameters on shards by their gradients alone, and {_name(task)} "
            "needs more for an update, such as the rest of a parameter or the loss itself: use "
            f"dp={plan.dp} without server, or an elementwise optimizer such as AdamW"
        )
    if task.precision == "fp16":
        broken.append(
            f"server={plan.server} does not go with precision='fp16', whose loss scale all workers change together: "
            "use bf16 or fp32"
        )
    if (plan.local or not served.exact) and looks(task):
        broken.append(
            f"server={plan.server}: ReduceLROnPlateau looks at the loss of all workers, known only where gradients of "
            "all meet in every step: use staleness=0 without local, or another scheduler"
        )
    if plan.meets_locally.kind == "slowmo" and task.scheduler is not None:
        broken.append(
            f"server={plan.server},local={plan.local} keeps its momentum in units of the inner learning rate, which a "
            f"scheduler changes on workers and not on shards: use local={plan.meets_locally.every}:diloco, or drop "
            "the scheduler or the server"
        )
    if served.late == "delayed" and not plan.local and not _has_nesterov(task):
        broken.append(
            "late=delayed splits the step of SGD with Nesterov's momentum in two, and the task has another optimizer: "
            "use torch.optim.SGD(..., momentum=0.9, nesterov=True), or late=buffered"
        )
    normed = [name for name, module in blueprint.model.named_modules() if keeps_statistics(module)]
    if plan.stolen and normed:
        broken.append(
            f"server={plan.server},shares=stolen: {normed[0]} keeps running statistics, which all workers add up in "
            "each step, and here no step waits for a worker: use dealt shares, or a norm without running statistics"
        )
    if broken:
        raise PlanError(broken)


def terms_of(task: Task, plan: Plan, *, lent: int = 0, place: int | None = None) -> Terms:
    """What every shard of the plan goes by."""
    served = plan.serves
    return Terms(
        workers=plan.dp,
        shards=served.shards,
        staleness=served.staleness,
        late=served.late,
        dropped_beyond=served.dropped_beyond,
        clip=task.clip if served.exact and not plan.local else None,  # between meetings each clips its own
        lease_seconds=LEASE_SECONDS,
        lent=lent,
        place=place,
    )


def serve(task: Task, plan: Plan, spread_: Spread, portion: Portion) -> ServedStep | ServingStep:
    """Start this worker's shards and make its step; called on every worker (collective)."""
    world, served = spread_.world, plan.serves
    refuse_served(task, plan, portion.blueprint)
    terms = terms_of(task, plan, lent=microbatches(task) if plan.stolen else 0)
    if spread_.serves:
        return _serving(task, plan, spread_, portion, terms)
    if plan.local:
        holding = Departing(portion, world.device, spread_.computing if served.exact else None)
    else:
        holding = Beside(portion, world.device, sliced_optimizer(portion, {}))
    streams = Streams(holding.model, task.seed, world.device)
    recompute(again(plan, cut(holding.model)).values(), streams)
    forms = forms_of(holding.model, holding.parameters, served.shards)
    seating = take_seats(task, plan, world, portion, holding.parameters, forms, terms, holding.parameters.__getitem__)
    client = _joined(world, seating, forms, terms)
    holding.client, holding.first = client, world.rank == 0
    merged = spread_.computing if served.exact else World.alone()  # else running statistics are each worker's own
    parts = Parts(
        task=task,
        spread=spread_,
        holding=holding,
        dealer=_dealer(plan, spread_, terms),
        exchange=Losses(spread_.computing),
        expectation=Expectation(float(task.batch)),
        scale=LossScale(task),
        streams=streams,
        statistics=BatchStatistics(holding.model, merged),
        splitting=None,
    )
    if isinstance(client, Borrower):
        return StolenStep(plan, portion, WholeModel(parts), client, seating)
    made = MeetingStep if plan.local else ServedStep
    return made(plan, portion, WholeModel(parts), client, seating)


def _dealer(plan: Plan, spread_: Spread, terms: Terms) -> AbstractDealer:
    if terms.deals:
        return Dealt((1,), 0)  # what shard 0 deals is this worker's own
    return Lent() if plan.stolen else dealer(plan, spread_.place.dp, None)


def _serving(task: Task, plan: Plan, spread_: Spread, portion: Portion, terms: Terms) -> ServingStep:
    """The step of a worker that computes nothing, and of the model holds pieces only."""
    bare = Portion(portion.blueprint, names=())
    model = bare.fill(spread_.world.device)
    parameters = dict(model.named_parameters())
    forms = forms_of(model, parameters, terms.shards)
    seating = take_seats(task, plan, spread_.world, portion, parameters, forms, terms, portion.value)
    return ServingStep(task, plan, spread_, portion, model, seating)


def _joined(world: World, seating: Seating, forms: list[Form], terms: Terms) -> Client:
    try:
        client = (Borrower if terms.lent else Client)(world.rank, seating.addresses, forms, seating.keys, terms)
        client.join(0)
    except BaseException:
        seating.close()
        raise
    return client


def microbatches(task: Task) -> int:
    """How many a step has at most."""
    assert task.microbatch is not None
    return -(-task.batch // task.microbatch)


def _name(task: Task) -> str:
    made = tried(task)
    return "this optimizer" if made is None else type(made).__name__


def _has_nesterov(task: Task) -> bool:
    made = tried(task)
    return type(made) is torch.optim.SGD and all(group["nesterov"] for group in made.param_groups)
