"""sheaf.train goes on without workers that die, where the plan says that it may: record, checkpoints, model and all."""

import functools
import json
import os
import re
import signal
import time
import types
from unittest.mock import ANY

import pytest
import torch
from counting import Numbered, counted, counting, samples_of, second, twice
from safetensors.torch import load_file
from torch import nn

from sheaf import Loss, Task
from sheaf.api.train import train as train_and_predict
from sheaf.checkpoint import latest
from sheaf.errors import RunError, WorkerFailed
from sheaf.launch import lost
from sheaf.parallel.server import points, wake
from sheaf.record import read_record
from sheaf.training.directory import check, read_task

train = functools.partial(train_and_predict, predict=False, quiet=True, threads=1)


class Deadly:
    """Rows of which some kill the worker that fetches them: ``rank`` dies when it has fetched ``after`` of them.

    Until then the others take their time, or they might leave it nothing to fetch.
    """

    def __init__(self, deaths, marker=None):
        self.deaths, self.marker, self.fetched = dict(deaths), marker, 0

    def __len__(self):
        return 24

    def __getitem__(self, index):
        self.fetched += 1
        after = self.deaths.get(int(os.environ.get("RANK", "-1")))
        if after == self.fetched:
            if self.marker is not None:
                self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        waits = after is None and self.marker is not None and not self.marker.exists()
        time.sleep(0.05 if waits else 0.001)
        generator = torch.Generator().manual_seed(index)
        row = torch.rand(6, generator=generator, dtype=torch.float64)
        return row, row.sum()


def model():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))


def loss(output, batch):
    return Loss((output.squeeze(1) - batch[1]).square().sum(), len(batch[1]))


def task(deaths=(), marker=None, **changes):
    values = {
        "model": model,
        "data": Deadly(deaths, marker),
        "loss": loss,
        "optimizer": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        "batch": 12,
        "microbatch": 2,
        "precision": "fp64",
        "seed": 5,
    }
    return Task(**(values | changes))


def serial(steps, **changes):
    """The same by plain PyTorch."""
    from sheaf.task import Order
    from sheaf.task.blueprint import Blueprint

    made = task(**changes)
    net = Blueprint(made).fill(torch.device("cpu"))
    optimizer = made.optimizer(list(net.parameters()))
    scheduler = made.scheduler(optimizer) if made.scheduler is not None else None
    order = Order(24, 12, 2, made.seed, shuffle=made.shuffle)
    for step in range(steps):
        samples = [index for microbatch in order.step(step) for index in microbatch.samples]
        rows = [made.data[index] for index in samples]
        batch = torch.stack([row for row, _ in rows]), torch.stack([total for _, total in rows])
        optimizer.zero_grad()
        (loss(net(batch[0]), batch).sum / len(samples)).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return {name: value.detach() for name, value in net.named_parameters()}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("dies", [0, 1])
def test_stolen_shares_give_the_serial_answer_though_a_worker_dies(tmp_path, capfd, dies):
    run = train(
        task({dies: 20}, tmp_path / "died"), "dp=3,server=2,shares=stolen", steps=12, out=tmp_path / "run", save_every=5
    )
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


class Indices(Deadly):
    """The same, of which each is its own number, twice; what is fetched before there are workers does not count."""

    def __getitem__(self, index):
        if "RANK" in os.environ:
            super().__getitem__(index)
        return index, index


def used_once(out):
    """How many shares were used by the last checkpoint; each sample was as often as they say."""
    shards, path = {}, latest(out).path
    for worker in range(2):
        shards |= json.loads((path / f"worker_{worker}.json").read_text())["values"]["shards"]
    dealing = shards["0"]["dealing"]
    parts = [(step, place) for place, until in enumerate(dealing["next"]) for step in range(until)]
    parts = [(step, place) for step, place in parts if 2 * step + place not in dealing["back"]]
    assert counted(load_file(out / "model.safetensors")["table.weight"]) == samples_of(parts)
    assert abs(dealing["next"][0] - dealing["next"][1]) <= 1
    assert not dealing["dealt"]
    return len(parts)


def test_with_staleness_every_sample_is_used_once_though_a_worker_dies_and_the_run_is_resumed(tmp_path):
    out, plan = tmp_path / "run", "dp=2,server=2:staleness=2"
    run = train(counting(Indices({1: 20})), plan, steps=12, out=out)
    assert run.reports[-1].step == 11
    assert run.reports[-1].server["returned"] == 1
    assert list(read_record(out / "record.jsonl"))[-1]["kind"] == "end"
    assert used_once(out) == 12 + 4  # the one that died was in the middle of its fifth
    again = train(counting(Indices({})), plan, steps=16, out=out, resume=True)
    assert again.reports[-1].step == 15
    assert used_once(out) == 16 + 2 * 4
    with pytest.raises(WorkerFailed, match="was killed by SIGKILL"):
        train(task({0: 20, 1: 30}), "dp=2,server=2:async", steps=12, out=tmp_path / "other")


