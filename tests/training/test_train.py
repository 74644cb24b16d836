"""sheaf.train and sheaf.fit, with real steps: in this process, on launched workers, under torchrun."""

import functools
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from train_script import SlowRows, loss, rows, task

import sheaf.errors
from sheaf.api.fit import fit as fit_and_predict
from sheaf.api.train import train as train_and_predict
from sheaf.checkpoint import latest
from sheaf.cost.price import Price
from sheaf.errors import ClusterError, DataError, NonFiniteLoss, PlanError, RunError, TaskError
from sheaf.launch import FromFile
from sheaf.plans import Plan
from sheaf.record import read_record
from sheaf.search import Entry, Ranking

# Predicting measures for seconds; the tests of predictions below do it with what was "measured" before.
train = functools.partial(train_and_predict, predict=False)
fit = functools.partial(fit_and_predict, predict=False)
HERE = Path(__file__).parent
SCRIPT = HERE / "train_script.py"
SOURCE = Path(sheaf.errors.__file__).parents[1]


@pytest.fixture(autouse=True)
def _random_state_kept():
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def test_a_run_in_this_process(tmp_path):
    run = train(task(), "serial", steps=50, out=tmp_path / "run", quiet=True)
    assert len(run.losses) == 50
    assert sum(run.losses[-5:]) < 0.5 * sum(run.losses[:5])
    assert run.seconds_per_step > 0
    assert run.predicted_seconds_per_step is None
    assert not run.stopped
    assert {"task.json", "plan.toml", "record.jsonl", "model.safetensors"} <= {p.name for p in run.directory.iterdir()}
    model = run.model().eval()
    error = torch.stack([(model(x) - y).square().mean() for x, y in rows()]).mean().item()
    assert error < 0.5 * sum(run.losses[:5]) / 5


@pytest.fixture
def _seconds_are_known(monkeypatch):
    """The planner's answer, without its measuring."""

    def known(given, plan, facts, **_):
        assert facts.samples == 2
        return Price(plan, {"compute": 0.25, "all_reduce": 0.5}, {"parameters": 9}, 0.0)

    monkeypatch.setattr("sheaf.api.plan.predicted", known)


@pytest.mark.usefixtures("_seconds_are_known")
def test_a_given_plan_is_predicted_and_a_resumed_one_too(tmp_path):
    out = tmp_path / "run"
    first = train_and_predict(task(), "serial", steps=1, out=out, quiet=True)
    again = train_and_predict(task(), steps=2, out=out, quiet=True, resume=True)
    assert (first.predicted_seconds_per_step, again.predicted_seconds_per_step) == (0.75, 0.75)
    told = [line for line in read_record(out / "record.jsonl") if line["kind"] == "plan"]
    assert [(line["plan"], line["predicted"]) for line in told] == [
        ("serial", {"compute": 0.25, "all_reduce": 0.5})
    ] * 2


def test_a_price_is_its_own_prediction(tmp_path, monkeypatch):
    monkeypatch.setattr("sheaf.api.plan.predicted", lambda *_, **__: pytest.fail("predicted again"))
    price = Price(Plan(), {"compute": 3.0}, {"parameters": 9}, 0.0)
    assert train_and_predict(task(), price, steps=1, out=tmp_path, quiet=True).predicted_seconds_per_step == 3.0


def test_what_cannot_be_predicted_is_told_in_a_line_and_trained(tmp_path, monkeypatch, capsys):
    def unable(*_, **__):
        raise ClusterError("no clock\nat all")

    monkeypatch.setattr("sheaf.api.plan.predicted", unable)
    run = train_and_predict(task(), "serial", steps=1, out=tmp_path, quiet=True)
    assert run.predicted_seconds_per_step is None
    told = "the step time of serial is not predicted: ClusterError: no clock"
    assert capsys.readouterr().err == f"sheaf: {told}\n"
    assert [line["message"] for line in read_record(tmp_path / "record.jsonl") if line["kind"] == "warning"] == [told]


def test_the_best_plan_is_the_same_and_predicted_on_every_worker_of_torchrun(ranks, tmp_path):
    def joined(out):
        def ranked(given, **settings):
            prices = [Price(Plan(dp=workers), {"compute": 1.0 / workers}, {}, 0.0) for workers in (3, 2)]
            return Ranking(tuple(Entry(price) for price in prices), (), "here", given.batch, given.microbatch)

        import sheaf.api.plan as plans

        kept, plans.plan = plans.plan, ranked
        try:
            run = train_and_predict(task(), steps=1, out=out, quiet=True)
        finally:
            plans.plan = kept
        return str(run.plan), run.predicted_seconds_per_step, len(run.losses)

    assert ranks(joined, 2, str(tmp_path / "run")) == [("dp=2", 0.5, 1)] * 2


