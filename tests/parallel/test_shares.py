"""Who is dealt how much when workers are not alike."""

import pathlib
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain import mlp_float64
from torch import nn

import sheaf
from sheaf.parallel.shares import REMEMBERED, Balanced, Stolen
from sheaf.plans import Plan
from sheaf.plans.layout import lifted


class Slowed(nn.Module):
    """Takes its time on one worker; time passes there only while the worker computes, and here."""

    slept_seconds = 0.0

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(12, 5)

    def forward(self, inputs):
        if torch.distributed.get_rank() == 1:
            Slowed.slept_seconds += 0.03
        return self.inner(inputs)


def counted(text, steps):
    clock, time.perf_counter = time.perf_counter, lambda: time.process_time() + Slowed.slept_seconds
    try:
        step = sheaf.build(replace(mlp_float64(batch=45), model=Slowed), Plan.parse(text))
        reports = [step() for _ in range(steps)]
        step.close()
    finally:
        time.perf_counter = clock
    return [report.microbatches for report in reports], [report.computed for report in reports]


@pytest.mark.parametrize("text", ["dp=2,shares=balanced", "dp=2,zero=2,shares=balanced"])
def test_a_slow_worker_is_dealt_less_after_the_first_step(ranks, text):
    (counts, computed), (others, _) = ranks(counted, 2, text, 4)
    assert counts == others, "all workers must deal alike"
    assert counts[0] == (8, 7)
    assert all(fast > slow for fast, slow in counts[2:])
    assert all(sum(step) == 15 and min(step) >= 1 for step in counts)
    assert all(slow > 0.02 for _, slow in computed)


class Even(Slowed):
    """Takes as long on every worker."""

    def forward(self, inputs):
        Slowed.slept_seconds += 1 / 32
        return self.inner(inputs)


class SlowUpdate(torch.optim.SGD):
    """Takes as long as ten microbatches on one worker."""

    def step(self, closure=None):
        if torch.distributed.get_rank() == 1:
            Slowed.slept_seconds += 10 / 32
        return super().step(closure)


def updated(text, steps):
    clock, time.perf_counter = time.perf_counter, lambda: Slowed.slept_seconds  # nothing else takes time
    try:
        given = replace(mlp_float64(batch=45), model=Even, optimizer=lambda parameters: SlowUpdate(parameters, lr=0.1))
        step = sheaf.build(given, Plan.parse(text))
        reports = [step() for _ in range(steps)]
        step.close()
    finally:
        time.perf_counter = clock
    return [report.microbatches for report in reports], [report.terms for report in reports]


@pytest.mark.parametrize(
    ("text", "dealt"),
    [
        ("dp=2,shares=balanced", (13, 2)),  # done at 13/32 s and, 10 of them for the update before, at 12/32
        ("dp=2,zero=1,shares=balanced", (8, 7)),  # both begin when both have updated
    ],
)
def test_who_updates_slowly_is_dealt_less_where_the_others_do_not_wait_for_that(ranks, text, dealt):
    (counts, _), (others, terms) = ranks(updated, 2, text, 4)
    assert counts == others == [(8, 7), (8, 7), dealt, dealt], "an update is known with the step after it"
    assert terms[-1]["compute"] == dealt[1] / 32
    assert terms[-1]["optimizer"] == 10 / 32


class Normed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(12, 5), nn.BatchNorm1d(5))


class UpdateAfterTheOther(torch.optim.SGD):
    """On worker 1 it ends when worker 0 has returned from its step."""

    returned = pathlib.Path()

    def step(self, closure=None):
        until = time.monotonic() + 30
        while torch.distributed.get_rank() == 1 and not self.returned.exists():
            assert time.monotonic() < until, "worker 0 waits for this update"
            time.sleep(0.01)
        return super().step(closure)


