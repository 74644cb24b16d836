"""Every exact plan computes what plain PyTorch computes on one process: losses, gradients, weights, buffers."""

import functools

import pytest
from plain import (
    assert_same,
    mlp_float64,
    norm_resnet,
    plain,
    planned,
    ragged_gpt,
    transformers_bert,
    transformers_gpt2,
)

STEPS = 4
TASKS = {
    "mlp": (mlp_float64, 1e-12),
    "gpt": (ragged_gpt, 2e-4),
    "resnet": (norm_resnet, 2e-4),
    "gpt2": (transformers_gpt2, 2e-4),
    "bert": (transformers_bert, 2e-4),
}
PLANS = [
    "dp=2",
    "dp=3",
    "dp=4",
    "dp=2,shares=3:1",
    "dp=3,shares=0:2:1",
    "dp=2,shares=stolen",
    "dp=4,shares=stolen",
    "dp=3,shares=balanced",
    "dp=2,zero=3,shares=balanced,bucket_bytes=1024",
    "dp=2,zero=1",
    "dp=3,zero=1,shares=stolen",
    "dp=3,zero=2",
    "dp=2,zero=2,shares=5:2",
    "dp=2,zero=3,bucket_bytes=1024",
    "dp=3,zero=3,bucket_bytes=1024",
    "dp=4,zero=3,shares=1:2:3:4,bucket_bytes=1024",
    "dp=2,recompute=full",
    "dp=2,zero=1,recompute=full",
    "dp=2,zero=2,recompute=full",
    "dp=3,zero=3,recompute=full,bucket_bytes=1024",
]


@functools.cache
def reference(name: str):
    make, _ = TASKS[name]
    return plain(make(), STEPS)


@pytest.mark.thinned(7)  # has no factor in common with the number of plans: every task meets others
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", list(TASKS))
def test_a_plan_computes_the_serial_answer(ranks, name, plan):
    make, tolerance = TASKS[name]
    world = int(plan.split("=")[1].split(",")[0])
    found = ranks(planned, world, make(), plan, STEPS)[0]
    assert_same(found, reference(name), tolerance)


@pytest.mark.parametrize("plan", ["serial", "recompute=full"])
@pytest.mark.parametrize("name", list(TASKS))
def test_one_worker_computes_the_serial_answer(name, plan):
    make, tolerance = TASKS[name]
    assert_same(planned(make(), plan, STEPS), reference(name), tolerance)
