"""Models that are awkward to cut into stages compute what plain PyTorch computes, or are refused with the reason."""

import functools
from dataclasses import replace

import pytest
import torch
from odd_stages import ODD, odd
from plain import assert_same, plain, planned
from torch import nn

from pool import RankRaised
from sheaf.errors import NonFiniteLoss, PlanError
from sheaf.parallel.build import refuse
from sheaf.plans import Plan

STEPS = 2


@functools.cache
def reference(name: str):
    return plain(odd(name), STEPS)


@pytest.mark.parametrize(
    ("name", "plan"),
    [(name, "pp=2") for name in ODD]
    + [("in place", "pp=3:gpipe"), ("shared", "pp=4"), ("hidden", "pp=3"), ("shared", "pp=2:zero-bubble")],
)
def test_an_odd_model_computes_the_serial_answer(ranks, name, plan):
    found = ranks(planned, Plan.parse(plan).workers, odd(name), plan, STEPS)[0]
    assert_same(found, reference(name), 1e-11)


def test_as_many_rows_as_a_mask_of_the_batch_picks_cross(ranks):
    task, steps = odd("picked"), 4  # what a stage received in the second step, it is ready for from then on
    assert_same(ranks(planned, 2, task, "pp=2,stages=2:3", steps)[0], plain(task, steps), 1e-11)


@pytest.mark.parametrize("name", ["skips", "dicts", "shared"])
def test_two_stages_a_worker_compute_the_serial_answer(ranks, name):
    assert_same(ranks(planned, 2, odd(name), "pp=2:interleaved", STEPS)[0], reference(name), 1e-11)


def test_a_read_of_a_later_stage_of_the_same_worker_is_refused(ranks):
    with pytest.raises(RankRaised, match=r"before this worker gets to that stage: use .*pp=2:1f1b") as raised:
        ranks(planned, 2, odd("branching"), "pp=2:interleaved", 1)
    assert isinstance(raised.value.exception, PlanError)


def test_a_tensor_that_leaves_a_block_by_an_attribute_is_refused_without_workers():
    with pytest.raises(
        PlanError, match=r"odd_stages.py:\d+ uses .* a tensor that layers.0 computed and did not return"
    ):
        refuse(odd("leaking"), Plan.parse("pp=2"))


def test_fewer_blocks_than_stages_are_refused_without_workers():
    with pytest.raises(PlanError, match="use at most pp="):
        refuse(odd("skips"), Plan.parse("pp=9"))


def test_a_block_that_raises_fails_the_run_and_nobody_hangs(ranks):
    with pytest.raises(RankRaised, match="the block broke"):
        ranks(planned, 2, odd("failing"), "pp=2", 1)


def test_a_loss_that_is_no_number_raises_on_every_worker(ranks):
    def attempt() -> bool:
        task = odd("skips")
        try:
            planned(replace(task, loss=lambda output, batch: output.sum() * float("nan")), "pp=2", 1)
        except NonFiniteLoss:
            return True
        return False

    assert ranks(attempt, 2) == [True, True]


def test_backward_in_two_parts_is_backward():
    from sheaf.parallel.weights import inputs_first

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.GELU(), nn.Linear(7, 3))
    given, gradient = torch.randn(4, 5), torch.randn(4, 3)
    leaf = given.clone().requires_grad_()
    model(leaf).backward(gradient)
    wanted = [leaf.grad, *(parameter.grad for parameter in model.parameters())]
    model.zero_grad()
    fired: list[int] = []
    for place, parameter in enumerate(model.parameters()):
        parameter.register_post_accumulate_grad_hook(lambda _, place=place: fired.append(place))
    again = given.clone().requires_grad_()
    later = inputs_first([model(again)], [gradient], [again])
    assert later is not None
    assert torch.equal(again.grad, wanted[0])
    assert all(parameter.grad is None for parameter in model.parameters())
    later()
    assert all(
        torch.equal(parameter.grad, value) for parameter, value in zip(model.parameters(), wanted[1:], strict=True)
    )
    assert sorted(fired) == list(range(6))


def test_weights_that_a_node_shares_with_one_behind_it_are_not_put_off():
    from sheaf.parallel.weights import inputs_first

    layer, leaf = nn.Linear(4, 4), torch.randn(2, 4, requires_grad=True)
    assert inputs_first([layer(torch.tanh(layer(leaf)))], [torch.ones(2, 4)], [leaf]) is None
    assert leaf.grad is None