class Armed:
    """As Indices, of which some arm a worker that fetches them: ``rank`` is killed at that place of its third step."""

    def __init__(self, places):
        self.places, self.fetched = dict(places), 0

    def __len__(self):
        return 24

    def __getitem__(self, index):
        self.fetched += "RANK" in os.environ
        if self.fetched == 10 and (place := self.places.get(int(os.environ["RANK"]))):
            points.arm(f"{place}:kill")
        return index, index


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("plan", "places"),
    [
        ("dp=2,pp=2,server=1:staleness=2", {1: "worker.before_commit", 3: "worker.between_commits"}),
        ("dp=2,tp=2,server=2:async", {0: "worker.after_push"}),
    ],
)
def test_a_replica_of_several_workers_is_lost_with_one_and_every_sample_is_used_once(tmp_path, capfd, plan, places):
    out, two = tmp_path / "run", {"model": twice, "loss": second}
    run = train(counting(Armed(places), **two), plan, steps=12, out=out, save_every=5)
    told = capfd.readouterr().err
    for rank in places:
        assert f"worker {rank} was killed by SIGKILL" in told
    if len(places) == 1:
        assert "worker 1 is of a replica that is lost, with workers 0; it computes no more" in told
    assert run.reports[-1].step == 11
    assert (out / "pipeline.json").exists() == ("pp" in plan)
    for steps in (12, 16):
        dealing = json.loads((latest(out).path / "worker_0.json").read_text())["values"]["shards"]["0"]["dealing"]
        parts = [(step, place) for place, until in enumerate(dealing["next"]) for step in range(until)]
        wanted = samples_of(part for part in parts if 2 * part[0] + part[1] not in dealing["back"])
        for name, table in load_file(out / "model.safetensors").items():
            assert counted(table, name, **two) == wanted, name
        assert len(parts) - len(dealing["back"]) >= steps
        assert dealing["returned"] == 1
        if steps == 12:
            again = train(counting(Armed({}), **two), plan, steps=16, out=out, resume=True)
            assert again.reports[-1].step == 15


class Long(Indices):
    """As Indices. Worker 0 makes ``marker`` when it has fetched 40; a step of worker ``long`` lasts until then. Without
    one, worker 0 waits there until it is known who died, and for those to say so who wait for them.
    """

    def __init__(self, deaths, marker, long=None):
        super().__init__(deaths, marker)
        self.long = long

    def __getitem__(self, index):
        rank = os.environ.get("RANK")
        if rank == "0" and self.fetched == 40:
            while self.long is None and not lost():
                time.sleep(0.01)
            time.sleep(1.0 if self.long is None else 0.0)
            self.marker.touch()
        while rank == str(self.long) and not self.marker.exists():
            time.sleep(0.01)
        if rank is not None:
            self.fetched += 1
            if self.deaths.get(int(rank)) == self.fetched:
                os.kill(os.getpid(), signal.SIGKILL)
        return index, index


def hasty(blocks):
    """A model of so many blocks, on workers that find ten minutes of waiting in a few seconds."""
    begun = time.monotonic()
    clock = types.SimpleNamespace(monotonic=lambda: begun + 100 * (time.monotonic() - begun), sleep=time.sleep)
    wake.time, wake._DOUBT_SECONDS = clock, 100 * wake._DOUBT_SECONDS
    return nn.Sequential(*(Numbered() for _ in range(blocks)))


