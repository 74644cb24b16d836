"""Local steps that meet on shards: against workers played in plain PyTorch, and against meetings by all-reduce."""

import contextlib
import io
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from counting import counted, counting, samples_of
from plain import norm_resnet
from test_local import Played, adam_mlp, clipped_mlp, padded_mlp
from torch import nn

from sheaf.errors import PlanError
from sheaf.parallel import build, refuse
from sheaf.plans import Plan
from sheaf.plans.layout import apportion
from sheaf.task.blueprint import Blueprint


def run(task, text, steps=7, resume_after=None):
    """This worker's reports, its weights after each step, and the whole state at the end; None where it only serves."""
    plan = Plan.parse(text)
    step = build(task, plan)
    reports, weights = [], []
    while step.index < steps:
        reports.append(step())
        if step.rank < plan.computing:
            weights.append(nn.utils.parameters_to_vector(step.model.parameters()).detach().clone())
        if step.index == resume_after:
            tensors, values = step.state()
            tensors = {name: value.clone() for name, value in tensors.items()}
            step.close()
            step = build(task, plan)
            step.load(tensors, values)
    if plan.server:
        step.conclude()  # in lock-step it changes nothing
    state = step.full_state()
    step.close()
    return (reports, weights, state) if step.rank < plan.computing else None


@pytest.mark.parametrize(
    ("plan", "make"),
    [
        ("dp=2,server=2,local=3:diloco:lr=0.6:momentum=0.8", adam_mlp),
        ("dp=3,shares=2:1:1,server=2,local=3", padded_mlp),
        ("dp=2,server=1,local=3:slowmo:lr=0.6:momentum=0.8", clipped_mlp),
        ("dp=2,server=2:apart,local=3:diloco", adam_mlp),
    ],
)
def test_in_lock_step_shards_step_by_the_mean_departure(ranks, plan, make):
    task, plan, rounds = make(), Plan.parse(plan), []
    found = ranks(run, plan.workers, task, str(plan))[: plan.dp]
    played, way = Played(task, plan.weights), plan.meets_locally
    anchor = nn.Parameter(played.weights(0))
    outer = torch.optim.SGD([anchor], lr=way.lr, momentum=way.momentum, nesterov=way.kind == "diloco")
    for step in range(7):
        loss = played.step(step)
        if step % 3 == 2:
            anchor.grad = anchor.detach() - played.mean()
            outer.step()
            for worker in range(plan.dp):
                played.put(worker, anchor.detach())
            played.seen = [0.0] * plan.dp
        told = [reports[step] for reports, _, _ in found]
        weight = sum(report.weight for report in told)
        own = sum(report.loss * report.weight for report in told if report.weight)
        assert own / weight == pytest.approx(loss, rel=1e-11)
        rounds.append((loss * weight, weight))
        if step % 3 == 2:
            total, weights = (sum(column[-3:]) for column in zip(*rounds, strict=True))
            assert {report.server["round_weight"] for report in told} == {weights}
            assert [report.server["round_loss"] for report in told] == pytest.approx([total / weights] * plan.dp)
        for worker, (_, weights, _) in enumerate(found):
            torch.testing.assert_close(weights[step], played.weights(worker), rtol=1e-11, atol=1e-12)
    whole = nn.utils.parameters_to_vector(found[0][2][name] for name, _ in played.models[0].named_parameters())
    torch.testing.assert_close(whole, played.mean(), rtol=1e-11, atol=1e-12)
    assert all(state == {} for _, _, state in found[1:])


