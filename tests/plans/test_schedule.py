"""A pipeline's lists are the textbooks', complete and free of deadlock, and its clock agrees with theory."""

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheaf.errors import PlanError
from sheaf.plans.plan import SCHEDULES
from sheaf.plans.schedule import Action, actions, check, held
from sheaf.plans.timeline import simulate


def read(text):
    """Lists from lines such as ``0F0 0B0``."""
    parsed = [re.findall(r"(\d+)([A-Z])(\d+)", line) for line in text.strip().splitlines()]
    return tuple(tuple(Action(kind, int(mb), int(stage)) for stage, kind, mb in line) for line in parsed)


def made(kind, workers, microbatches, virtual=1):
    return actions(kind, workers=workers, stages=workers * virtual, microbatches=microbatches)


def equal(kind, workers, microbatches, virtual=1, forward=1.0, backward=2.0, weight=1.0):
    stages = workers * virtual
    return simulate(
        made(kind, workers, microbatches, virtual),
        forward_seconds=[forward] * stages,
        backward_seconds=[backward] * stages,
        weight_seconds=[weight] * stages,
    )


TEXTBOOK = {
    "Narayanan et al. 2021, figure 3": (("gpipe", 4, 4, 1), """
        0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3
        1F0 1F1 1F2 1F3 1B0 1B1 1B2 1B3
        2F0 2F1 2F2 2F3 2B0 2B1 2B2 2B3
        3F0 3F1 3F2 3F3 3B0 3B1 3B2 3B3"""),
    "Narayanan et al. 2021, figure 4, top": (("1f1b", 4, 8, 1), """
        0F0 0F1 0F2 0F3 0B0 0F4 0B1 0F5 0B2 0F6 0B3 0F7 0B4 0B5 0B6 0B7
        1F0 1F1 1F2 1B0 1F3 1B1 1F4 1B2 1F5 1B3 1F6 1B4 1F7 1B5 1B6 1B7
        2F0 2F1 2B0 2F2 2B1 2F3 2B2 2F4 2B3 2F5 2B4 2F6 2B5 2F7 2B6 2B7
        3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3 3F4 3B4 3F5 3B5 3F6 3B6 3F7 3B7"""),
    "Narayanan et al. 2021, figure 4, bottom": (("interleaved", 4, 8, 2), """
        0F0 0F1 0F2 0F3 4F0 4F1 4F2 4F3 0F4 0F5 0F6 4B0 0F7 4B1 4F4 4B2 4F5 4B3 4F6 0B0 4F7 0B1 0B2 0B3 4B4 4B5 4B6 4B7
            0B4 0B5 0B6 0B7
        1F0 1F1 1F2 1F3 5F0 5F1 5F2 5F3 1F4 5B0 1F5 5B1 1F6 5B2 1F7 5B3 5F4 1B0 5F5 1B1 5F6 1B2 5F7 1B3 5B4 5B5 5B6 5B7
            1B4 1B5 1B6 1B7
        2F0 2F1 2F2 2F3 6F0 6F1 6F2 6B0 6F3 6B1 2F4 6B2 2F5 6B3 2F6 2B0 2F7 2B1 6F4 2B2 6F5 2B3 6F6 6B4 6F7 6B5 6B6 6B7
            2B4 2B5 2B6 2B7
        3F0 3F1 3F2 3F3 7F0 7B0 7F1 7B1 7F2 7B2 7F3 7B3 3F4 3B0 3F5 3B1 3F6 3B2 3F7 3B3 7F4 7B4 7F5 7B5 7F6 7B6 7F7 7B7
            3B4 3B5 3B6 3B7"""),
    "Qi et al. 2024, figure 3, top": (("zero-bubble", 4, 8, 1), """
        0F0 0F1 0F2 0F3 0B0 0W0 0F4 0B1 0W1 0F5 0B2 0W2 0F6 0B3 0W3 0F7 0B4 0W4 0B5 0W5 0B6 0W6 0B7 0W7
        1F0 1F1 1F2 1B0 1F3 1B1 1W0 1F4 1B2 1W1 1F5 1B3 1W2 1F6 1B4 1W3 1F7 1B5 1W4 1B6 1W5 1B7 1W6 1W7
        2F0 2F1 2B0 2F2 2B1 2F3 2B2 2W0 2F4 2B3 2W1 2F5 2B4 2W2 2F6 2B5 2W3 2F7 2B6 2W4 2B7 2W5 2W6 2W7
        3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3 3W0 3F4 3B4 3W1 3F5 3B5 3W2 3F6 3B6 3W3 3F7 3B7 3W4 3W5 3W6 3W7"""),
    "fewer microbatches than workers": (("1f1b", 3, 2, 1), """
        0F0 0F1 0B0 0B1
        1F0 1F1 1B0 1B1
        2F0 2B0 2F1 2B1"""),
    "a rest that joins the group": (("interleaved", 2, 3, 2), """
        0F0 0F1 0F2 2F0 2F1 2F2 2B0 2B1 2B2 0B0 0B1 0B2
        1F0 1F1 1F2 3F0 3B0 3F1 3B1 3F2 3B2 1B0 1B1 1B2"""),
}  # fmt: skip


