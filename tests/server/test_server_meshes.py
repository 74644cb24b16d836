"""Replicas of several workers each beside a parameter server: split layers, stages, and what of both is shared."""

import time
from functools import partial

import pytest
import torch
from plain import Look, Run, assert_same, copies_agree, mlp_float64, norm_resnet, plain, planned, ragged_gpt
from server_cases import KEYS, Servers, all_at_once, gradient, in_one_go, same
from server_cases import step as one
from server_cases import wanted as left_by
from torch import nn
from torch.distributed import barrier

from sheaf.parallel import build
from sheaf.parallel.server.client import GivenUp
from sheaf.parallel.server.link import Failed
from sheaf.parallel.server.log import Terms
from sheaf.plans import Plan
from sheaf.task import Order, Streams
from sheaf.task.blueprint import Blueprint

ALTERNATING = {"precision": "fp64", "clip": 0.3, "batch": 10, "microbatch": 2}


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("make", "plan"),
    [
        (ragged_gpt, "dp=2,tp=2,server=1"),
        (norm_resnet, "dp=2,tp=2,server=2"),
        (ragged_gpt, "dp=2,pp=2,shares=2:1,server=2"),  # its embedding is of two stages
        (norm_resnet, "dp=2,pp=2:interleaved,server=1"),
    ],
)
def test_lock_step_is_the_serial_answer(ranks, make, plan):
    task = make(precision="fp64", clip=0.3)
    assert_same(ranks(planned, 4, task, plan, 3)[0], plain(task, 3), 1e-9)


def in_turn(task, text, steps):
    """Steps in which one replica is done before the next begins, so that what is late is known; the whole weights."""
    step = build(task, Plan.parse(text))
    run, reports = Run(), []
    step.observe(Look(run))
    for _ in range(steps):
        for replica in range(2):
            if step._spread.place.dp == replica:
                reports.append(step())
            barrier()
        run.weights.append({name: value.clone() for name, value in step.full_state().items()})
    alike = copies_agree(step)
    told = [(report.server["delay"], report.gradient_norm, report.loss) for report in reports]
    step.close()
    return run, told, alike


def late_by_one(task, steps):
    """The same by plain PyTorch: each replica in turn, on the values that there were after its own last update."""
    model = Blueprint(task).fill(torch.device("cpu"))
    served = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = task.optimizer(list(served.values()))
    scheduler = task.scheduler(optimizer)
    streams = Streams(model, task.seed, torch.device("cpu"))
    order = Order(len(task.data), task.batch, task.microbatch, task.seed, shuffle=task.shuffle)
    pulled = [{name: value.clone() for name, value in served.items()} for _ in range(2)]
    run, norms = Run(), [[], []]
    for step in range(steps):
        microbatches = order.step(step)
        half = -(-len(microbatches) // 2)
        for replica, mine in enumerate((microbatches[:half], microbatches[half:])):
            with torch.no_grad():
                for name, value in model.named_parameters():
                    value.copy_(pulled[replica][name])
            model.zero_grad()
            total = 0.0
            for microbatch in mine:
                streams.enter(step, microbatch.index)
                batch = task.collate([task.data[index] for index in microbatch.samples])
                loss = task.loss(model(*task.inputs(batch)), batch)
                loss.sum.backward()
                total += float(loss.weight)
            used = {name: value for name, value in model.named_parameters() if value.grad is not None}
            for value in used.values():
                value.grad /= total
            norms[replica].append(float(nn.utils.clip_grad_norm_(model.parameters(), task.clip)))
            for name, value in served.items():
                value.grad = used[name].grad.clone() if name in used else None
            if replica == 0:
                run.gradients.append({name: value.grad.clone() for name, value in used.items()})
            optimizer.step()
            pulled[replica] = {name: value.clone() for name, value in served.items()}
        scheduler.step()
        run.weights.append({name: value.clone() for name, value in served.items()})
    streams.close()
    return run, norms


@pytest.mark.thinned(2)
@pytest.mark.parametrize("plan", ["dp=2,tp=2,server=1:async", "dp=2,pp=2,server=2:staleness=1"])
def test_late_gradients_of_replicas_are_late_as_those_of_workers(ranks, plan):
    task = ragged_gpt(**ALTERNATING)
    found = ranks(in_turn, 4, task, plan, 3)
    run, norms = late_by_one(task, 3)
    found[0][0].weights = [{name: one[name] for name in run.weights[0]} for one in found[0][0].weights]
    assert_same(found[0][0], run, 1e-9)  # gradients are those of replica 0, clipped
    replicas = [[0, 2], [1, 3]] if "pp" in plan else [[0, 1], [2, 3]]
    for replica, members in enumerate(replicas):
        for rank in members:
            assert found[rank][1][0][0] == replica  # nothing came between its first pull and push, or one update
            assert all(delay == 1 for delay, _, _ in found[rank][1][1:])
            assert [norm for _, norm, _ in found[rank][1]] == pytest.approx(norms[replica], rel=1e-8)
    assert all(row[2] for row in found), "copies within a replica came apart"


def relaxed(task, text, steps, stop_after=None):
    """What every worker reports; one asks to stop, where it is said when; and updates by shard."""
    step = build(task, Plan.parse(text))
    reports = []
    while step.index < steps and not (reports and reports[-1].stop):
        if stop_after is not None and step.rank == 3 and step.index == stop_after:
            step.request_stop()
        reports.append(step())
    whole = {name: value.clone() for name, value in step.full_state().items()}
    updates = [host.shard.version for host in step.hosts if host.seat == "primary"]
    step.close()
    return [(report.step, report.stop, report.server["staleness"]) for report in reports], updates, whole


@pytest.mark.thinned(2)
@pytest.mark.parametrize("mesh", ["tp=2", "pp=2"])
def test_workers_of_a_replica_decide_alike(ranks, mesh):
    task = mlp_float64(clip=5.0, batch=15)
    found = ranks(relaxed, 4, task, f"dp=2,{mesh},server=2:staleness=1", 40, 3)
    ends = {row[0][-1][:2] for row in found}
    assert len(ends) == 1, "all stop after the same step"
    (last,) = ends
    assert last[1]
    assert 3 <= last[0] < 39
    assert all(staleness <= 1 for row in found for _, _, staleness in row[0])
    assert {version for row in found for version in row[1]} == {2 * (last[0] + 1)}
    first = plain(task, 1).weights[0]
    assert all(not torch.equal(found[0][2][name], value) for name, value in first.items())


def test_too_late_a_gradient_of_a_replica_is_dropped_at_every_place(ranks):
    found = ranks(relaxed, 4, mlp_float64(batch=15), "dp=2,tp=2,server=1:async,late=plain:0", 6)
    assert {version for row in found for version in row[1]} == {12}  # every step of every replica counts once


def resumed(task, text):
    """Four steps in one go; and two, then two more by another step that was given the state; the whole weights."""
    straight, losses, kept, wanted = in_one_go(task, text, 4)
    straight.close()
    other = build(task, Plan.parse(text))
    other()
    other.load(*kept)
    half = {name: value.clone() for name, value in other.full_state().items()}
    again = [other().loss for _ in range(2)]
    found = {name: value.clone() for name, value in other.full_state().items()}
    other.close()
    return losses, again, wanted, found, half


def test_a_resumed_run_is_the_same_to_the_last_bit_and_its_weights_fit_any_plan(ranks):
    task = mlp_float64(clip=0.05, scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7))
    for losses, again, wanted, found, half in ranks(resumed, 4, task, "dp=2,tp=2,server=2"):
        assert losses[2:] == again
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        if half:
            whole = Blueprint(task).fill(torch.device("cpu"))
            whole.load_state_dict(half)
            reference = plain(task, 2).weights[1]
            for name, value in whole.named_parameters():
                torch.testing.assert_close(value.detach(), reference[name], rtol=1e-10, atol=1e-12)