def test_meetings_on_shards_and_by_all_reduce_are_the_same(ranks):
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)
    task = replace(norm_resnet(precision="fp64"), scheduler=scheduler)
    plans = ("dp=2,local=2:diloco", "dp=2,server=2,local=2:diloco")
    for wanted, found in zip(*(ranks(run, 2, task, plan, 3) for plan in plans), strict=True):
        assert wanted[2].keys() == found[2].keys()
        for one, other in zip((*wanted[1], *wanted[2].values()), (*found[1], *found[2].values()), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
        assert [one.learning_rate for one in wanted[0]] == [one.learning_rate for one in found[0]]


@pytest.mark.parametrize("server", ["2", "1:apart"])
def test_a_run_resumed_between_meetings_is_the_same_to_the_last_bit(ranks, server):
    task, plan = adam_mlp(), f"dp=2,server={server},local=3:diloco"
    workers = Plan.parse(plan).workers
    straight, resumed = ranks(run, workers, task, plan), ranks(run, workers, task, plan, resume_after=4)
    for (_, weights, state), (_, again, other) in zip(straight[:2], resumed[:2], strict=True):
        assert len(weights) == len(again) == 7
        assert all(torch.equal(one, same) for one, same in zip(weights, again, strict=True))
        assert all(torch.equal(value, other[name]) for name, value in state.items())


def in_turn(task, text, steps=7):
    """As ``run``, but that workers meet one after another, worker 0 first; and the state once they have concluded."""
    plan = Plan.parse(text)
    step, store = build(task, plan), dist.distributed_c10d._get_default_store()
    every, reports, weights = plan.meets_locally.every, [], []
    while step.index < steps:
        meeting, turn = divmod(step.index, every)
        place = meeting * plan.dp + step.rank
        if turn == every - 1 and place:
            store.wait([f"{text}/{place}"])
        reports.append(step())
        if turn == every - 1:
            store.set(f"{text}/{place + 1}", "")
        weights.append(nn.utils.parameters_to_vector(step.model.parameters()).detach().clone())
    step.settle()
    state = {name: value.clone() for name, value in step.full_state().items()}
    exchange = step.client.exchange

    def exchange_and_tell(*given):
        seen = exchange(*given)
        store.set(f"{text}/concluded", "")
        return seen

    step.client.exchange = exchange_and_tell
    if step.rank and step.index % every:
        store.wait([f"{text}/concluded"])
    step.conclude()
    whole = step.full_state()
    step.close()
    return reports, weights, state, whole


@pytest.mark.parametrize(
    "plan",
    [
        "dp=2,server=2:async,local=3:diloco",
        "dp=2,server=1:staleness=1,late=scaled,local=3",
        "dp=2,server=2:async,late=delayed,local=3:diloco:lr=0.6:momentum=0.8",
    ],
)
def test_out_of_lock_step_each_departure_is_an_update_that_counts_by_its_weight(ranks, plan):
    task, plan = padded_mlp(), Plan.parse(plan)
    found = ranks(in_turn, 2, task, str(plan))
    played, way = Played(task, plan.weights), plan.meets_locally
    anchors = [played.weights(0)] * 2
    value, ended = nn.Parameter(anchors[0].clone()), anchors[0]
    outer = torch.optim.SGD([value], lr=way.lr, momentum=way.momentum, nesterov=way.kind == "diloco")
    weight, samples, gathered = [0.0, 0.0], [0, 0], []
    for step in range(7):
        played.step(step)
        microbatches = [len(one.samples) for one in played.order.step(step)]
        first = apportion(len(microbatches), (1, 1))[0]
        samples = [samples[0] + sum(microbatches[:first]), samples[1] + sum(microbatches[first:])]
        turns = {2: 3, 5: 3, 6: 1}.get(step, 0)  # the last step has no other to meet after
        if step == 6:
            ended = value.detach().clone()
            for worker in (0, 1):
                torch.testing.assert_close(found[worker][1][6], played.weights(worker), rtol=1e-11, atol=1e-12)
        for worker in (0, 1) if turns else ():
            weight[worker] += played.seen[worker]
            whole = weight[worker] / samples[worker] * task.batch * turns
            departed = (anchors[worker] - played.weights(worker)) * (played.seen[worker] / whole)
            if not played.seen[worker]:
                pass  # its last step is all padding: nothing moves by momentum
            elif plan.late == "delayed":
                before = before if gathered else value.detach().clone()
                gathered.append(departed)
                with torch.no_grad():
                    value.copy_(before if len(gathered) == 2 else before - way.lr * departed)
                if len(gathered) == 2:
                    value.grad, gathered = sum(gathered), []
                    outer.step()
            else:
                late = 1 + (worker + step > 2)  # but for the very first, the other met in between
                value.grad = departed / (late if plan.late == "scaled" else 1)
                outer.step()
            anchors[worker] = value.detach().clone()
            played.put(worker, anchors[worker])
            played.seen[worker] = 0.0
        for worker in (0, 1) if step < 6 else ():
            torch.testing.assert_close(found[worker][1][step], played.weights(worker), rtol=1e-11, atol=1e-12)
    if gathered:  # what is left over counts as it does in a whole round
        with torch.no_grad():
            value.copy_(before)
        value.grad = sum(gathered)
        outer.step()
    for state, wanted in zip(found[0][2:], (ended, value.detach()), strict=True):
        whole = nn.utils.parameters_to_vector(state[name] for name, _ in played.models[0].named_parameters())
        torch.testing.assert_close(whole, wanted, rtol=1e-11, atol=1e-12)
    assert [one.server.get("delay") for one in found[1][0]] == [None, None, 1, None, None, 1, None]


def uses(state):
    """How often each sample of the counting task was used: one of two workers' departures counts as half of a round."""
    first = Blueprint(counting()).fill(torch.device("cpu")).get_parameter("table.weight").detach()
    return counted(first - 2 * (first - state["table.weight"]))


def once(steps):
    """How often each sample is in so many steps."""
    return samples_of([(step, place) for step in range(steps) for place in (0, 1)])


def left_alone(task, text):
    """Worker 1 stops within a round and is given up; what worker 0 then makes of four rounds."""
    step, store = build(task, Plan.parse(text)), dist.distributed_c10d._get_default_store()
    step()
    if step.rank:
        store.set(f"{text}/stopped", "")
        store.wait([f"{text}/done"])
        step.close()
        return None
    store.wait([f"{text}/stopped"])
    step.heed(lambda: {1})
    (host,) = step.hosts
    with host.changed:
        assert host.changed.wait_for(lambda: host.shard.clocks.workers == (0,), 20)
    reports = [step() for _ in range(7)]
    state = {name: value.clone() for name, value in step.full_state().items()}
    store.set(f"{text}/done", "")
    step.close()
    return reports, state


def test_what_a_lost_worker_used_since_it_met_is_used_again(ranks):
    reports, state = ranks(left_alone, 2, counting(), "dp=2,server=1:async,local=2")[0]
    assert [report.server.get("returned") for report in reports] == [1, None] * 3 + [1]
    assert uses(state) == once(4)  # its own two rounds, and those of the other


def test_a_departure_that_is_too_late_is_dropped_and_its_round_made_again(ranks):
    found = ranks(in_turn, 2, counting(), "dp=2,server=1:async,late=plain:0,local=2", 8)
    assert [report.server.get("dropped") for report in found[0][0]] == [None, 0, *[None, 1] * 3]
    assert [report.server.get("dropped") for report in found[1][0]] == [None, 1] * 4
    assert uses(found[0][2]) == once(8)


@pytest.mark.parametrize("late", ["plain:0", "buffered"])
def test_what_came_after_the_last_meeting_is_used_once_when_training_ends(ranks, late):
    _, _, met, whole = ranks(in_turn, 2, counting(), f"dp=2,server=1:async,late={late},local=2", 5)[0]
    assert uses(met) == once(4)
    assert uses(whole) == once(5)  # that of worker 1 came too late, and was made again


def back_at_the_end(task, text, taken):
    """Worker 1 is given up within its second round, and comes back when the other has concluded after five steps; where
    its part was ``taken`` by then, it was given up before that. Its steps, and what came of it all.
    """
    step, store = build(task, Plan.parse(text)), dist.distributed_c10d._get_default_store()
    steps = []
    if step.rank:
        steps = [step().step for _ in range(3)]
        store.set(f"{text}/{taken}/behind", "")
        store.wait([f"{text}/{taken}/over"])
    else:
        store.wait([f"{text}/{taken}/behind"])
        (host,) = step.hosts
        if taken:
            host.lose(1)
    while step.index < 5:
        steps.append(step().step)
    step.conclude()
    if step.rank:
        store.set(f"{text}/{taken}/back", "")
    else:
        host.lose(1)  # nothing where it was lost before
        store.set(f"{text}/{taken}/over", "")
        store.wait([f"{text}/{taken}/back"])
    whole = {name: value.clone() for name, value in step.full_state().items()}
    ended = step.index
    step.close()
    return steps, ended, whole


@pytest.mark.parametrize("taken", [True, False])
def test_who_comes_back_when_the_others_have_concluded_goes_no_further_than_they(ranks, taken):
    (_, _, whole), (steps, ended, _) = ranks(back_at_the_end, 2, counting(), "dp=2,server=1:async,local=2", taken)
    assert ended == 5
    assert steps == ([0, 1, 2, 3, 4] if taken else [0, 1, 2, 4])
    alone = [(step, 0) for step in range(4)]
    if taken:  # a step of its second round is made by worker 0, and it makes its own of the last
        assert uses(whole) == samples_of([*alone, (2, 1), (0, 1), (1, 1), (4, 1)])
    else:
        assert uses(whole) == samples_of([*alone, (4, 0), *((step, 1) for step in range(4))])


def test_what_shards_cannot_know_is_refused_and_workers_may_have_any_optimizer():
    plan = Plan.parse("dp=2,server=2,local=4")
    refuse(replace(adam_mlp(), optimizer=torch.optim.Adafactor), plan)
    stepped = replace(adam_mlp(), scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=2))
    with pytest.raises(PlanError, match=r"in units of the inner learning rate.*use local=4:diloco, or drop the sched"):
        refuse(stepped, Plan.parse("dp=2,server=2,local=4:slowmo"))
    with pytest.raises(PlanError, match="use staleness=0 without local, or another scheduler"):
        refuse(replace(adam_mlp(), scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau), plan)