@pytest.mark.parametrize(("case", "text"), TEXTBOOK.values(), ids=TEXTBOOK)
def test_lists_are_those_of_the_textbooks(case, text):
    assert made(*case) == read(text.replace("\n            ", " "))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_without_microbatches_there_is_nothing_to_do(kind):
    listed = made(kind, 3, 0)
    assert listed == ((), (), ())
    check(listed, stages=3, microbatches=0)
    timeline = equal(kind, 3, 0)
    assert (timeline.spans, timeline.seconds, timeline.bubble, held(listed)) == ((), 0.0, 0.0, (0, 0, 0))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_worker_alone_takes_one_microbatch_after_the_other(kind):
    (listed,) = made(kind, 1, 2)
    expected = {"gpipe": "0F0 0F1 0B0 0B1", "zero-bubble": "0F0 0B0 0W0 0F1 0B1 0W1"}
    assert listed == read(expected.get(kind, "0F0 0B0 0F1 0B1"))[0]


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("microbatches", [1, 2, 4, 7])
@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
def test_the_bubble_is_what_theory_says(kind, workers, microbatches):
    timeline = equal(kind, workers, microbatches)
    assert timeline.bubble == pytest.approx((workers - 1) / (microbatches + workers - 1))
    assert timeline.seconds == pytest.approx(3 * (microbatches + workers - 1))


@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("more", [0, 1, 2, 3, 5, 8])
@pytest.mark.parametrize("virtual", [1, 2, 3])
def test_interleaving_divides_the_bubble_whatever_the_number_of_microbatches(workers, more, virtual):
    timeline = equal("interleaved", workers, workers + more, virtual)
    assert timeline.bubble == pytest.approx((workers - 1) / (virtual * (workers + more) + workers - 1))


@pytest.mark.parametrize("workers", [2, 3, 6])
@pytest.mark.parametrize("more", [0, 1, 7])
def test_zero_bubble_takes_the_weights_out_of_the_way(workers, more):
    timeline = equal("zero-bubble", workers, workers + more, backward=1.0)
    assert timeline.seconds == pytest.approx(3 * (workers + more) + workers - 1)  # (p-1)(F+B-W), Qi et al., table 2
    assert timeline.seconds < equal("1f1b", workers, workers + more).seconds


def test_how_many_microbatches_each_worker_keeps():
    assert held(made("gpipe", 4, 8)) == (8, 8, 8, 8)
    assert held(made("1f1b", 4, 8)) == (4, 3, 2, 1)
    assert held(made("1f1b", 4, 2)) == (2, 2, 2, 1)
    assert held(made("zero-bubble", 4, 8)) == (4, 4, 4, 4)
    assert held(made("interleaved", 4, 8, 2)) == (11, 9, 7, 5)


@st.composite
def pipelines(draw):
    kind = draw(st.sampled_from(SCHEDULES))
    workers = draw(st.integers(1, 6))
    virtual = draw(st.integers(1, 3)) if kind == "interleaved" else 1
    return kind, workers, draw(st.integers(0, 9)), virtual


@given(pipelines())
def test_every_action_is_done_once_on_its_worker_and_nobody_waits_for_ever(case):
    kind, workers, microbatches, virtual = case
    listed = made(*case)
    check(listed, stages=workers * virtual, microbatches=microbatches)
    kinds = "FBW" if kind == "zero-bubble" else "FB"
    for worker, one in enumerate(listed):
        stages = range(worker, workers * virtual, workers)
        assert Counter(one) == Counter(Action(k, m, s) for k in kinds for s in stages for m in range(microbatches))
        for k in kinds:
            for stage in stages:  # so gradients are added up in the order in which one worker alone adds them
                assert [m for turn, m, s in one if (turn, s) == (k, stage)] == list(range(microbatches))
    assert max(held(listed)) <= microbatches * virtual
    if kind == "zero-bubble":
        assert max(held(listed)) == max(held(made("1f1b", workers, microbatches)))