@pytest.mark.parametrize(
    ("plan", "deaths", "long"),
    [
        ("dp=2,pp=2,server=1:async", {3: 1}, 1),  # while it computes its first step
        ("dp=2,pp=3,server=1:async", {5: 10}, None),  # worker 3 serves, and worker 1 waits for it
    ],
)
def test_who_has_not_noticed_that_its_replica_is_lost_is_never_ended_before_the_run(
    tmp_path, capfd, monkeypatch, plan, deaths, long
):
    for name in ("time", "_DOUBT_SECONDS"):  # workers may be forked from this very process
        monkeypatch.setattr(wake, name, getattr(wake, name))
    out, blocks = tmp_path / "run", int(plan[8])
    model = {"model": functools.partial(hasty, blocks), "loss": second}
    run = train(counting(Long(deaths, tmp_path / "marker", long), **model), plan, steps=16, out=out)
    told = capfd.readouterr().err
    (dead,) = deaths
    assert f"worker {dead} was killed by SIGKILL" in told
    assert "exit code 1" not in told
    assert ("worker 3 is of a replica that is lost, with workers 1, 5; it computes no more" in told) is (blocks == 3)
    assert run.reports[-1].step == 15
    events = list(read_record(out / "record.jsonl"))
    assert [event["message"] for event in events if event["kind"] == "warning"] == [ANY]
    assert events[-1]["kind"] == "end"
    tables = load_file(out / "model.safetensors").items()
    shards = json.loads((latest(out).path / "worker_0.json").read_text())["values"]["shards"]
    dealing = shards["0"]["dealing"]
    parts = [(step, place) for place, until in enumerate(dealing["next"]) for step in range(until)]
    assert (len(parts) - len(dealing["back"]), dealing["returned"]) == (16 + (0 if long else 2), 1)
    wanted = samples_of(part for part in parts if 2 * part[0] + part[1] not in dealing["back"])
    assert len(tables) == blocks
    assert all(counted(table, name, **model) == wanted for name, table in tables)


def falling(dies, step):
    """A learning rate that falls; worker ``dies`` is killed when a shard of its own comes to step 6."""
    if step == 6 and os.environ.get("RANK") == str(dies):
        os.kill(os.getpid(), signal.SIGKILL)
    return 0.9**step


def scheduled(dies=None):
    falls = functools.partial(falling, dies)
    return {"scheduler": functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=falls)}


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("dies", "plan"), [(2, "dp=2,server=2:apart"), (3, "dp=2,server=3:apart,shares=stolen")])
def test_a_worker_that_only_served_dies_and_lock_step_goes_on(tmp_path, capfd, dies, plan):
    out = tmp_path / "run"
    run = train(task(**scheduled(dies)), plan, steps=12, out=out, save_every=5)
    assert [report.step for report in run.reports] == list(range(12))
    found, wanted = load_file(out / "model.safetensors"), serial(12, **scheduled())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-13)
    assert f"worker {dies} was killed by SIGKILL" in capfd.readouterr().err
    assert all(len(report.microbatches) == 2 for report in run.reports)
    again = train(task(**scheduled()), plan, steps=15, out=out, resume=True)  # and with all of them again
    assert again.reports[-1].step == 14
    found, wanted = load_file(out / "model.safetensors"), serial(15, **scheduled())
    assert all(torch.allclose(found[name], value, rtol=1e-12, atol=1e-13) for name, value in wanted.items())


def test_the_only_one_that_served_is_named_when_it_dies(tmp_path):
    with pytest.raises(WorkerFailed, match=r"worker 2, the only one that served, was killed by SIGKILL"):
        train(task(**scheduled(2)), "dp=2,server=1:apart", steps=12, out=tmp_path / "run")


@pytest.mark.thinned(2)
@pytest.mark.parametrize("deaths", [{0: 20, 1: 30}, {1: 20}])
def test_with_servers_apart_a_run_outlives_workers_but_not_all_that_compute(tmp_path, deaths):
    out = tmp_path / "run"
    if len(deaths) == 1:
        assert train(task(deaths), "dp=2,server=2:apart:async", steps=12, out=out).reports[-1].step == 11
        assert (out / "model.safetensors").exists()
        return
    with pytest.raises(WorkerFailed, match=r"every worker that computes is lost|was killed by SIGKILL"):
        train(task(deaths), "dp=2,server=2:apart:async", steps=12, out=out)
    assert not (out / "model.safetensors").exists()


class Asking(Deadly):
    """The same; worker 1 notes what it is told who would continue the run, as long as that goes on."""

    out = noted = None

    def __getitem__(self, index):
        row = super().__getitem__(index)
        if os.environ.get("RANK") == "1" and self.marker.exists():
            try:
                check(self.out, {}, resume=True)
            except RunError as error:
                self.noted.write_text(str(error))
        return row


def test_a_run_that_lost_the_worker_that_writes_is_still_going_on(tmp_path):
    out, data = tmp_path / "run", Asking({0: 20}, tmp_path / "died")
    data.out, data.noted = out, tmp_path / "noted"
    train(task(data=data), "dp=3,server=2,shares=stolen", steps=12, out=out)
    assert re.search(r"a run that is still going on, \d+ of 12 steps done; choose", data.noted.read_text())
    check(out, read_task(out), resume=True)  # it is over