def asked_to_stop(task, text, asks):
    """As which steps this worker's reports come, whether the last says to stop, and what was said; one asks at once."""
    step, said = build(task, Plan.parse(text)), io.StringIO()
    if step.rank == asks:
        step.request_stop()
    with contextlib.redirect_stderr(said):
        reports = [step()]
        while not reports[-1].stop and step.index < 50:
            reports.append(step())
    step.close()
    return [report.step for report in reports], reports[-1].stop, said.getvalue()


@pytest.mark.parametrize("asks", [0, 1])
def test_who_asks_to_stop_is_heard_at_the_next_meeting(ranks, asks):
    found = ranks(asked_to_stop, 3, adam_mlp(), "dp=2,server=1:apart,local=3", asks)
    assert [one[:2] for one in found] == [([0, 1, 2], True)] * 3
    when = "sheaf: asked to stop: the workers agree on it when they meet, 2 of 3 steps from here\n"
    assert [one[2] for one in found] == ["" if asks else when, "", ""]


def anew(step, task, text):
    """The step of a run that goes on from what worker 0 alone wrote of this one."""
    dist.barrier()
    kept = [step.states() if step.rank == 0 else None]
    dist.broadcast_object_list(kept)
    step.close()
    other = build(task, Plan.parse(text))
    other.load(*kept[0][other.rank])
    return other


