"""The loop over a fake step: what it leaves behind, how it stops, that a resumed run is the same run."""

import functools
import itertools
import json
import threading

import pytest
import torch
from fake_step import FakeStep
from safetensors.torch import load_file
from torch import nn

from sheaf import checkpoint
from sheaf.errors import NonFiniteLoss, RunError
from sheaf.plans import Plan
from sheaf.record import read_record, step_reports
from sheaf.task import Task
from sheaf.training import describe, digest, measured_rows, train_rank


def make_task(**changed):
    settings = {
        "model": lambda: nn.Linear(3, 1),
        "loss": lambda output, batch: output.mean(),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "data": [(torch.zeros(3), torch.zeros(1))] * 8,
        "batch": 4,
    }
    return Task(**(settings | changed))


SERIAL = Plan()


def losses(directory):
    return [report.loss for report in step_reports(directory / "record.jsonl")]


def kinds(directory):
    return [line["kind"] for line in read_record(directory / "record.jsonl") if line["kind"] != "step"]


def test_a_run_leaves_its_task_plan_record_checkpoint_and_weights(tmp_path):
    out = tmp_path / "run"
    outcome = train_rank(make_task(), SERIAL, 4, out, save_every=0, build=FakeStep)
    assert (outcome.first, outcome.steps, outcome.stopped) == (0, 4, False)
    assert Plan.from_toml((out / "plan.toml").read_text()) == SERIAL
    task = json.loads((out / "task.json").read_text())
    assert task["parameters"] == 4
    assert task["optimizer"]["lr"] == 0.1
    assert task["microbatch"] == 4
    assert len(losses(out)) == 4
    assert kinds(out) == ["start", "checkpoint", "end"]
    assert checkpoint.latest(out).path == out / "checkpoints" / "step_000004"
    step = FakeStep(make_task(), SERIAL)
    for _ in range(4):
        step()
    assert torch.equal(load_file(out / "model.safetensors")["weight"], step.full_state()["weight"])


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path):
    train_rank(make_task(), SERIAL, 12, tmp_path / "whole", build=FakeStep)
    train_rank(make_task(), SERIAL, 5, tmp_path / "parts", build=FakeStep)
    outcome = train_rank(make_task(), SERIAL, 12, tmp_path / "parts", resume=True, build=FakeStep)
    assert outcome.first == 5
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 12
    again = train_rank(make_task(), SERIAL, 12, tmp_path / "parts", resume=True, build=FakeStep)
    assert (again.first, again.steps) == (12, 12)


def test_real_workers_resume_their_own_shards(ranks, tmp_path):
    plan = Plan.parse("dp=2,zero=3")

    def run(out, steps, resume):
        train_rank(make_task(), plan, steps, out, resume=resume, build=FakeStep)

    ranks(run, 2, tmp_path / "whole", 6, False)
    ranks(run, 2, tmp_path / "parts", 3, False)
    ranks(run, 2, tmp_path / "parts", 6, True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    weights = [load_file(tmp_path / name / "model.safetensors")["weight"] for name in ("parts", "whole")]
    assert weights[0].shape == (2, 3)
    assert torch.equal(*weights)


def test_resume_starts_where_nothing_was(tmp_path):
    assert train_rank(make_task(), SERIAL, 2, tmp_path / "new", resume=True, build=FakeStep).first == 0


def test_a_run_whose_checkpoints_are_all_damaged_says_that_it_starts_anew(tmp_path, capsys):
    train_rank(make_task(), SERIAL, 2, tmp_path, build=FakeStep)
    for saved in (tmp_path / "checkpoints").glob("*/*.safetensors"):
        saved.write_bytes(saved.read_bytes()[:100])
    assert train_rank(make_task(), SERIAL, 2, tmp_path, resume=True, build=FakeStep).first == 0
    told = capsys.readouterr().err
    assert told.index("skipped") < told.index("no checkpoint in") < told.index("starts anew")


def test_a_directory_in_use_is_left_alone(tmp_path):
    train_rank(make_task(), SERIAL, 2, tmp_path, build=FakeStep)
    before = (tmp_path / "record.jsonl").read_text()
    with pytest.raises(RunError, match=r"another --out.*--resume"):
        train_rank(make_task(), SERIAL, 2, tmp_path, build=FakeStep)
    assert (tmp_path / "record.jsonl").read_text() == before


def test_a_directory_in_use_is_refused_on_every_worker(ranks, tmp_path):
    (tmp_path / "record.jsonl").touch()

    def run():
        with pytest.raises(RunError, match="already holds a run"):
            train_rank(make_task(), Plan(dp=2), 2, tmp_path, build=FakeStep)
        return True

    assert ranks(run, 2) == [True, True]


def test_another_task_is_not_resumed_and_every_difference_is_named(tmp_path):
    train_rank(make_task(), SERIAL, 2, tmp_path, build=FakeStep)
    other = make_task(seed=1, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.2))
    with pytest.raises(RunError) as caught:
        train_rank(other, SERIAL, 4, tmp_path, resume=True, build=FakeStep)
    assert "seed: saved 0, given 1" in str(caught.value)
    assert "optimizer.lr: saved 0.1, given 0.2" in str(caught.value)
    assert "batch" not in str(caught.value)


