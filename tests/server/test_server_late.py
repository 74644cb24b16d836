"""What a shard does with late gradients, against the formulas of the papers written out."""

from functools import partial

import pytest
import torch
from plain import mlp_float64
from server_cases import Servers, forms, gradient, same, shard_of, step, wanted

from sheaf.errors import PlanError
from sheaf.parallel import build, refuse
from sheaf.parallel.server.frame import Kind
from sheaf.parallel.server.log import Entry, Fenced, Terms
from sheaf.plans import Plan
from sheaf.task.blueprint import Blueprint

FORM = forms(1)[0]


def push(shard, worker, sequence, clock, base, value):
    arena = FORM.arena()
    for view in arena.views.values():
        view.fill_(value)
    meta = {"used": list(range(len(FORM.pieces))), "losses": []}
    shard.do(Entry(Kind.PUSH, worker, 1, sequence, clock, base, meta, arena))
    shard.do(Entry(Kind.COMMIT, worker, 1, sequence))


def joined(late, rate=0.5):
    shard = shard_of(
        0, FORM, Terms(workers=2, shards=1, staleness=None, late=late), lambda values: torch.optim.SGD(values, lr=rate)
    )
    for worker in range(2):
        shard.do(Entry(Kind.JOIN, worker, 1))
    return shard


def value(shard):
    return float(shard.values["b"][3])


def test_plain_scaled_and_compensated_follow_their_formulas():
    for late in ("plain", "scaled", "compensated"):
        shard = joined(late)
        push(shard, 0, 1, 0, 0, 2.0)  # on what is there: every way takes it as it is
        assert value(shard) == -1.0
        push(shard, 0, 2, 1, 1, 2.0) if late == "scaled" else push(shard, 0, 2, 1, 0, 2.0)
        before = value(shard)
        push(shard, 1, 1, 0, 0, 3.0)  # computed on zeros, two updates ago
        if late == "plain":
            assert value(shard) == before - 0.5 * 3.0
        elif late == "scaled":
            assert value(shard) == before - 0.5 * 3.0 / (1 + 2)
        else:
            assert value(shard) == pytest.approx(before - 0.5 * (3.0 + 0.04 * 9.0 * (before - 0.0)))


def test_compensation_starts_from_what_the_worker_pulled_last():
    shard = joined("compensated")
    push(shard, 0, 1, 0, 0, 2.0)
    shard.do(Entry(Kind.PULLED, 1, 1, sequence=7))
    pulled = value(shard)
    push(shard, 0, 2, 1, 1, 2.0)
    before = value(shard)
    push(shard, 1, 1, 0, 1, 3.0)
    assert value(shard) == pytest.approx(before - 0.5 * (3.0 + 0.04 * 9.0 * (before - pulled)))
    assert float(shard.pulled_copy(1, 7).views["b"][0]) == pulled
    assert shard.pulled_copy(1, 8) is None


def test_a_buffer_applies_the_mean_of_as_many_as_there_are_workers():
    shard = joined("buffered", rate=1.0)
    push(shard, 0, 1, 0, 0, 2.0)
    assert (value(shard), shard.version) == (0.0, 0)
    push(shard, 0, 2, 1, 0, 6.0)
    assert (value(shard), shard.version) == (-4.0, 1)
    push(shard, 1, 1, 0, 0, 1.0)
    assert shard.version == 1


