"""Replicas that step alone and are several workers each: split layers, stages, and what of both is shared."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from plain import assert_same, copies_agree, norm_resnet, plain, planned, ragged_gpt

from sheaf.parallel import build
from sheaf.plans import Plan

gpt = partial(ragged_gpt, batch=6)  # three microbatches for two replicas
SGD = {"optimizer": partial(torch.optim.SGD, lr=0.05), "clip": None, "scheduler": None}


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("make", "plan"),
    [
        (gpt, "dp=2,tp=2"),
        (gpt, "dp=2,pp=2,shares=2:1"),  # its embedding is of two stages
        (norm_resnet, "dp=2,tp=2"),
        (norm_resnet, "dp=2,pp=2:interleaved"),
    ],
)
def test_with_one_step_between_meetings_and_plain_sgd_it_is_the_serial_answer(ranks, make, plan):
    task = make(**SGD, precision="fp64")
    assert_same(ranks(planned, 4, task, plan + ",local=1", 2)[0], plain(task, 2), 1e-10)


def trained(task, text, steps):
    """Losses, norms and whole weights under a plan; and whether copies of what several workers hold are the same."""
    step = build(task, Plan.parse(text))
    reports = [step() for _ in range(steps)]
    whole = step.full_state()
    alike = copies_agree(step)
    step.close()
    return [(report.loss, report.gradient_norm) for report in reports], whole, alike


@pytest.mark.thinned(7)  # diloco with tp=2, and ring with pp=2
@pytest.mark.parametrize(
    "local", ["2:diloco:fragments=2:overlap=1", "3:after=1", "2:adasum", "2:ring"], ids=lambda text: text.split(":")[1]
)
@pytest.mark.parametrize("mesh", ["tp=2", "pp=2"])
def test_a_replica_of_several_workers_is_a_replica(ranks, mesh, local):
    task = gpt(**SGD | {"clip": 0.3}, precision="fp64")
    wanted = ranks(trained, 2, task, f"dp=2,local={local}", 5)[0]
    found = ranks(trained, 4, task, f"dp=2,{mesh},local={local}", 5)
    for (loss, norm), (other, other_norm) in zip(found[0][0], wanted[0], strict=True):
        assert loss == pytest.approx(other, rel=1e-9)
        assert norm == pytest.approx(other_norm, rel=1e-9)
    for name, value in wanted[1].items():
        torch.testing.assert_close(found[0][1][name], value, rtol=1e-8, atol=1e-10)
    assert all(row[2] for row in found), "copies within a replica came apart"


def resumed(task, text):
    """What comes of a fourth step: of a run that never stopped, and of another that has loaded the state before it."""
    first, again = (build(task, Plan.parse(text)) for _ in range(2))
    for _ in range(3):
        first()
    tensors, values = first.state()
    kept = {name: value.clone() for name, value in tensors.items()}
    ends = []
    for step in (first, again):
        if step is again:
            step.load(kept, values)
        report = step()
        ends.append(((report.loss, report.gradient_norm), step.full_state()))
        step.close()
    return ends


@pytest.mark.parametrize("plan", ["dp=2,tp=2,local=3:diloco", "dp=2,pp=2,local=2:slowmo,compress=int8"])
def test_it_goes_on_from_a_checkpoint_to_the_bit(ranks, plan):
    (told, whole), (again, other) = ranks(resumed, 4, gpt(), plan)[0]
    assert told == again
    assert whole.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in whole.items())


@pytest.mark.thinned(3)
@pytest.mark.parametrize("plan", ["tp=2,compress=topk:0.1", "pp=2,compress=int8", "tp=2,local=2:diloco,compress=int8"])
def test_what_coding_loses_is_the_same_on_all_copies(ranks, plan):
    task = replace(gpt(), clip=None)
    found = ranks(trained, 4, task, f"dp=2,{plan}", 4)
    assert all(row[2] for row in found), "copies within a replica came apart"
    exact = ranks(trained, 2, task, "dp=2", 4)[0]
    assert 0 < abs(found[0][0][-1][0] / exact[0][-1][0] - 1) < 0.05