TIMES = st.floats(0.0, 10.0)


@given(pipelines(), st.data(), TIMES)
def test_the_clock_keeps_to_what_waits_for_what(case, data, transfer):
    kind, workers, microbatches, virtual = case
    stages = workers * virtual
    seconds = {turn: data.draw(st.lists(TIMES, min_size=stages, max_size=stages)) for turn in "FBW"}
    timeline = simulate(
        made(*case),
        forward_seconds=seconds["F"],
        backward_seconds=seconds["B"],
        weight_seconds=seconds["W"] if kind == "zero-bubble" else None,
        transfer_seconds=transfer,
    )
    spans = {span.action: span for span in timeline.spans}
    free = [0.0] * workers
    for span in timeline.spans:
        assert span.start_seconds >= free[span.worker]
        free[span.worker] = span.stop_seconds
        assert span.stop_seconds == span.start_seconds + seconds[span.action.kind][span.action.stage]
    hop = transfer if workers > 1 else 0.0
    for (turn, microbatch, stage), span in spans.items():
        if turn == "F" and stage:
            assert span.start_seconds >= spans[Action("F", microbatch, stage - 1)].stop_seconds + hop
        elif turn == "B":
            assert span.start_seconds >= spans[Action("F", microbatch, stage)].stop_seconds
            if stage < stages - 1:
                assert span.start_seconds >= spans[Action("B", microbatch, stage + 1)].stop_seconds + hop
        elif turn == "W":
            assert span.start_seconds >= spans[Action("B", microbatch, stage)].stop_seconds
    turns = "FBW" if kind == "zero-bubble" else "FB"
    busy = [microbatches * sum(sum(seconds[turn][worker::workers]) for turn in turns) for worker in range(workers)]
    there_and_back = sum(seconds["F"]) + sum(seconds["B"]) + 2 * hop * (stages - 1)
    path = there_and_back if microbatches else 0.0
    assert timeline.seconds >= max(*busy, path) - 1e-9
    assert 0 <= timeline.bubble <= 1
    if timeline.seconds:
        assert timeline.bubble == pytest.approx(1 - sum(busy) / (workers * timeline.seconds), abs=1e-9)
    assert timeline.rows == tuple((s.worker, *s.action, s.start_seconds, s.stop_seconds) for s in timeline.spans)


def test_the_slowest_stage_sets_the_pace_and_transfers_are_waited_for():
    listed = made("1f1b", 2, 2)
    timeline = simulate(listed, forward_seconds=[1.0, 3.0], backward_seconds=[1.0, 5.0], transfer_seconds=0.5)
    assert [(str(span.action), span.start_seconds, span.stop_seconds) for span in timeline.spans if span.worker] == [
        ("1F0", 1.5, 4.5), ("1B0", 4.5, 9.5), ("1F1", 9.5, 12.5), ("1B1", 12.5, 17.5),
    ]  # fmt: skip
    assert timeline.seconds == 19.0
    assert timeline.bubble == pytest.approx(1 - 20 / 38)


def test_forwards_alone_have_a_clock_too():
    listed = tuple(tuple(action for action in one if action.kind == "F") for one in made("gpipe", 2, 3))
    assert simulate(listed, forward_seconds=[1.0, 1.0], backward_seconds=[]).seconds == 4.0


def test_a_deadlock_names_who_is_stuck_at_what_and_what_that_waits_for():
    first, second = made("1f1b", 2, 2)
    turned = (first, (second[2], second[1], second[0], second[3]))  # a backward before its forward
    with pytest.raises(PlanError) as caught:
        check(turned)
    waits, fault = caught.value.broken
    assert waits == (
        "worker 0 is stuck at its action 2, the backward of microbatch 0 at stage 0: it waits for the backward of "
        "microbatch 0 at stage 1 on worker 1; list that earlier"
    )
    assert fault == (
        "worker 1 is stuck at its action 1, the backward of microbatch 0 at stage 1: it waits for the forward of "
        "microbatch 0 at stage 1 on worker 1; list that earlier"
    )
    with pytest.raises(PlanError, match="worker 0 is stuck"):
        simulate(turned, forward_seconds=[1.0] * 2, backward_seconds=[1.0] * 2)


