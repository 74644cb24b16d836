"""Every schedule, alone and with all else that a plan can say, computes what plain PyTorch computes."""

import functools
from dataclasses import replace

import pytest
import torch
from plain import Look, Run, assert_same, mlp_float64, norm_resnet, plain, planned, ragged_gpt
from small import SMALL

from sheaf.parallel import build
from sheaf.plans import Plan

STEPS = 2
TASKS = {
    "mlp": mlp_float64,
    "gpt": lambda: replace(ragged_gpt(), precision="fp64"),
    "resnet": lambda: replace(norm_resnet(), precision="fp64"),
}
PLANS = {
    "mlp": ["pp=2:gpipe", "pp=4", "dp=2,pp=2,zero=2"],
    "gpt": [
        "pp=2:1f1b",
        "pp=2:interleaved",
        "pp=2:zero-bubble",
        "pp=3",
        "dp=2,pp=2",
        "dp=2,pp=2:zero-bubble",
        "tp=2,pp=2",
        "dp=2,pp=2,zero=1",
        "dp=2,pp=2:interleaved,zero=3,bucket_bytes=1024",
        "dp=2,tp=2,pp=2,zero=1",
    ],
    "resnet": [
        "pp=3:zero-bubble",
        "pp=2,recompute=full",
        "dp=2,pp=2:interleaved,zero=2",
        "dp=2,pp=2,zero=3,bucket_bytes=1024",
        "dp=2,pp=2:gpipe,zero=3,bucket_bytes=1024,recompute=full",
        "dp=3,pp=2,zero=3,bucket_bytes=1024,shares=3:1:1",
    ],
}


@functools.cache
def reference(name: str):
    return plain(TASKS[name](), STEPS)


@pytest.mark.thinned(5)
@pytest.mark.parametrize(("name", "plan"), [(name, plan) for name, plans in PLANS.items() for plan in plans])
def test_a_pipeline_computes_the_serial_answer(ranks, name, plan):
    found = ranks(planned, Plan.parse(plan).workers, TASKS[name](), plan, STEPS)[0]
    assert_same(found, reference(name), 1e-11)


@pytest.mark.parametrize("name", ["bert", "lstm_seq2seq"])
def test_a_small_model_computes_the_serial_answer(ranks, name):
    task = replace(SMALL[name](), precision="fp64")
    assert_same(ranks(planned, 2, task, "pp=2", 2)[0], plain(task, 2), 1e-11)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_lower_precision_computes_what_it_does_serially(ranks, precision):
    task = mlp_float64(precision=precision)
    assert_same(ranks(planned, 2, task, "pp=2", 2)[0], plain(task, 2), 2e-2)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("plan", ["pp=2", "tp=2,pp=2", "dp=2,pp=2,zero=3,bucket_bytes=1024"])
def test_a_run_goes_on_bitwise_from_its_checkpoint(ranks, plan):
    def run() -> list[bool]:
        first = build(TASKS["gpt"](), Plan.parse(plan))
        first()
        first()
        tensors, values = first.state()
        saved = {name: value.clone() for name, value in tensors.items()}
        everyone: list[dict[str, torch.Tensor] | None] = [None] * first.workers
        torch.distributed.all_gather_object(everyone, saved)
        owner, run = first.state_owner, Run()
        first.observe(Look(run))
        first()
        wanted = first.full_state()
        first.close()
        second = build(TASKS["gpt"](), Plan.parse(plan))
        found = everyone[owner]
        assert found is not None
        second.load(found, values)
        second()
        whole = second.full_state()
        second.close()
        return [torch.equal(whole[name], value) for name, value in wanted.items()]

    results = ranks(run, Plan.parse(plan).workers)
    assert results[0]
    assert all(all(one) for one in results)
