"""A plan with ``server`` becomes a step: shards and their backups beside the workers, and this worker's side."""

import hashlib
import json
import secrets
import socket
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sheaf.errors import PlanError
from sheaf.graph import cut, is_composite
from sheaf.parallel.optimizers import sliced_optimizer
from sheaf.parallel.portion import Portion
from sheaf.parallel.precision import LossScale
from sheaf.parallel.recompute import recompute
from sheaf.parallel.runner import Expectation, Parts, WholeModel
from sheaf.parallel.server.addresses import own_address, told_all
from sheaf.parallel.server.beside import Beside, Losses
from sheaf.parallel.server.borrowing import Borrower, Lent
from sheaf.parallel.server.client import Client
from sheaf.parallel.server.host import Host
from sheaf.parallel.server.link import Address, Keys
from sheaf.parallel.server.log import Terms
from sheaf.parallel.server.peers import Peers
from sheaf.parallel.server.places import Form, spread
from sheaf.parallel.server.seats import BACKUP, PRIMARY, Throne
from sheaf.parallel.server.shard import Shard
from sheaf.parallel.server.spare import Spare
from sheaf.parallel.server.step import ServedStep
from sheaf.parallel.server.stolen import StolenStep
from sheaf.parallel.shares import dealer
from sheaf.parallel.spread import Spread
from sheaf.parallel.statistics import BatchStatistics, keeps_statistics
from sheaf.parallel.world import World
from sheaf.plans import Plan
from sheaf.plans.layout import Held
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
    if not elementwise(task.optimizer, [fake.shape for fake in blueprint.parameters.values()]):
        broken.append(
            f"server={plan.server} steps pieces of parameters on shards, and this optimizer's update of a piece "
            f"depends on the rest: use dp={plan.dp} without server, or an elementwise optimizer such as AdamW"
        )
    if task.precision == "fp16":
        broken.append(
            f"server={plan.server} does not go with precision='fp16', whose loss scale all workers change together: "
            "use bf16 or fp32"
        )
    if not served.exact and task.scheduler is not None and _watches(task):
        broken.append(
            f"server={plan.server}: ReduceLROnPlateau looks at the loss of all workers, known in lock-step only: "
            "use staleness=0, or another scheduler"
        )
    if served.late == "delayed" and not _has_nesterov(task):
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


def serve(task: Task, plan: Plan, spread_: Spread, portion: Portion) -> ServedStep:
    """Start this worker's shards and make its step; called on every worker (collective)."""
    world = spread_.world
    refuse_served(task, plan, portion.blueprint)
    holding = Beside(portion, world.device, sliced_optimizer(portion, {}))
    streams = Streams(holding.model, task.seed, world.device)
    if plan.recompute == "full":
        recompute([block for block in cut(holding.model).values() if is_composite(block)], streams)
    forms = forms_of(holding.model, holding.parameters, plan.serves.shards)
    served = plan.serves
    terms = Terms(
        workers=plan.dp,
        shards=served.shards,
        staleness=served.staleness,
        late=served.late,
        dropped_beyond=served.dropped_beyond,
        clip=task.clip if served.exact else None,
        lease_seconds=LEASE_SECONDS,
        lent=microbatches(task) if plan.stolen else 0,
    )
    hosts, spares, client = _opened(task, plan, world, portion, holding, forms, terms)
    holding.client, holding.first = client, world.rank == 0
    merged = world if plan.exact else World.alone()  # outside lock-step, running statistics are each worker's own
    parts = Parts(
        task=task,
        spread=spread_,
        holding=holding,
        dealer=Lent() if plan.stolen else dealer(plan, spread_.place.dp, None),
        exchange=Losses(world),
        expectation=Expectation(float(task.batch)),
        scale=LossScale(task),
        streams=streams,
        statistics=BatchStatistics(holding.model, merged),
        splitting=None,
    )
    if isinstance(client, Borrower):
        return StolenStep(plan, portion, WholeModel(parts), client, hosts, spares)
    return ServedStep(plan, portion, WholeModel(parts), client, hosts, spares)


