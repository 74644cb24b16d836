"""Under split sequences each worker finds a part of a norm's gradient: the parts meet in one message per step."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import small
import torch
from plain import Look, Run, plain

import sheaf
from sheaf.plans import Plan

STEPS = 2


def task() -> sheaf.Task:
    return replace(small.SMALL["gpt"](), precision="fp64", clip=0.5)


@functools.cache
def reference() -> Run:
    return plain(task(), STEPS)


def watched(plan: str) -> tuple[Run, list[str], list[str]]:
    """The run; why workers that split layers summed something in it; and what else a step added up among them."""
    torch.manual_seed(torch.distributed.get_rank())
    step, run = sheaf.build(task(), Plan.parse(plan)), Run()
    team, world = step._spread.layers, step._spread.parted
    sums: list[str] = []
    meetings: list[str] = []

    def noted(plain_sum: Any, into: list[str]) -> Any:
        def sum_up(tensor: Any, why: str) -> Any:
            into.append(why)
            return plain_sum(tensor, why)

        return sum_up

    assert team is not None
    team.total, world.all_reduce = noted(team.total, sums), noted(world.all_reduce, meetings)
    step.observe(Look(run))
    for _ in range(STEPS):
        run.losses.append(step().loss)
        run.weights.append({name: value.clone() for name, value in step.full_state().items()})
    run.weights = [{name: value for name, value in one.items() if name in run.gradients[0]} for one in run.weights]
    step.close()
    return run, sums, meetings


@pytest.mark.parametrize(
    "plan", ["tp=2,sequence=1", "tp=2,sequence=1,dp=2,zero=1", "tp=2,sequence=1,pp=2", "tp=3,sequence=1"]
)
@pytest.mark.thinned(2)
def test_norms_and_biases_meet_once_per_step(ranks: Any, plan: str) -> None:
    run, sums, meetings = ranks(watched, Plan.parse(plan).workers, plan)[0]
    same = reference()
    assert run.losses == pytest.approx(same.losses, rel=1e-11)
    for mine, right in zip(run.gradients, same.gradients, strict=True):
        assert mine.keys() == right.keys()
        for name, gradient in mine.items():
            torch.testing.assert_close(gradient, right[name], rtol=1e-9, atol=1e-11, msg=name)
    assert not [why for why in sums if "norm's input" in why or "add's input" in why]
    parts = [what for what in meetings if "parts of the gradients" in what]
    assert len(parts) == STEPS