def late_resumed(task, text):
    """Eight steps of two-step rounds; after the fifth they go on from what worker 0 alone wrote."""
    step = build(task, Plan.parse(text))
    for _ in range(5):
        step()
    other = anew(step, task, text)
    steps = [other().step for _ in range(4)]
    whole = {name: value.clone() for name, value in other.full_state().items()}
    other.close()
    return steps, whole


def test_out_of_lock_step_a_run_goes_on_from_its_last_meetings_and_uses_each_sample_once(ranks):
    (steps, whole), (others, _) = ranks(late_resumed, 2, counting(), "dp=2,server=2:async,local=2")
    assert steps == others == [4, 5, 6, 7]
    assert uses(whole) == once(8)


def settings_of(task, text, resume_after):
    """By step, the settings with which this worker made it, last of all; after some steps it goes on from what worker
    0 alone wrote.
    """
    step, found = build(task, Plan.parse(text)), {}
    while step.index < 11:
        (group,) = step.optimizer.param_groups
        found[step.index] = {name: value for name, value in group.items() if name != "params"}
        step()
        if step.index == resume_after:
            step = anew(step, task, text)
            assert step.index == resume_after - resume_after % 4
            resume_after = None
    step.close()
    return found


@pytest.mark.parametrize(
    "scheduler",
    [
        partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=11),  # goes round with Adam's betas, too
        partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.7),  # from the last rate to the next
    ],
)
def test_out_of_lock_step_a_resumed_run_goes_on_by_the_schedule_of_one_that_was_not_stopped(ranks, scheduler):
    task, text = replace(adam_mlp(), scheduler=scheduler), "dp=2,server=2:async,local=4"
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = task.optimizer([parameter])
    plain, schedule = {}, scheduler(optimizer)
    for step in range(11):
        plain[step] = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
        optimizer.step()
        schedule.step()
    for resume_after in (7, 8):
        assert ranks(settings_of, 2, task, text, resume_after) == [plain, plain]
