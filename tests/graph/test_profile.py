"""Measured times, and the files that keep them."""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_cases import Recurrent, gpt2, image_task, t5, task, text_task, vectors
from torch import Tensor, nn

from sheaf.errors import TaskError
from sheaf.graph import GLUE, LOSS, Profile, cached_profile, profile, trace

measuring = sys.modules["sheaf.graph.profile"]
keeping = sys.modules["sheaf.graph.cache"]


def measured(one: Any, **options: Any) -> Profile:
    return profile(one, trace(one, 4), threads=1, **({"budget_seconds": 0.2} | options))


def seconds(times: Profile, name: str) -> float:
    return times.blocks[name].forward_seconds + times.blocks[name].backward_seconds


@pytest.fixture
def _own_time(monkeypatch: pytest.MonkeyPatch):
    """Time passes only while this process computes: others that use the machine are not measured."""
    monkeypatch.setattr(measuring.Clock, "now", lambda _self: time.process_time())


def busy(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def slow() -> nn.Module:
    """Three layers, of which the second takes 20 ms in forward and 40 ms in backward."""

    class Busy(torch.autograd.Function):
        @staticmethod
        def forward(_context: Any, value: Tensor) -> Tensor:
            busy(0.02)
            return value.clone()

        @staticmethod
        def backward(_context: Any, gradient: Tensor) -> Tensor:
            busy(0.04)
            return gradient

    class Slow(nn.Linear):
        def forward(self, value: Tensor) -> Tensor:
            return Busy.apply(super().forward(value))

    return nn.Sequential(nn.Linear(8, 8), Slow(8, 8), nn.Linear(8, 8))


@pytest.mark.usefixtures("_own_time")
@pytest.mark.parametrize("whole", [True, False])
def test_time_is_given_to_the_block_that_takes_it(monkeypatch: pytest.MonkeyPatch, whole: bool):
    if not whole:
        monkeypatch.setattr(measuring, "whole_bytes", lambda _facts: 2**60)
    one = task(slow, vectors(8))
    times = measured(one)
    assert 0.012 < times.blocks["1"].forward_seconds < 0.1
    assert 0.03 < times.blocks["1"].backward_seconds < 0.2
    assert all(seconds(times, name) < seconds(times, "1") / 2 for name in times.blocks if name != "1")


@pytest.mark.usefixtures("_own_time")
def test_blocks_sum_to_the_whole():
    one = text_task(gpt2)
    facts = trace(one, 4)
    model = measuring._WholeModel(one, facts, torch.device("cpu"))
    plain: list[float] = []
    run = model._plain

    def kept() -> tuple[float, float]:
        plain.append(sum(run()))
        return run()

    model._plain = kept
    times = model.times(0.2)
    total = sum(time.forward_seconds + time.backward_seconds for time in times.values())
    assert 0.4 * min(plain) < total < 2 * max(plain)
    assert list(times) == [block.name for block in facts.blocks]
    assert times["transformer.h.0"] == times["transformer.h.1"]


@pytest.mark.parametrize(
    "one",
    [
        text_task(gpt2),
        text_task(t5, labels=True),
        image_task(),
        text_task(Recurrent, inputs=lambda batch: (batch,)),
        text_task(gpt2, precision="bf16"),
    ],
    ids=["gpt2", "t5", "resnet", "lstm", "bf16"],
)
def test_blocks_of_a_model_too_large_to_run_whole_are_run_alone(monkeypatch: pytest.MonkeyPatch, one: Any):
    monkeypatch.setattr(measuring, "whole_bytes", lambda _facts: 2**60)
    alone: dict[str, Any] = {}
    run = measuring._Blocks._measured

    def noted(self: Any, block: Any, share_seconds: float) -> Any:
        alone[block.name] = run(self, block, share_seconds)
        return alone[block.name]

    monkeypatch.setattr(measuring._Blocks, "_measured", noted)
    times = measured(one)
    facts = trace(one, 4)
    assert set(times.blocks) == {block.name for block in facts.blocks}
    assert all(found is not None for found in alone.values())
    assert len(alone) == len(
        {block.signature for block in facts.blocks if block.calls and block.name not in (GLUE, LOSS)}
    )
    assert all(times.blocks[block.name].forward_seconds > 0 for block in facts.blocks if block.forward_kernels)


def test_the_optimizer_is_the_tasks_own():
    adam = measured(task(lambda: nn.Linear(64, 64), vectors(64)))
    assert adam.optimizer_state_bytes_per_byte == pytest.approx(2, rel=0.01)
    plain = measured(task(lambda: nn.Linear(64, 64), vectors(64), optimizer=lambda p: torch.optim.SGD(p, lr=0.1)))
    assert plain.optimizer_state_bytes_per_byte == 0
    assert plain.optimizer_seconds_per_byte > 0
    assert plain.fetch_seconds > 0
    assert plain.host_seconds > 0


def test_an_optimizer_that_cannot_step_is_told():
    with pytest.raises(TaskError, match="step\\(\\) needs no argument"):
        measured(task(lambda: nn.Linear(8, 8), vectors(8), optimizer=torch.optim.LBFGS))


def test_a_model_without_trainable_parameters_costs_no_optimizer():
    times = measured(task(lambda: nn.Linear(8, 8).requires_grad_(requires_grad=False), vectors(8)))
    assert times.optimizer_seconds_per_byte == times.host_seconds == 0


def test_huge_parameters_are_sampled():
    facts = trace(task(lambda: nn.Linear(10**6, 10**4, bias=False), vectors(10**6, count=4)), 4)
    assert measuring._sampled(facts, 2**20, {}) == [((2**18,), "float32", 0)]


def test_workers_wait_for_each_other():
    barrier = threading.Barrier(1)
    calls: list[int] = []
    measured(task(lambda: nn.Linear(8, 8), vectors(8)), together=lambda: calls.append(barrier.wait()), concurrency=2)
    assert len(calls) == 3


def test_threads_are_put_back():
    before = torch.get_num_threads()
    measured(task(lambda: nn.Linear(8, 8), vectors(8)))
    assert torch.get_num_threads() == before


def test_a_profile_is_kept_and_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("SHEAF_CACHE", str(tmp_path))
    one = task(lambda: nn.Linear(8, 8), vectors(8))
    facts = trace(one, 4)

    def get(**options: Any) -> Profile:
        return cached_profile(one, facts, **({"threads": 1, "budget_seconds": 0.1} | options))

    first = get()
    assert get() == first
    (file,) = (tmp_path / "profiles").iterdir()
    get(threads=2)
    assert len(list((tmp_path / "profiles").iterdir())) == 2
    for broken in ("", "{", "[]", '{"blocks": 3}', json.dumps({"blocks": {}})):
        file.write_text(broken)
        again = get()
        assert json.loads(file.read_text())["fetch_seconds"] == again.fetch_seconds


def test_what_a_profile_depends_on_is_in_its_name():
    one = task(lambda: nn.Linear(8, 8), vectors(8))
    wider = task(lambda: nn.Linear(8, 9), vectors(8))
    slower = task(lambda: nn.Linear(8, 8), vectors(8), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    names = {keeping.cache_key(a, trace(a, 4), threads=1, concurrency=1) for a in (one, wider, slower)}
    assert len(names) == 3
    assert keeping.cache_key(one, trace(one, 4), threads=1, concurrency=1) in names


def test_a_folder_that_cannot_be_written_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    taken = tmp_path / "file"
    taken.write_text("")
    monkeypatch.setenv("SHEAF_CACHE", str(taken))
    one = task(lambda: nn.Linear(8, 8), vectors(8))
    assert cached_profile(one, trace(one, 4), threads=1, budget_seconds=0.1).samples == 4