def test_launched_workers_compute_the_same_losses_and_are_resumed(tmp_path):
    serial = train(task(), "serial", steps=8, out=tmp_path / "serial", quiet=True)
    train(task(), "dp=2,zero=2", steps=3, out=tmp_path / "parts", quiet=True)
    resumed = train(task(), steps=8, out=tmp_path / "parts", quiet=True, resume=True)  # its own plan
    assert str(resumed.plan) == "dp=2,zero=2"
    assert resumed.losses == pytest.approx(serial.losses, rel=1e-5)
    for name, value in serial.model().state_dict().items():
        torch.testing.assert_close(resumed.model().state_dict()[name], value)


def test_a_resumed_serial_run_is_bit_for_bit_the_uninterrupted_one(tmp_path):
    whole = train(task(), "serial", steps=9, out=tmp_path / "whole", quiet=True)
    train(task(), "serial", steps=4, out=tmp_path / "parts", quiet=True)
    parts = train(task(), "serial", steps=9, out=tmp_path / "parts", quiet=True, resume=True)
    assert parts.losses == whole.losses


def test_sigterm_ends_workers_cleanly_and_the_run_goes_on_later(program, tmp_path):
    out = tmp_path / "run"
    process = program(SCRIPT, str(out), "dp=2", "100000", "slow", path=[str(SOURCE)])
    record = out / "record.jsonl"
    deadline = time.monotonic() + 120
    while (
        process.poll() is None
        and time.monotonic() < deadline
        and (not record.exists() or record.read_text().count('"step"') < 6)
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    told, complaints = process.communicate(timeout=120)
    steps, stopped, _ = told.split()
    assert (process.returncode, stopped) == (0, "True"), complaints
    assert 3 <= int(steps) < 100000
    assert latest(out).path.name == f"step_{int(steps):06d}"
    run = train(task(data=SlowRows(rows())), "dp=2", steps=int(steps) + 2, out=out, quiet=True, resume=True)
    assert len(run.losses) == int(steps) + 2
    assert [line["step"] for line in read_record(record) if line["kind"] == "resume"] == [int(steps)]


@pytest.mark.whole
def test_torchrun_starts_it_too(program, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(SOURCE))  # of the workers, which are started
    (tmp_path / "torchrun.py").write_text("from torch.distributed.run import main\n\nmain()\n")
    command = ["--standalone", "--nproc-per-node=2", str(SCRIPT), str(tmp_path / "run"), "dp=2", "4"]
    torchrun = program(tmp_path / "torchrun.py", *command, path=[str(SOURCE)])
    told, complaints = torchrun.communicate(timeout=120)
    assert torchrun.returncode == 0, complaints
    serial = train(task(), "serial", steps=4, out=tmp_path / "serial", quiet=True)
    told = [line.split() for line in told.splitlines()]
    assert [words[:2] for words in told] == [["4", "False"]] * 2
    assert float(told[0][2]) == pytest.approx(serial.losses[-1], rel=1e-5)


def test_a_task_that_cannot_be_sent_is_found_by_each_worker(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        f"import sys, threading\nsys.path.insert(0, {str(HERE)!r})\nimport train_script\n"
        "lock = threading.Lock()\n\n"
        "def loss(output, batch):\n    with lock:\n        return train_script.loss(output, batch)\n\n"
        "def task():\n    return train_script.task(loss=loss)\n"
    )
    source = FromFile(str(file), "task")
    given = source.load()()
    with pytest.raises(RunError, match="cannot be sent"):
        train(given, "dp=2", steps=2, out=tmp_path / "refused", quiet=True)
    assert len(train(given, "dp=2", steps=2, out=tmp_path / "run", quiet=True, source=source).losses) == 2


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(tmp_path):
    bad = rows()[12][0]

    def breaks(output, batch):
        return loss(output, batch) * (float("nan") if (batch[0] == bad).all(1).any() else 1.0)

    with pytest.raises(NonFiniteLoss) as caught:
        train(task(loss=breaks, shuffle=False), "dp=2", steps=50, out=tmp_path, quiet=True, save_every=1)
    assert (caught.value.step, caught.value.microbatch) == (2, 1)
    assert latest(tmp_path).path.name == "step_000002"
    failed = [line for line in read_record(tmp_path / "record.jsonl") if line["kind"] == "failed"]
    assert [line["error"] for line in failed] == ["NonFiniteLoss"]


class Gone(list):
    """Data whose last item is gone."""

    def __getitem__(self, index):
        if index == len(self) - 1:
            raise OSError("disk gone")
        return super().__getitem__(index)


def test_data_that_breaks_on_a_worker_is_named(tmp_path):
    with pytest.raises(DataError, match=r"data\[23\] raised OSError: disk gone"):
        train(task(data=Gone(rows()), shuffle=False), "dp=2", steps=20, out=tmp_path, quiet=True)
    assert latest(tmp_path).path is not None
    assert [line["kind"] for line in read_record(tmp_path / "record.jsonl")][-1] == "failed"


@pytest.mark.parametrize(
    ("changed", "settings", "error", "told"),
    [
        ({}, {"plan": "dp=4", "workers": 2}, PlanError, r"dp=4 needs 4 workers, there are 2"),
        ({}, {"plan": "dp=2,zer=1"}, PlanError, "did you mean zero"),
        ({}, {"plan": "serial", "steps": 0}, RunError, "at least one step"),
        ({}, {"plan": "serial", "resume": True, "out": None}, RunError, "give --out"),
        ({"model": lambda: 1 / 0}, {"plan": "dp=2"}, TaskError, "division by zero"),
        ({"data": Gone(rows(1))}, {"plan": "dp=2"}, DataError, r"data\[0\]"),
        ({"model": lambda: nn.Linear(4, 1 << 42)}, {"plan": "dp=2"}, PlanError, "does not fit"),
    ],
)
def test_what_is_wrong_is_told_before_a_worker_starts(tmp_path, monkeypatch, changed, settings, error, told):
    monkeypatch.setattr("sheaf.launch.run", lambda *_, **__: pytest.fail("a worker was started"))
    with pytest.raises(error, match=told):
        train(task(**changed), **({"steps": 2, "out": tmp_path / "run", "quiet": True} | settings))
    assert not (tmp_path / "run").exists()


def test_a_directory_in_use_is_refused_before_a_worker_starts(tmp_path, monkeypatch):
    train(task(), "serial", steps=1, out=tmp_path, quiet=True)
    monkeypatch.setattr("sheaf.launch.run", lambda *_, **__: pytest.fail("a worker was started"))
    with pytest.raises(RunError, match="already holds a run"):
        train(task(), "dp=2", steps=2, out=tmp_path, quiet=True)
    with pytest.raises(RunError, match="seed: saved 3, given 4"):
        train(task(seed=4), "serial", steps=2, out=tmp_path, quiet=True, resume=True)


def test_runs_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [train(task(name="my line"), "serial", steps=1, quiet=True) for _ in range(2)]
    assert [str(run.directory) for run in runs] == ["runs/my_line-1", "runs/my_line-2"]


def test_fit_trains_the_module_it_is_given(tmp_path):
    inputs = torch.stack([x for x, _ in rows()])
    targets = inputs.sum(1, keepdim=True).numpy()
    model = nn.Linear(4, 1)
    nn.init.constant_(model.weight, 0.5)
    before = nn.functional.mse_loss(model(inputs), torch.as_tensor(targets)).item()
    run = fit(
        model,
        inputs,
        targets,
        loss=nn.MSELoss(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        batch=24,
        epochs=5,
        plan="dp=2",
        out=tmp_path / "run",
        quiet=True,
    )
    assert run.losses[0] == pytest.approx(before, rel=1e-5)
    assert len(run.losses) == 5
    after = nn.functional.mse_loss(model(inputs), torch.as_tensor(targets)).item()
    assert after < run.losses[-1]
    assert torch.equal(run.model().weight, model.weight)


def test_fit_takes_a_builder_and_says_what_does_not_match(tmp_path):
    arguments = {
        "loss": nn.functional.mse_loss,
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "batch": 4,
        "plan": "serial",
        "quiet": True,
    }
    inputs = np.ones((6, 3), dtype=np.float32)
    run = fit(lambda: nn.Linear(3, 1), inputs, inputs[:, :1], out=tmp_path / "run", **arguments)
    assert len(run.losses) == 2
    with pytest.raises(DataError, match="6 inputs and 5 targets"):
        fit(lambda: nn.Linear(3, 1), inputs, inputs[:5, :1], **arguments)
    with pytest.raises(DataError, match="inputs is one number"):
        fit(lambda: nn.Linear(3, 1), 3.0, inputs, **arguments)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("mse", r"loss is 'mse'; it must be callable: \(output, targets\) -> a mean"),
        (nn.MSELoss, r"loss is <class 'torch.nn.modules.loss.MSELoss'>; it must be callable.*such as nn.MSELoss\(\)"),
        (lambda output: output.mean(), r"the loss raised TypeError: .*it is called with \(output, targets of the"),
    ],
)
def test_fit_tells_what_its_own_loss_is_called_with(wrong, told):
    rows = torch.ones(8, 4)
    with pytest.raises(TaskError, match=told):
        fit(lambda: nn.Linear(4, 1), rows, rows[:, :1], loss=wrong, optimizer=torch.optim.SGD, batch=4, plan="serial")