def microbatches(task: Task) -> int:
    """How many a step has at most."""
    assert task.microbatch is not None
    return -(-task.batch // task.microbatch)


def forms_of(model: nn.Module, parameters: dict[str, nn.Parameter], shards: int) -> list[Form]:
    """How the trained parameters lie on the shards; embeddings by rows."""
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    rows = {name: value.shape[1] for name, value in parameters.items() if any(value is table for table in tables)}
    held = [Held(name, value.numel(), str(value.dtype), value.requires_grad) for name, value in parameters.items()]
    sizes = {str(value.dtype): value.itemsize for value in parameters.values()}
    kinds = {name: value.dtype for name, value in parameters.items()}
    return [Form(pieces, tuple(kinds[piece.name] for piece in pieces)) for pieces in spread(held, sizes, rows, shards)]


def _opened(
    task: Task, plan: Plan, world: World, portion: Portion, holding: Beside, forms: list[Form], terms: Terms
) -> tuple[list[Host], list[Spare], Client]:
    """This worker's seat of every shard, open, and its client, joined.

    Worker k has the primary of shard k, the next one the backup, and all others a spare seat for it.
    """
    token = bytes.fromhex(world.agreed(lambda: secrets.token_hex(32)))
    keys = Keys(token, _digest(task, plan, holding.parameters, forms))
    number_of_run = world.number("sheaf/servers")
    address = own_address(world.workers)
    store: Any = world.counter
    if hasattr(store, "clone"):  # a connection of its own: the run's may be waiting
        store = store.clone()
    lease = terms.lease_seconds
    hosts: list[Host] = []
    spares: list[Spare] = []
    listeners = [socket.create_server((address, 0)) for _ in range(terms.shards)]
    try:
        for number, listener in enumerate(listeners):
            throne, peers = Throne(store, f"sheaf/server/{number_of_run}/shard/{number}"), Peers(keys, lease)
            make = partial(_shard, task, number, forms[number], terms, portion, holding.parameters)
            place = (world.rank - number) % world.workers
            if place < 2:
                hosts.append(Host(make(), (PRIMARY, BACKUP)[place], listener, keys, throne, peers))
            else:
                spares.append(Spare(number, forms[number], make, listener, keys, throne, peers, lease))
        at = told_all(world, [listener.getsockname()[:2] for listener in listeners])
        seats = [
            [at[(shard + place) % world.workers][shard] for place in range(world.workers)]
            for shard in range(terms.shards)
        ]
        _open(world, hosts, spares, seats)
        client = (Borrower if terms.lent else Client)(world.rank, seats, forms, keys, terms)
        client.join(0)
    except BaseException:
        for one in (*hosts, *spares):
            one.close()
        for listener in listeners:
            listener.close()
        raise
    return hosts, spares, client


def _open(world: World, hosts: list[Host], spares: list[Spare], seats: list[list[Address]]) -> None:
    """Begin to answer; ``seats`` by shard: the primary's address, the backup's, and where a next one may be."""
    for one in (*hosts, *spares):
        one.peers.addresses = seats
    for spare in spares:
        spare.recruits = [address for address in seats[spare.number][2:] if address != spare.address]
        spare.open()
    for host in hosts:
        host.recruits = seats[host.shard.number][2:]
        if host.seat == BACKUP:
            host.open()
    world.barrier()
    for host in hosts:
        if host.seat == PRIMARY:
            host.open(seats[host.shard.number][1])
    world.barrier()


def _shard(
    task: Task, number: int, form: Form, terms: Terms, portion: Portion, parameters: dict[str, nn.Parameter]
) -> Shard:
    values: dict[str, Tensor] = {
        piece.name: parameters[piece.name].detach().reshape(-1)[piece.start : piece.stop].cpu().clone()
        for piece in form.pieces
    }
    optimizer = sliced_optimizer(portion, {piece.name: (values[piece.name], piece) for piece in form.pieces})
    scheduler = task.scheduler(optimizer) if task.scheduler is not None else None
    return Shard(number, form, values, optimizer, terms, scheduler)


def _digest(task: Task, plan: Plan, parameters: dict[str, nn.Parameter], forms: list[Form]) -> bytes:
    """What both ends of a connection must agree on before any bytes of tensors travel."""
    shapes = [[name, list(value.shape), str(value.dtype), value.requires_grad] for name, value in parameters.items()]
    places = [[[piece.name, piece.start, piece.stop, piece.offset] for piece in form.pieces] for form in forms]
    known = [str(plan), task.name, task.seed, task.batch, task.microbatch, task.precision, task.clip, shapes, places]
    return hashlib.sha256(json.dumps(known).encode()).digest()


def _has_nesterov(task: Task) -> bool:
    try:
        made = task.optimizer([nn.Parameter(torch.zeros(1))])
    except Exception:  # noqa: BLE001 - one that wants other parameters is none of torch's own
        return False
    return type(made) is torch.optim.SGD and all(group["nesterov"] for group in made.param_groups)


def _watches(task: Task) -> bool:
    assert task.scheduler is not None
    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        return isinstance(task.scheduler(stand_in), torch.optim.lr_scheduler.ReduceLROnPlateau)
    except Exception:  # noqa: BLE001 - one that wants the task's own optimizer tells in time
        return False