@pytest.mark.parametrize("maximize", [False, True])
def test_delayed_nesterov_steps_plainly_between_and_lets_momentum_see_the_mean(maximize):
    terms = Terms(workers=3, shards=1, staleness=None, late="delayed")
    rate, momentum = 0.5, 0.9
    made = partial(torch.optim.SGD, lr=rate, momentum=momentum, nesterov=True, maximize=maximize)
    shard = shard_of(0, FORM, terms, made)
    for worker in range(3):
        shard.do(Entry(Kind.JOIN, worker, 1))
    theta, seen, gathered, pushed = 0.0, 0.0, 0.0, [2.0, -1.0, 4.0, 3.0, 0.5, 1.0, 7.0]
    for turn, one in enumerate(pushed):  # algorithm 3 of Liu et al., 2024, with c = 0
        sign = -1 if maximize else 1
        gathered += one
        if (turn + 1) % 3 == 0:
            seen = momentum * seen + gathered / 3
            theta -= rate * (momentum * seen + one / 3)
            gathered = 0.0
        else:
            theta -= rate * one / 3
        push(shard, turn % 3, turn // 3 + 1, turn // 3, shard.version, one)
        assert value(shard) == pytest.approx(sign * theta)
        assert shard.version == turn + 1


@pytest.mark.parametrize("late", ["buffered", "delayed"])
def test_what_is_gathered_when_training_ends_is_applied_with_its_weight_once(late):
    def optimizer(values):
        return torch.optim.SGD(values, lr=1.0, momentum=0.5, nesterov=True)

    shard = shard_of(0, FORM, Terms(workers=2, shards=1, staleness=None, late=late), optimizer)
    for worker in range(2):
        shard.do(Entry(Kind.JOIN, worker, 1))
    push(shard, 0, 1, 0, 0, 4.0)
    for _ in range(2):
        shard.do(Entry(Kind.DRAIN, 0, 1))
        assert value(shard) == -(2.0 + 0.5 * 2.0)  # half of a round of two; Nesterov adds momentum times what it saw
    assert shard.buffer.gathered == 0


def test_a_worker_has_the_shards_apply_what_is_left():
    terms = Terms(workers=2, shards=2, staleness=None, late="buffered", lease_seconds=5.0)
    with Servers(terms) as servers:
        for client in servers.clients:
            client.join(0)
        step(servers.clients[0], 0, gradient(0, 0))
        assert same(servers.read(), wanted([]))
        for _ in range(2):
            servers.clients[0].drain(1)
        assert same(servers.read(), {name: value / 2 for name, value in wanted([(0, 0)]).items()})
        for host in servers.hosts:
            host.lose(0)
        servers.clients[0].drain(1)
        assert {host.shard.clocks.of(0) for host in servers.hosts} == {1}, "who was given up is where it was"


def test_the_past_is_not_heard():
    shard = joined("plain")
    push(shard, 0, 1, 0, 0, 1.0)
    shard.do(Entry(Kind.FENCE, 0, 1))
    with pytest.raises(Fenced):
        push(shard, 0, 2, 1, 0, 1.0)
    shard.do(Entry(Kind.JOIN, 0, 2))
    with pytest.raises(Fenced):
        push(shard, 0, 2, 1, 0, 1.0)
    shard.do(Entry(Kind.LEAVE, 0, 1))  # of the first incarnation, come late: the second stays
    assert shard.clocks.workers == (0, 1)
    assert shard.committed(0, 1) == 1
    assert shard.version == 1


class Signs(torch.optim.Optimizer):
    """Steps by signs, with settings of its own and no lr."""

    def __init__(self, parameters):
        super().__init__(parameters, {"by": 0.125})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for value in group["params"]:
                value.sub_(group["by"] * value.grad.sign()) if value.grad is not None else None


def steps_of(task, plan):
    step = build(task, Plan.parse(plan))
    reports = [step() for _ in range(2)]
    step.settle()
    found = {name: value.clone() for name, value in step.full_state().items()}
    step.close()
    return [report.learning_rate for report in reports], found


def test_an_optimizer_without_lr_goes_with_every_way_but_the_one_that_needs_it(ranks):
    task = mlp_float64(optimizer=Signs)
    refused = r"late=delayed splits the step of SGD with Nesterov's momentum .*: use torch.optim.SGD\(.*late=buffered"
    with pytest.raises(PlanError, match=refused):
        refuse(task, Plan.parse("dp=2,server=1:async,late=delayed"))
    for late in ("plain", "scaled", "compensated", "buffered"):
        refuse(task, Plan.parse(f"dp=2,server=1:async,late={late}"))
    (rates, found), _ = ranks(steps_of, 2, task, "dp=2,server=1:async,late=buffered")
    assert rates == [None, None]
    first = {name: value.detach() for name, value in Blueprint(task).fill(torch.device("cpu")).named_parameters()}
    moved = torch.cat([((found[name] - first[name]) / 0.125).flatten() for name in first])
    assert set(moved.round(decimals=9).abs().tolist()) <= {0.0, 1.0, 2.0}  # two whole rounds of two gradients
    assert moved.abs().max() == pytest.approx(2.0)