def test_in_lock_step_nobody_goes_on_without_a_replica_that_is_given_up():
    with Servers(Terms(workers=2, shards=1, place=0)) as servers:
        first, second = servers.clients
        all_at_once([partial(client.join, 0) for client in (first, second)])
        servers.hosts[0].lose(1)
        with pytest.raises(Failed) as caught:
            one(first, 0, gradient(0, 0))
        assert caught.value.meta == {"why": "worker", "worker": 1, "clock": 0}


def test_a_worker_whose_gradient_is_refused_tells_its_replica():
    with Servers(Terms(workers=2, shards=1, staleness=1, place=0)) as servers:
        refused, mate = servers.clients
        said = []
        for client in (refused, mate):
            client.agreed = lambda delay: said.append(delay) or max(said)
            client.join(0)
        said.clear()
        servers.hosts[0].lose(0)
        for worker, client in enumerate((refused, mate)):  # the mate's own is taken
            with pytest.raises(GivenUp, match=f"replica {worker} was given up"):
                one(client, 0, gradient(worker, 0))
        assert said[0] > said[1] == 0


class Died(Exception):
    """In place of the end of a process."""


def died(_):
    raise Died


@pytest.mark.parametrize("told", [True, False])
def test_a_gradient_of_a_lost_replica_counts_at_all_places_or_at_none(told):
    places = [Servers(Terms(workers=2, shards=2, staleness=1, place=place, lease_seconds=5.0)) for place in range(2)]
    with places[0] as first, places[1] as second:
        for place, (servers, other) in enumerate(((first, second), (second, first))):
            for host in servers.hosts:
                host.peers.place, host.peers.elsewhere = place, {1 - place: (other.addresses, KEYS)}
            servers.clients[1].incarnation = first.clients[1].incarnation
            for client in servers.clients:
                client.join(0)

        def lose(delay):
            first.hosts[0].lose(1)
            return delay

        first.clients[1].agreed = died
        with pytest.raises(Died):
            one(first.clients[1], 0, gradient(1, 0))
        if told:
            one(second.clients[1], 0, gradient(1, 0))
            first.hosts[0].lose(1)
        else:  # its shards have it and are told to apply it when it was given up at the other place
            second.clients[1].agreed = lose
            with pytest.raises(GivenUp, match="replica 1 was given up"):
                one(second.clients[1], 0, gradient(1, 0))
        for servers in places:  # one shard has given it up, and the others do
            while any(1 in host.shard.clocks.workers for host in servers.hosts):
                time.sleep(0.01)
            assert same(servers.read(), left_by([(1, 0)] if told else []))
        dealing = first.hosts[0].shard.dealing
        assert (dealing.next, dealing.returned) == ([1, int(told)], 1)
        assert second.hosts[0].shard.dealing is None