def one_after_the_other(text, returned):
    UpdateAfterTheOther.returned = pathlib.Path(returned)
    given = replace(
        mlp_float64(batch=45),
        model=Normed,
        clip=1.0,
        optimizer=lambda parameters: UpdateAfterTheOther(parameters, lr=0.1),
    )
    step = sheaf.build(given, Plan.parse(text))
    step()
    pathlib.Path(returned).touch()
    step()  # for which both wait
    step.close()
    return step.model[1].running_mean.tolist()


@pytest.mark.parametrize("text", ["dp=2", "dp=2,shares=stolen", "dp=2,compress=int8"])
def test_a_worker_goes_on_though_another_still_updates_also_with_batch_statistics(ranks, text, tmp_path):
    first, second = ranks(one_after_the_other, 2, text, str(tmp_path / "returned"))
    assert first == second


def test_speeds_are_medians_of_the_last_steps():
    dealer = Balanced(2, 0)
    assert dealer.counts(8) == (4, 4)
    dealer.learn([1.0, 3.0], [4, 4])
    assert dealer.counts(8) == (6, 2)
    for _ in range(REMEMBERED // 2):
        dealer.learn([100.0, 3.0], [4, 4])  # a hiccup
    assert dealer.counts(8)[0] < 6
    for _ in range(REMEMBERED):
        dealer.learn([4.0, 4.0], [4, 4])
    assert dealer.counts(8) == (4, 4)


def test_nobody_is_forgotten():
    dealer = Balanced(3, 0)
    dealer.learn([0.1, 0.1, 100.0], [3, 3, 3])
    assert dealer.counts(9)[2] == 1
    assert dealer.counts(2) == (1, 1, 0)
    dealer.learn([0.1, 0.1, 0.0], [4, 4, 0])  # who had nothing is not timed
    assert dealer.counts(9)[2] == 1
    assert lifted((9, 0, 0), 1) == (7, 1, 1)


class Drawn:
    """A counter of one process."""

    def __init__(self):
        self.number = 0

    def add(self, _key, amount, /):
        self.number += amount
        return self.number

    def delete_key(self, _key, /):
        return True


@given(
    st.lists(st.floats(0.1, 10.0), min_size=1, max_size=5),
    st.integers(1, 30),
    st.randoms(use_true_random=False),
)
def test_each_microbatch_is_stolen_once_whoever_leaves_some_to_others(paces, count, random):
    counter, taken = Drawn(), []

    def working(rank):
        dealer = Stolen(counter, "it", len(paces), rank)
        dealer.learn(paces, [1] * len(paces))
        for microbatch, last in dealer.deal(0, range(count)):
            taken.append(microbatch)
            yield
            last()
            yield

    workers = [working(rank) for rank in range(len(paces))]
    while workers:  # in any order at all: they may be as fast as they like, whatever they were
        worker = random.choice(workers)
        if next(worker, "over") == "over":
            workers.remove(worker)
    assert sorted(taken) == list(range(count))


def test_a_slow_worker_leaves_the_last_microbatch_to_a_faster_one():
    def taken(paces, drawn, *more):
        counter = Drawn()
        dealer = Stolen(counter, "it", 2, 1)
        for each in [paces, paces, *more] if paces else ():
            dealer.learn(each, [1, 1])
        mine = dealer.deal(0, range(8))
        first, _ = next(mine)
        counter.number = drawn
        return first, next(mine, (None, None))[0]

    assert taken(None, 7) == (0, 7), "nobody knows in the first step"
    assert taken([1.0, 2.3], 7) == (0, None)
    assert taken([1.0, 2.3], 6) == (0, 6)
    assert taken([1.0, 2.3], 7, (1.0, 1.1)) == (0, 7), "it stalled in other steps, and is not slow"
    assert taken([1.0, 1.4], 7) == (0, 7)
    assert taken([2.3, 1.0], 7) == (0, 7)
    assert taken([1.0, 9.0], 1) == (0, None), "it has the first all the same, or nobody would see it become faster"
