"""Workers for real: values, failures, signals, scripts without a main guard."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import worker_functions

from sheaf import launch
from sheaf.errors import NonFiniteLoss, RunError, TaskError, WorkerFailed

HERE = Path(__file__).parent
SOURCE = Path(launch.__file__).parents[2]


@pytest.mark.usefixtures("cold_launch")
def test_values_come_back_by_rank_and_output_is_told_apart(capsys):
    workers = launch.run(worker_functions.place, 2, threads=1, scale=2.0)
    assert [worker["rank"] for worker in workers] == [0, 1]
    assert {worker["workers"] for worker in workers} == {2}
    assert [worker["sum"] for worker in workers] == [6.0, 6.0]
    assert {(worker["threads"], worker["omp"]) for worker in workers} == {(1, "1")}
    if not torch.accelerator.is_available():
        assert {worker["device"] for worker in workers} == {"cpu"}
    assert workers[0]["parent"] == workers[1]["parent"] != os.getpid()
    assert not any(psutil.pid_exists(worker["pid"]) for worker in workers)
    told = capsys.readouterr()
    assert told.out == "out of 0\n"
    assert sorted(told.err.splitlines()) == ["[worker 1] err of 1", "err of 0"]


def test_closures_of_a_test_and_lines_of_every_worker():
    lines = []
    offset = 5

    def own():
        print("line")
        print("no newline", end="")
        return torch.distributed.get_rank() + offset

    assert launch.run(own, 3, on_line=lambda rank, line: lines.append((rank, line))) == [5, 6, 7]
    assert sorted(lines) == [(rank, line) for rank in range(3) for line in ("line", "no newline")]


def test_a_sheaf_error_keeps_its_type_and_says_which_worker():
    with pytest.raises(NonFiniteLoss) as caught:
        launch.run(worker_functions.fail, 2, "sheaf")
    assert (caught.value.step, caught.value.microbatch) == (7, 3)
    assert "raised by worker 1 of 2" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("other", r"worker 1 of 2 raised KeyError: 'missing'(.|\n)*worker_functions.py"),
        ("exit", "worker 1 of 2 ended with exit code 5 before it returned"),
        ("kill", "worker 1 of 2 was killed by SIGKILL"),
    ],
)
def test_other_failures_name_the_worker(pool, kind, told):
    with pytest.raises(WorkerFailed, match=told):
        launch.run(worker_functions.fail, 2, kind)
    assert _no_nursery_left(pool)


def _no_nursery_left(pool):
    programs = [child for child in psutil.Process().children() if "sheaf.launch.nursery" in " ".join(child.cmdline())]
    return not programs and not any(psutil.pid_exists(number) for number in pool.nurseries)


def test_a_worker_that_hangs_is_found_by_its_stack(pool):
    for seconds in (5.0, 20.0, 80.0):
        with pytest.raises(WorkerFailed) as caught:
            launch.run(worker_functions.fail, 2, "hang", timeout_s=seconds)
        told = str(caught.value)
        if "in barrier" in told and "in fail" in told:  # both had come that far: workers start slowly on a busy machine
            break
    assert f"longer than {seconds:g} s; look at worker 1 first" in told
    assert told.index("worker 1:") < told.index("worker 0:")
    assert "nursery" not in told
    assert _no_nursery_left(pool)


def test_a_script_without_a_main_guard(tmp_path):
    script = tmp_path / "plain.py"
    script.write_text(
        textwrap.dedent("""
            import helper_beside_the_script
            import torch, torch.distributed as dist
            from sheaf import launch

            torch.ones(512, 512) @ torch.ones(512, 512)  # OpenMP is awake in this process

            class Result:
                def __init__(self, value): self.value = value

            def work(x):
                t = torch.full((), float(x))
                dist.all_reduce(t)
                return Result(t.item() + helper_beside_the_script.ONE)

            results = launch.run(work, 2, 4)
            assert all(type(result) is Result for result in results)
            print("got", [result.value for result in results])
        """)
    )
    (tmp_path / "helper_beside_the_script.py").write_text("ONE = 1\n")
    done = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "got [9.0, 9.0]\n"), done.stderr


def test_a_function_loaded_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import sheaf.launch\n\nBASE = 40\n\ndef work(x):\n    return BASE + x\n")
    source = launch.FromFile(str(file), "work")
    # The one travels by value, the other is read there.
    assert launch.run(lambda work, source: (work(2), source.load()(3)), 1, source.load(), source) == [(42, 43)]
    with pytest.raises(TaskError, match="did you mean work"):
        launch.FromFile(str(file), "wrk").load()
    with pytest.raises(TaskError, match="not a Python file"):
        launch.FromFile(str(tmp_path / "none.py"), "work").load()


def test_what_cannot_travel_is_told_before_anything_starts(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.raises(RunError, match=r"cannot be sent to them.*lock.*FILE.py:NAME"):
        launch.run(worker_functions.place, 2, threading.Lock())


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")])
def test_a_signal_reaches_every_worker_once_and_they_may_end_by_themselves(program, tmp_path, number, name):
    parent = _parent(program, tmp_path, "until_asked")
    _pids(tmp_path)
    parent.send_signal(number)
    out, err = parent.communicate(timeout=90)
    assert (parent.returncode, out) == (0, f"{[[name], [name]]}\n"), err


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)])
def test_no_worker_outlives_its_launcher(program, tmp_path, number, status):
    parent = _parent(program, tmp_path, "for_ever")
    pids = _pids(tmp_path)
    parent.send_signal(number)
    parent.communicate(timeout=90)
    assert parent.returncode == status
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(psutil.pid_exists(pid) for pid in pids)


def _parent(program, directory, function):
    (directory / "parent.py").write_text(
        "import pathlib, sys, worker_functions; from sheaf import launch\n"
        f"print(launch.run(worker_functions.{function}, 2, pathlib.Path(sys.argv[1])))"
    )
    return program(directory / "parent.py", str(directory), path=[str(SOURCE), str(HERE)])


def _pids(directory):
    deadline = time.monotonic() + 90
    while len(written := [path.read_text() for path in directory.glob("pid_?")]) < 2 or "" in written:
        assert time.monotonic() < deadline, "the workers do not start"
        time.sleep(0.02)
    return [int(text) for text in written]
