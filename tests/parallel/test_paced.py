"""Workers by their own pace: meetings that some miss, steps by speed, backup workers. Who is late is decided here."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from plain import assert_same, mlp_float64, norm_resnet, plain, planned
from test_local import Played, adam_mlp, run, sgd_mlp
from torch import nn

from sheaf.errors import PlanError, WorkerFailed
from sheaf.parallel import build, refuse
from sheaf.parallel.board import Board
from sheaf.parallel.supply import Supply
from sheaf.plans import Plan


@pytest.mark.parametrize(
    ("make", "plan"),
    [
        (adam_mlp, "dp=2,local=1:backup:quorum=2"),
        (partial(mlp_float64, clip=0.1), "dp=3,shares=2:1:1,local=1:backup:quorum=3"),
    ],
)
def test_when_all_are_there_it_is_the_serial_answer(ranks, make, plan):
    assert_same(ranks(planned, int(plan[3]), make(), plan, 4)[0], plain(make(), 4), 1e-11)


def test_when_all_are_there_local_steps_are_those_without_a_quorum(ranks):
    for settings in ("local=3:diloco", "local=2:slowmo", "local=1"):
        wanted = ranks(run, 2, adam_mlp(), "dp=2," + settings, steps=6)
        for more in (":quorum=2", ":steps=speed:quorum=2")[: 1 + (settings != "local=1")]:
            task = adam_mlp()
            found = ranks(run, 2, task, "dp=2," + settings + more, steps=2 if "speed" in more else 6)
            for worker in range(2):
                for one, other in zip(found[worker][1], wanted[worker][1], strict=False):
                    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def until_closed(step, meeting):
    while step._board.closed(meeting) is None:
        pass


def with_one_late(text, steps, misses, resume_at=None):
    """Three workers, of whom the last comes late to the first meeting, and begins only after those it ``misses``; for
    every other the quorum is three.
    """
    step = build(adam_mlp(), Plan.parse(text))
    every = step.plan.meets_locally.every
    reports, weights = [], []
    meet = step._meet

    def late(meeting, *told):
        if step.rank == 2 and meeting == 0:
            until_closed(step, 0)
        return meet(meeting, *told)

    step._meet = late
    for index in range(steps):
        if index == resume_at:  # with what the last worker carries
            tensors, values = step.state()
            tensors = {name: value.clone() for name, value in tensors.items()}
            step.close()
            step = build(adam_mlp(), Plan.parse(text))
            step.load(tensors, values)
        meeting, turn = divmod(index, every)
        if turn == 0 and meeting not in misses:
            dist.barrier()
        if step.rank == 2 and meeting in misses and turn == 0:
            until_closed(step, max(misses))
        step._board._quorum = 2 if meeting in (0, *misses) else 3
        reports.append(step())
        weights.append(nn.utils.parameters_to_vector(step.model.parameters()).detach().clone())
    whole = step.full_state()
    step.close()
    return reports, weights, whole


def test_a_late_worker_is_not_waited_for_and_its_part_is_in_the_next_meeting(ranks):
    found = ranks(with_one_late, 3, "dp=3,local=2:quorum=2", 4, ())
    played = Played(adam_mlp(), (1, 1, 1))
    start = played.weights(0)
    played.step(0)
    played.step(1)
    first, seen = [start - played.weights(worker) for worker in range(3)], list(played.seen)
    anchor = start - (first[0] * seen[0] + first[1] * seen[1]) / (seen[0] + seen[1])
    for worker in range(2):
        torch.testing.assert_close(found[worker][1][1], anchor, rtol=1e-11, atol=1e-12)
    for worker in range(3):
        played.put(worker, anchor)
    played.seen = [0.0] * 3
    played.step(2)
    played.step(3)
    second = [anchor - played.weights(worker) for worker in range(3)]
    total = sum(second[worker] * played.seen[worker] for worker in range(3)) + first[2] * seen[2]
    anchor = anchor - total / (sum(played.seen) + seen[2])
    for worker in range(3):
        torch.testing.assert_close(found[worker][1][3], anchor, rtol=1e-11, atol=1e-12)
    told = [row[0] for row in found]
    assert [told[0][step].meeting.get("present") for step in range(4)] == [None, 2, None, 3]
    assert told[2][3].meeting["late"] == 1
    assert told[2][3].meeting["missed"] == told[2][3].meeting["dropped"] == 0
    assert told[0][3].meeting["weight"] == sum(played.seen) + seen[2]
    resumed = ranks(with_one_late, 3, "dp=3,local=2:quorum=2", 4, (), resume_at=2)
    for one, other in zip(found, resumed, strict=True):
        assert torch.equal(one[1][3], other[1][3])
        assert one[0][3].meeting["late"] == other[0][3].meeting["late"]


def test_a_late_worker_may_be_dropped_and_misses_what_others_have_done(ranks):
    found = ranks(with_one_late, 3, "dp=3,local=2:diloco:quorum=2:late=drop", 10, (1, 2, 3))
    told = [row[0] for row in found]
    assert [told[0][step].meeting["absent"] for step in range(1, 10, 2)] == [1, 1, 1, 1, 0]
    last = told[2][9].meeting
    assert last["late"] == 1
    assert last["dropped"] == told[2][0].samples + told[2][1].samples > 0
    assert [report.samples for report in told[2][2:8]] == [0] * 6
    assert last["returned"] == told[0][9].meeting["returned"] >= last["missed"] + last["dropped"] > 0
    for worker in range(3):
        assert torch.equal(found[worker][1][9], found[0][1][9])


def used(text, meetings, misses, late):
    """The samples that this worker's part of some meeting brought, with their step; how many wait at the end.

    The last of three workers is late for the meetings ``late``, and begins those of ``misses`` when they are over.
    """
    step = build(adam_mlp(), Plan.parse(text))
    every = step.plan.meets_locally.every
    brought, carried = [], []
    alone, meet = step._alone, step._meet

    def noted(number, microbatches):
        carried.extend((number, sample) for microbatch in microbatches for sample in microbatch.samples)
        return alone(number, microbatches)

    def come(meeting, *told):
        if step.rank == 2 and meeting in late:
            until_closed(step, meeting)
        closed, norm = meet(meeting, *told)
        if step.rank in closed.told:
            brought.extend(carried)
        if step.rank in closed.told or step.plan.meets_locally.late == "drop":
            carried.clear()
        return closed, norm

    step._alone, step._meet = noted, come
    for meeting in range(meetings):
        if step.rank == 2 and meeting in misses:
            until_closed(step, meeting)
        step._board._quorum = 2 if meeting in (*misses, *late) else 3
        report = [step() for _ in range(every)][-1]
    step.close()
    return brought, report.meeting["waiting"]


@pytest.mark.parametrize(
    ("plan", "meetings", "misses", "late"),
    [
        ("dp=3,local=1:backup:quorum=2", 8, (4, 5), (1,)),
        ("dp=3,local=4:quorum=2", 5, (1,), (3,)),
        ("dp=3,local=2:diloco:quorum=2:late=drop", 5, (1,), (2,)),
    ],
)
def test_what_a_late_worker_was_dealt_is_used_once_by_whoever_is_there(ranks, plan, meetings, misses, late):
    found = ranks(used, 3, plan, meetings, misses, late)
    counted = sorted(one for brought, _ in found for one in brought)
    assert {waiting for _, waiting in found} == {0}, "three parts came back, one for each worker"
    order = Played(adam_mlp(), (1,)).order
    steps = 1 + max(step for step, _ in counted)
    assert steps < meetings * Plan.parse(plan).meets_locally.every, "what came back took the place of new steps"
    dealt = [(step, one) for step in range(steps) for microbatch in order.step(step) for one in microbatch.samples]
    assert counted == sorted(dealt)


def test_what_waits_is_kept_in_checkpoints_and_the_larger_parts_go_to_larger_shares():
    order = Played(adam_mlp(), (1,)).order
    first, second = Supply(order, (2, 1)), Supply(order, (2, 1))
    for place in (0, 1):  # the second worker's part comes back, then the first's
        dealt = first.dealt(1)
        first.settle(dealt, [part.number for part, taker in dealt if taker != place], present=[place])
    second.restore(json.loads(json.dumps(first.kept())))
    assert second.waiting == first.waiting == [1, 2]
    assert second.waiting_samples == second.returned == sum(second.part(number).samples for number in (1, 2))
    again = second.dealt(2)
    assert [(part.number, taker) for part, taker in again] == [(1, 1), (2, 0), (4, 0), (5, 1)]
    second.settle(again, [], present=[0, 1])
    assert (second.waiting, second.next_step) == ([], 3)


def test_all_stop_at_the_same_step(ranks):
    def asked():
        step = build(sgd_mlp(), Plan.parse("dp=2,local=2:quorum=2"))
        if step.rank == 1:
            step.request_stop()
        stops = [step().stop for _ in range(4)]
        step.close()
        return stops

    assert ranks(asked, 2) == [[False, True, False, True]] * 2


def test_backup_workers_make_the_step_without_the_last(ranks):
    found = ranks(with_one_late, 3, "dp=3,local=1:backup:quorum=2", 4, (2,))
    played = Played(adam_mlp(), (1, 1, 1))
    task = adam_mlp()
    model, optimizer = played.models[0], played.optimizers[0]
    from sheaf.plans.layout import apportion

    for step in range(4):
        microbatches = played.order.step(step)
        counts = apportion(len(microbatches), (1, 1, 1))
        present = microbatches if step in (1, 3) else microbatches[: counts[0] + counts[1]]
        model.zero_grad()
        for microbatch in present:
            batch = torch.utils.data.default_collate([task.data[i] for i in microbatch.samples])
            (task.loss(model(batch[0].double()), batch) * len(microbatch.samples)).backward()
        samples = sum(len(microbatch.samples) for microbatch in present)
        for parameter in model.parameters():
            parameter.grad /= samples
        optimizer.step()
        for worker in range(2 if step in (0, 2) else 3):
            torch.testing.assert_close(found[worker][1][step], played.weights(0), rtol=1e-10, atol=1e-11)
        assert found[0][0][step].samples == samples
    assert found[2][0][3].meeting["dropped"] > 0
    assert found[2][0][3].meeting["missed"] > 0


def test_a_faster_worker_makes_more_of_the_steps(ranks):
    def trained():
        step = build(sgd_mlp(), Plan.parse("dp=2,local=4:steps=speed"))
        told = []
        for index in range(8):
            report = step()
            if index % 4 == 3:  # what it measured: the first worker is three times as fast
                for worker, seconds in enumerate((1.0, 3.0)):
                    step._took[worker].clear()
                    step._took[worker].append(seconds)
            told.append(report.samples)
        weights = nn.utils.parameters_to_vector(step.model.parameters()).detach().clone()
        step.close()
        return told, weights

    fast, slow = ranks(trained, 2)
    dealt = [sum(len(m.samples) for m in Played(sgd_mlp(), (1,)).order.step(step)) for step in range(8)]
    assert sum(fast[0]) + sum(slow[0]) == sum(dealt), "each sample once"
    assert sum(fast[0][4:]) > 2 * sum(slow[0][4:]) > 0
    assert torch.equal(fast[1], slow[1])


@pytest.mark.parametrize(
    "settings", ["local=3:diloco:quorum=2", "local=2:quorum=1:grace=60", "local=1:backup:quorum=2", "local=2:quorum=2"]
)
def test_a_run_that_stops_and_goes_on_is_the_same_run(ranks, settings):
    whole = ranks(run, 2, adam_mlp(), "dp=2," + settings, steps=5)
    resumed = ranks(run, 2, adam_mlp(), "dp=2," + settings, steps=5, resume_after=4)
    for one, other in zip(whole, resumed, strict=True):
        assert one[0] == other[0]
        assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def test_running_statistics_meet_as_means(ranks):
    def trained():
        step = build(replace(norm_resnet(), batch=8), Plan.parse("dp=2,local=2:quorum=2"))
        step()
        apart = {name: value.clone() for name, value in step.model.named_buffers()}
        step()
        met = {name: value.clone() for name, value in step.model.named_buffers()}
        step.close()
        return apart, met

    one, other = ranks(trained, 2)
    moved = [name for name in one[0] if name.endswith("running_mean")]
    assert any(not torch.equal(one[0][name], other[0][name]) for name in moved)
    assert all(torch.equal(one[1][name], other[1][name]) for name in moved)


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self):
        self.now, self.then = 0.0, {}

    def __call__(self):
        return self.now

    def pause(self, _seconds):
        self.now += 1.0
        for when in [when for when in self.then if when <= self.now]:
            self.then.pop(when)()


def boards(clock, workers=3, quorum=2, grace=5.0):
    store = dist.HashStore()
    return [
        Board(store, "test", rank, workers, quorum=quorum, grace_seconds=grace, timeout_seconds=50, clock=clock,
              pause=clock.pause)
        for rank in range(workers)
    ]  # fmt: skip


def test_a_meeting_waits_for_its_grace_and_no_longer():
    for third, present in ((4.0, (0, 1, 2)), (30.0, (0, 1))):
        clock = Clock()
        one, two, three = boards(clock)
        two._store.set("test/0/worker1", "{}")  # the second is there already
        [two._store.add(f"test/0/{what}", 1) for what in ("count", "brought")]
        clock.then[third] = lambda three=three: (
            three._store.set("test/0/worker2", "{}"), three._store.add("test/0/count", 1)
        )  # fmt: skip
        assert one.arrive(0, {"weight": 2}).present == present
        assert clock.now == min(third, 5.0)
        assert three.closed(0).present == present


def test_nobody_can_change_who_was_there():
    clock = Clock()
    one, _, three = boards(clock, quorum=1, grace=0.0)
    assert one.arrive(0, {}).present == (0,)
    assert three.arrive(0, {}).present == (0,)
    assert three._close(0).present == (0,)


def test_an_outcome_stays_until_the_others_are_further():
    clock = Clock()
    one, _, three = boards(clock)
    big = bytes(range(256)) * 40_000
    one.post(0, big)
    assert three.outcome(0) == big
    one.post(2, b"next")
    assert three.outcome(0) is None
    assert three.outcome(2) == b"next"


def test_too_few_workers_end_the_run_with_a_reason():
    with pytest.raises(WorkerFailed, match="only 1 of 3 workers came to meeting 7 within 50 s, and 2 are needed"):
        boards(Clock())[0].arrive(7, {})


def test_a_schedule_that_looks_at_the_loss_is_refused(ranks):
    task, plan = replace(sgd_mlp(), scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau), "dp=2,local=2:quorum=1"
    with pytest.raises(PlanError, match="ReduceLROnPlateau looks at the loss of all workers"):
        refuse(task, Plan.parse(plan))

    def built():
        hidden = replace(task, scheduler=lambda over: task.scheduler(over) if over.param_groups[0]["lr"] < 1 else None)
        with pytest.raises(PlanError, match="ReduceLROnPlateau looks at the loss of all workers"):
            build(hidden, Plan.parse(plan))
        return True

    assert all(ranks(built, 2))