def test_another_plan_is_not_resumed(tmp_path):
    train_rank(make_task(), SERIAL, 2, tmp_path, build=FakeStep)
    with pytest.raises(RunError, match=r"saved under serial by 1 workers.*resume with that plan"):
        train_rank(make_task(), Plan(recompute="full"), 4, tmp_path, resume=True, build=FakeStep)
    assert Plan.from_toml((tmp_path / "plan.toml").read_text()) == SERIAL, "what was refused leaves the run's plan"


def test_a_signal_ends_all_workers_at_the_same_step_with_a_checkpoint(ranks, tmp_path):
    build = functools.partial(FakeStep, signal_at=(1, 3))

    def run():
        return train_rank(make_task(), Plan(dp=2), 1000, tmp_path, build=build)

    first, second = ranks(run, 2)
    assert first == second
    assert first.stopped
    assert first.steps == 4
    assert checkpoint.latest(tmp_path).path == tmp_path / "checkpoints" / "step_000004"
    assert (tmp_path / "model.safetensors").exists()


def test_a_loss_that_is_not_a_number_keeps_the_last_checkpoint(tmp_path):
    with pytest.raises(NonFiniteLoss, match="step 5"):
        train_rank(make_task(), SERIAL, 9, tmp_path, save_every=2, build=functools.partial(FakeStep, nan_at=5))
    assert checkpoint.latest(tmp_path).path.name == "step_000004"
    assert kinds(tmp_path)[-1] == "failed"
    assert not (tmp_path / "model.safetensors").exists()


def test_checkpoints_are_saved_as_often_as_asked(tmp_path):
    train_rank(make_task(), SERIAL, 7, tmp_path, save_every=3, keep=5, build=FakeStep)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_000003", "step_000006", "step_000007"]


def test_by_default_the_first_step_is_saved_and_then_as_often_as_is_cheap(tmp_path):
    build = functools.partial(FakeStep, seconds=0.005)
    train_rank(make_task(), SERIAL, 30, tmp_path, build=build)
    saves = [line for line in read_record(tmp_path / "record.jsonl") if line["kind"] == "checkpoint"]
    assert saves[0]["step"] == 1
    assert saves[-1]["step"] == 30
    for one, other in itertools.pairwise(saves[:-1]):
        assert (other["step"] - one["step"]) * 0.006 > 15 * one["seconds"]


def test_a_broken_observer_does_not_stop_the_run(tmp_path, capfd):
    seen, closed = [], []

    class Good:
        def __call__(self, report):
            seen.append(report.step)

        def close(self):
            closed.append(True)

    def broken(report):
        raise ValueError("no screen")

    def no_observer(first_step):
        raise OSError("no port")

    observers = (lambda first: broken, no_observer, lambda first: Good())
    train_rank(make_task(), SERIAL, 3, tmp_path, observers=observers, build=FakeStep)
    assert seen == [0, 1, 2]
    assert closed == [True]
    assert capfd.readouterr().err.count("no screen") == 1
    assert "no port" in next(
        line["message"] for line in read_record(tmp_path / "record.jsonl") if line["kind"] == "warning"
    )


def test_a_thread_can_train_too(tmp_path):
    thread = threading.Thread(target=train_rank, args=(make_task(), SERIAL, 2, tmp_path), kwargs={"build": FakeStep})
    thread.start()
    thread.join()
    assert len(losses(tmp_path)) == 2


def test_no_steps_are_refused(tmp_path):
    with pytest.raises(RunError, match="at least one step"):
        train_rank(make_task(), SERIAL, 0, tmp_path, build=FakeStep)


def test_the_digest_tells_tasks_apart_and_ignores_names():
    base = describe(make_task(), SERIAL)
    assert digest(base) == digest(describe(make_task(name="other"), SERIAL))
    for changed in ({"batch": 8}, {"seed": 3}, {"clip": 1.0}, {"precision": "bf16"}, {"shuffle": False}):
        assert digest(base) != digest(describe(make_task(**changed), SERIAL)), changed
    assert digest(base) != digest(describe(make_task(model=lambda: nn.Linear(3, 2)), SERIAL))


def test_a_pipelines_step_is_left_on_one_clock(ranks, tmp_path):
    def train():
        return train_rank(make_task(), Plan(pp=2), 3, tmp_path, build=FakeStep).steps

    assert ranks(train, 2) == [3, 3]
    told = json.loads((tmp_path / "pipeline.json").read_text())
    assert (told["plan"], told["step"] in range(3)) == ("pp=2", True)
    wanted = [(0, "F", 0, 0, 0.0, 1.0), (0, "B", 0, 0, 3.0, 4.0), (1, "F", 0, 1, 1.0, 2.0), (1, "B", 0, 1, 3.0, 4.0)]
    assert [tuple(row) for row in told["rows"]] == wanted
    assert measured_rows(tmp_path, Plan(pp=2)) == wanted
    assert measured_rows(tmp_path, Plan(pp=2, schedule="gpipe")) is None, "another plan's"


def test_of_several_replicas_the_slowest_is_shown(tmp_path):
    plan = Plan(dp=2, tp=2, pp=2)
    rows = [[worker, "F", 0, worker // 4, 0.0, 1.0 + (worker in (2, 6))] for worker in range(8)]
    (tmp_path / "pipeline.json").write_text(json.dumps({"plan": str(plan), "rows": rows}))
    assert measured_rows(tmp_path, plan) == [(0, "F", 0, 0, 0.0, 2.0), (1, "F", 0, 1, 0.0, 2.0)]
    (tmp_path / "pipeline.json").write_text("{")
    assert measured_rows(tmp_path, plan) is None
