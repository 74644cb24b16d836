"""sheaf.train goes on without workers that die, where the plan says that it may: record, checkpoints, model and all."""

import functools
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sheaf import Loss, Task
from sheaf.api.train import train as train_and_predict
from sheaf.checkpoint import latest
from sheaf.errors import WorkerFailed
from sheaf.record import read_record

train = functools.partial(train_and_predict, predict=False, quiet=True, threads=1)


class Deadly:
    """Rows of which some kill the worker that fetches them: ``rank`` dies when it has fetched ``after`` of them."""

    def __init__(self, deaths):
        self.deaths, self.fetched = dict(deaths), 0

    def __len__(self):
        return 24

    def __getitem__(self, index):
        self.fetched += 1
        if self.deaths.get(int(os.environ.get("RANK", "-1"))) == self.fetched:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.001)
        generator = torch.Generator().manual_seed(index)
        row = torch.rand(6, generator=generator, dtype=torch.float64)
        return row, row.sum()


def model():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))


def loss(output, batch):
    return Loss((output.squeeze(1) - batch[1]).square().sum(), len(batch[1]))


def task(deaths=(), **changes):
    values = {
        "model": model,
        "data": Deadly(deaths),
        "loss": loss,
        "optimizer": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        "batch": 12,
        "microbatch": 2,
        "precision": "fp64",
        "seed": 5,
    }
    return Task(**(values | changes))


def serial(steps):
    """The same by plain PyTorch."""
    from sheaf.task import Order
    from sheaf.task.blueprint import Blueprint

    made = task()
    net = Blueprint(made).fill(torch.device("cpu"))
    optimizer = made.optimizer(list(net.parameters()))
    order = Order(24, 12, 2, made.seed, shuffle=made.shuffle)
    for step in range(steps):
        samples = [index for microbatch in order.step(step) for index in microbatch.samples]
        rows = [made.data[index] for index in samples]
        batch = torch.stack([row for row, _ in rows]), torch.stack([total for _, total in rows])
        optimizer.zero_grad()
        (loss(net(batch[0]), batch).sum / len(samples)).backward()
        optimizer.step()
    return {name: value.detach() for name, value in net.named_parameters()}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("dies", [0, 1])
def test_stolen_shares_give_the_serial_answer_though_a_worker_dies(tmp_path, capfd, dies):
    run = train(task({dies: 20}), "dp=3,server=2,shares=stolen", steps=12, out=tmp_path / "run", save_every=5)
    found, wanted = load_file(tmp_path / "run" / "model.safetensors"), serial(12)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-13)
    assert f"worker {dies} was killed by SIGKILL" in capfd.readouterr().err
    events = list(read_record(tmp_path / "run" / "record.jsonl"))
    assert any(f"worker {dies} was lost" in event.get("message", "") for event in events)
    steps = [event["step"] for event in events if event["kind"] == "step"]
    assert steps[-1] == 11
    assert len(steps) == len(set(steps)) >= 10
    assert latest(tmp_path / "run").path.name == "step_000012"
    assert [report.microbatches[dies] for report in run.reports[-2:]] == [0, 0]
    assert events[-1]["kind"] == "end"
    again = train(task(), "dp=3,server=2,shares=stolen", steps=15, out=tmp_path / "run", resume=True)
    assert again.reports[-1].step == 14  # and all three go on from its checkpoint
    found, wanted = load_file(tmp_path / "run" / "model.safetensors"), serial(15)
    assert all(torch.allclose(found[name], value, rtol=1e-12, atol=1e-13) for name, value in wanted.items())


def test_a_run_with_staleness_goes_on_too_and_ends_when_nobody_is_left(tmp_path, monkeypatch):
    out = tmp_path / "run"
    run = train(task({1: 20}), "dp=2,server=2:async", steps=12, out=out)
    assert run.reports[-1].step == 11
    assert list(read_record(out / "record.jsonl"))[-1]["kind"] == "end"
    with pytest.raises(WorkerFailed, match="was killed by SIGKILL"):
        train(task({0: 20, 1: 30}), "dp=2,server=2:async", steps=12, out=tmp_path / "other")
