"""On real accelerators every kind of plan computes what plain PyTorch computes on one: ``make gpu``.

One accelerator is enough for plans of one worker, measuring, proving, saving; the others ask for as many as they have
workers, each on its own, by NCCL.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from on_device import alone, planned
from plain import assert_same, mlp_float64, norm_resnet, ragged_gpt
from small import SMALL

import sheaf
from sheaf import Task, launch
from sheaf.errors import PlanError
from sheaf.graph import trace
from sheaf.graph.profile import profile
from sheaf.parallel import build
from sheaf.plans import Plan

STEPS = 3
HERE = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
pytestmark = [
    pytest.mark.skipif(not HERE, reason="no accelerator here: `make gpu` runs these where there is one"),
    pytest.mark.usefixtures("cold_launch"),  # what the others are forked from may have used the accelerator
    pytest.mark.timeout(900),
]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Makes no more of rounding than it is, as Adam does of a gradient next to zero."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


TASKS: dict[str, tuple[Callable[[], Task], float]] = {
    "mlp": (mlp_float64, 1e-9),
    "gpt": (ragged_gpt, 2e-3),
    "gpt bf16": (lambda: replace(ragged_gpt(), precision="bf16", optimizer=sgd), 5e-2),
    "gpt fp16": (lambda: replace(ragged_gpt(), precision="fp16", optimizer=sgd), 2e-2),
    "resnet": (norm_resnet, 2e-3),
    "moe": (SMALL["moe"], 2e-3),
    "seq2seq": (SMALL["lstm_seq2seq"], 2e-3),
}
ALONE = [
    *((name, "serial") for name in TASKS),
    *((name, "recompute=full") for name in ("gpt", "gpt bf16", "resnet")),
    *((name, "offload=optimizer") for name in ("mlp", "gpt", "gpt fp16")),
]
TOGETHER = [
    *((name, "dp=2") for name in ("mlp", "gpt", "gpt bf16", "gpt fp16", "resnet")),
    *(("gpt", f"dp=2,zero={stage},bucket_bytes=4096") for stage in (1, 2, 3)),
    ("gpt bf16", "dp=2,zero=3,bucket_bytes=4096,recompute=full"),
    ("mlp", "dp=2,shares=2:1,zero=3,bucket_bytes=1024"),
    ("mlp", "dp=2,shares=stolen"),
    ("mlp", "dp=2,shares=balanced"),
    ("gpt", "dp=2,offload=optimizer"),
    ("gpt", "dp=2,zero=3,bucket_bytes=4096,offload=optimizer"),
    ("gpt", "tp=2"),
    ("gpt bf16", "tp=2"),
    ("gpt", "tp=2,sequence=1"),
    ("gpt", "cp=2"),
    ("gpt", "pp=2"),
    ("gpt bf16", "pp=2:interleaved"),
    ("mlp", "pp=2:zero-bubble"),
    ("resnet", "pp=2:gpipe"),
    ("mlp", "dp=2,*=tp"),
    ("moe", "dp=2,*.experts=ep"),
    ("seq2seq", "dp=2,*_words=rows"),
    ("seq2seq", "dp=2,*_words=sparse"),
    ("mlp", "dp=2,server=2"),
    ("mlp", "dp=2,pp=2,zero=3,bucket_bytes=1024"),
    ("gpt", "tp=2,pp=2"),
    ("gpt", "dp=2,tp=2,zero=2"),
    ("gpt", "pp=4"),
    ("mlp", "dp=8,zero=3,bucket_bytes=1024"),
    ("gpt", "dp=2,tp=2,pp=2,zero=1"),
]
RELAXED = [
    *("local=2", "local=2:diloco", "local=2:adasum", "local=2:ring", "local=2:quorum=2", "server=2:async"),
    *("compress=bf16", "compress=int8", "compress=topk:0.5", "compress=powersgd:2"),
]


@functools.cache
def reference(name: str) -> Any:
    return alone(TASKS[name][0](), STEPS)


def started(workers: int, *arguments: Any) -> list[Any]:
    if workers > HERE:
        pytest.skip(f"wants {workers} accelerators, and {HERE} are here")
    return launch.run(*arguments[:1], workers, *arguments[1:], threads=2, timeout_s=600)


@pytest.mark.parametrize(("name", "plan"), [*ALONE, *TOGETHER])
def test_a_plan_computes_what_one_accelerator_does(name: str, plan: str) -> None:
    make, tolerance = TASKS[name]
    found = started(Plan.parse(plan).workers, planned, make(), plan, STEPS)[0]
    assert_same(found, reference(name), tolerance)


@pytest.mark.parametrize("settings", RELAXED)
def test_a_relaxed_plan_trains(settings: str) -> None:
    found = started(2, planned, mlp_float64(), f"dp=2,{settings}", STEPS)[0]
    assert all(math.isfinite(loss) for loss in found.losses)
    assert all(value.isfinite().all() for value in found.weights[-1].values())


def test_more_workers_than_accelerators_compute_on_the_cpu() -> None:
    def where() -> str:
        world = launch.join()
        assert world is not None
        with pytest.raises(PlanError, match="the process group has gloo only"):
            build(mlp_float64(), Plan(dp=world.workers), device=torch.device(_kind(), 0))
        step = build(mlp_float64(), Plan(dp=world.workers))
        try:
            step()
            return f"{world.device.type} {next(step.model.parameters()).device.type}"
        finally:
            step.close()

    assert set(launch.run(where, HERE + 1, timeout_s=600)) == {"cpu cpu"}


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_a_machine_is_measured(workers: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if workers > HERE:
        pytest.skip(f"wants {workers} accelerators, and {HERE} are here")
    monkeypatch.setenv("SHEAF_CACHE", str(tmp_path))
    cluster = sheaf.measure(workers, quick=True)
    device = cluster.hosts[0].device
    assert (cluster.backend, device.kind, cluster.hosts[0].workers) == ("nccl", _kind(), workers)
    assert device.flops_per_second["bf16"] > device.flops_per_second["fp64"] > 0


@pytest.mark.parametrize(("name", "plan"), [("gpt", "recompute=full"), ("resnet", "serial"), ("gpt", "dp=2,zero=3")])
def test_a_plan_is_proved(name: str, plan: str) -> None:
    if Plan.parse(plan).workers > HERE:
        pytest.skip(f"wants 2 accelerators, and {HERE} is here")
    verdict = sheaf.verify(TASKS[name][0](), plan, steps=2, predict=False)
    assert verdict.exact, str(verdict)


@pytest.mark.parametrize("plan", ["serial", "offload=optimizer", "dp=2,zero=3,bucket_bytes=4096", "pp=2"])
def test_a_run_goes_on_from_its_checkpoint(plan: str, tmp_path: Path) -> None:
    if Plan.parse(plan).workers > HERE:
        pytest.skip(f"wants 2 accelerators, and {HERE} is here")
    options: dict[str, Any] = {"quiet": True, "predict": False}
    whole = sheaf.train(ragged_gpt(), plan, steps=4, out=tmp_path / "whole", **options)
    sheaf.train(ragged_gpt(), plan, steps=2, out=tmp_path / "parted", **options)
    parted = sheaf.train(ragged_gpt(), plan, steps=4, out=tmp_path / "parted", resume=True, **options)
    assert [report.loss for report in parted.reports] == pytest.approx([report.loss for report in whole.reports], 1e-4)


def test_blocks_are_timed_and_a_step_says_where_its_time_went() -> None:
    task = replace(ragged_gpt(), precision="bf16")
    facts = trace(task, 2)
    found = profile(task, facts, threads=1, budget_seconds=2.0)
    assert all(times.forward_seconds >= 0 for times in found.blocks.values())
    assert sum(times.forward_seconds + times.backward_seconds for times in found.blocks.values()) > 0
    step = build(task, Plan())
    reports = [step() for _ in range(4)]
    step.close()
    assert reports[-1].memory_bytes > 0
    for report in reports:
        assert 0 < report.terms["compute"] <= sum(report.terms.values()) <= 1.01 * report.seconds


def _kind() -> str:
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return kind.type