def test_a_short_last_group_would_deadlock():
    """Why the rest joins the groups: with 5 workers, Megatron's order of 5 + 2 microbatches never ends."""
    order = [(turn, microbatch) for group in (range(5), range(5, 7)) for turn in range(2) for microbatch in group]
    listed = []
    for worker in range(5):
        forwards = [Action("F", microbatch, 5 * turn + worker) for turn, microbatch in order]
        backwards = [Action("B", microbatch, 5 * (1 - turn) + worker) for turn, microbatch in order]
        warmup = 2 * (4 - worker) + 5
        one = forwards[:warmup]
        for pair in zip(forwards[warmup:], backwards, strict=False):
            one += pair
        listed.append(tuple(one + backwards[max(0, 14 - warmup) :]))
    with pytest.raises(PlanError, match="worker 0 is stuck"):
        check(listed)
    check(made("interleaved", 5, 7, 2))


@given(pipelines().filter(lambda case: case[2]), st.data())
def test_what_is_missing_doubled_or_misplaced_is_found(case, data):
    _, workers, microbatches, virtual = case
    listed = made(*case)
    worker = data.draw(st.integers(0, workers - 1))
    place = data.draw(st.integers(0, len(listed[worker]) - 1))
    one = listed[worker]

    def refused(changed, words):
        with pytest.raises(PlanError, match=re.escape(words)):
            check(
                (*listed[:worker], changed, *listed[worker + 1 :]), stages=workers * virtual, microbatches=microbatches
            )

    said = one[place].said
    rest = (*one[:place], *one[place + 1 :])
    if one[place].kind != "W" or sum(action.kind == "W" for given in listed for action in given) > 1:
        refused(rest, f"worker {worker} lacks the {said}")  # without any W, B does all
    refused((*one, one[place]), f"{said} is listed 2 times")
    if workers > 1:
        astray = one[place]._replace(stage=one[place].stage + 1)
        refused((*one[:place], astray, *one[place + 1 :]), f"belongs to worker {(worker + 1) % workers}")
    refused((*one, Action("X", 0, worker)), "is no F, B or W")
    refused((*one, Action("F", microbatches, worker)), f"beyond {workers * virtual} stages and {microbatches} micro")


def test_a_list_shorter_than_asked_for_is_incomplete():
    listed = made("gpipe", 2, 2)
    check(listed)
    with pytest.raises(PlanError, match="lacks the forward of microbatch 2 at stage 0"):
        check(listed, microbatches=3)
    with pytest.raises(PlanError, match="worker 0 lacks the forward of microbatch 0 at stage 2"):
        check(listed, stages=3)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("1f1", 2, 2, 1), "did you mean 1f1b?"),
        (("1f1b", 0, 0, 1), "at least one is needed"),
        (("gpipe", 2, 2, -1), "there cannot be less than none"),
        (("1f1b", 2, 4, 1), "only interleaved has more"),
        (("interleaved", 2, 3, 1), "do not go round 2 workers"),
        (("interleaved", 4, 2, 1), "do not go round 4 workers"),
    ],
)
def test_impossible_pipelines_are_refused(asked, words):
    kind, workers, stages, microbatches = asked
    with pytest.raises(PlanError, match=re.escape(words)):
        actions(kind, workers=workers, stages=stages, microbatches=microbatches)


def test_the_seconds_of_weights_are_asked_for():
    with pytest.raises(PlanError, match="give weight_seconds"):
        simulate(made("zero-bubble", 2, 2), forward_seconds=[1.0] * 2, backward_seconds=[1.0] * 2)


def test_messages_of_one_worker_in_one_direction_arrive_one_after_another():
    listed = made("gpipe", 2, 3)
    timeline = simulate(listed, forward_seconds=[1.0, 1.0], backward_seconds=[2.0, 2.0], transfer_seconds=4.0)
    forwards = [span.start_seconds for span in timeline.spans if span.worker and span.action.kind == "F"]
    assert forwards == [5.0, 9.0, 13.0], "the link takes longer than a stage, and carries one at a time"
    backwards = [span.start_seconds for span in timeline.spans if not span.worker and span.action.kind == "B"]
    assert backwards == [20.0, 24.0, 28.0], "there and back at once: links carry both ways"
