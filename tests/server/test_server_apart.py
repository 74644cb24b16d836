"""Servers on workers of their own: nothing of the model on them, and checkpoints that go on with other shards."""

from dataclasses import replace

import pytest
import torch
from plain import mlp_float64, ragged_gpt
from torch._subclasses.fake_tensor import FakeTensor

from sheaf import checkpoint
from sheaf.errors import PlanError
from sheaf.parallel import build
from sheaf.plans import Plan


def going_on(given, plan, steps, folder, saves):
    """Go on from the newest checkpoint in a folder, if there is one; save at the end; the weights then."""
    step = build(given, Plan.parse(plan))
    if (path := checkpoint.latest(folder).path) is not None:
        checkpoint.load(step, path)
    first = step.index
    losses = [step().loss for _ in range(steps)]
    if saves:
        checkpoint.save(step, folder)
    whole = {name: value.clone() for name, value in step.full_state().items()}
    held = [sorted({piece.name for piece in host.shard.form.pieces}) for host in step.hosts]
    empty = all(isinstance(value, FakeTensor) for value in step.model.parameters())
    step.close()
    return first, losses, whole, held, empty


def test_a_checkpoint_goes_on_with_other_shards_elsewhere_to_the_last_bit(ranks, tmp_path):
    given = replace(ragged_gpt(), precision="fp32", clip=None)
    _, losses, wanted, _, _ = ranks(going_on, 2, given, "dp=2,server=2", 6, tmp_path / "none", False)[0]
    found, first = [], 0
    for plan in ("dp=2,server=2", "dp=2,server=3:apart", "dp=2,server=1"):
        told = ranks(going_on, Plan.parse(plan).workers, given, plan, 2, tmp_path, True)
        assert [one[0] for one in told] == [first] * len(told)
        first += 2
        found += told[0][1]
        assert all(one[1] == told[0][1] for one in told), "who only serves was told the same losses"
        if "apart" in plan:
            assert [bool(one[3]) for one in told] == [False, False, True, True, True]
            assert [one[4] for one in told] == [False, False, True, True, True], "only pieces are held there"
    assert found == losses
    assert all(torch.equal(told[0][2][name], value) for name, value in wanted.items())


def test_too_few_workers_for_those_that_serve_are_counted(ranks):
    def refused(given):
        with pytest.raises(PlanError) as caught:
            build(given, Plan.parse("dp=2,server=1:apart"))
        return str(caught.value)

    wanted = "is for 3 workers (2 that compute, 1 that only serve) and 2 are here"
    assert all(wanted in told for told in ranks(refused, 2, mlp_float64()))
