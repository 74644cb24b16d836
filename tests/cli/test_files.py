"""FILE.py:NAME finds a task, and every way to miss it is told."""

import os
import sys
from pathlib import Path

import pytest

from sheaf.cli.files import load, own_source
from sheaf.errors import TaskError
from sheaf.launch import FromFile

TASK = """
import torch
from sheaf.task import Task

def make(batch=4):
    return Task(model=lambda: torch.nn.Linear(2, 1), loss=lambda output, batch: output.mean(),
                optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
                data=[(torch.zeros(2), 0.0)] * 8, batch=batch)
"""


@pytest.fixture
def write(tmp_path):
    """Write a file and give its path; forget it afterwards."""
    names, path_before = set(sys.modules), list(sys.path)

    def written(text, name="mine.py", prelude=TASK):
        path = tmp_path / name
        path.write_text(prelude + text)
        return str(path)

    yield written
    sys.path[:] = path_before
    for name in set(sys.modules) - names:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def told(reference):
    with pytest.raises(TaskError) as caught:
        load(reference)
    return str(caught.value)


def test_a_task_and_a_function_that_returns_one(write):
    path = write("task = make\nother = make(batch=2)\n")
    assert load(path).batch == 4
    assert load(f"{path}:other").batch == 2
    assert load(f"{path}:make").batch == 4


def test_a_file_may_import_its_neighbours(write):
    write("NUMBER = 3\n", "neighbour_of_mine.py", prelude="")
    assert load(write("from neighbour_of_mine import NUMBER\ntask = make(NUMBER)\n")).batch == 3


def test_a_file_named_like_a_module_hides_it_from_nobody(write):
    assert load(write("task = make\n", "random.py")).batch == 4
    assert Path(sys.modules["random"].__file__).parent == Path(os.__file__).parent


@pytest.mark.parametrize("reference", ["mine", "mine.txt", "dp=2", ""])
def test_no_python_file(reference):
    assert "FILE.py" in told(reference)


def test_no_such_file_names_its_neighbour(write, tmp_path):
    write("task = make\n", "train_me.py")
    assert told(str(tmp_path / "train_mee.py")).endswith("no such file; did you mean train_me.py?")
    assert told(str(tmp_path / "nowhere" / "x.py")).endswith("no such file")


def test_no_task_in_it_lists_what_there_is(write):
    path = write("first = make()\n_hidden = 3\n")
    assert "has no 'task'; it holds Tasks first and functions make: write" in told(path)
    assert "did you mean first?" in told(f"{path}:frist")
    assert "holds no Task and no function" in told(write("x = 3\n", "empty.py", prelude=""))


def test_a_file_that_raises_shows_the_users_own_line(write):
    path = write("def broken():\n    return 1 / 0\n\ntask = broken()\n")
    message = told(path)
    assert message.startswith("reading mine.py raised ZeroDivisionError:")
    assert "return 1 / 0" in message
    assert "importlib" not in message
    assert "cli/files.py" not in message


def test_a_function_that_raises_shows_the_users_own_line(write):
    message = told(write("def task():\n    return {}['key']\n"))
    assert message.startswith("task() of mine.py raised KeyError:")
    assert "return {}['key']" in message
    assert "cli/files.py" not in message


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("def task(:\n", "SyntaxError"),
        ("import no_such_package_at_all\n", "No module named"),
        ("raise SystemExit(3)\n", "SystemExit"),
    ],
)
def test_files_that_cannot_be_read(write, text, word):
    assert word in told(write(text))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("task = 3\n", "is an int; wanted a sheaf.Task"),
        ("def task():\n    pass\n", "task() returned None; wanted a sheaf.Task"),
        ("def task(size, *, depth, name='x'):\n    pass\n", "needs arguments (size, depth); give them defaults"),
    ],
)
def test_things_of_another_type(write, text, word):
    assert word in told(write(text))


def test_the_tasks_own_faults_are_told_as_they_are(write):
    assert told(write("def task():\n    return make(batch=0)\n")) == "batch=0: at least one sample per step is needed"


def test_a_task_that_cannot_be_sent_is_found_by_each_worker(write):
    path = write(
        "import threading\n"
        "from dataclasses import replace\n"
        "def task():\n"
        "    return replace(make(), data=[threading.Lock()] * 8)\n"
    )
    assert own_source(load(f"{path}:make"), f"{path}:make") is None
    assert own_source(load(path), path) == FromFile(path, "task")


def test_a_task_without_a_name_takes_the_files(write):
    path = write("task = make\nother = make(batch=2)\nnamed = Task(**(vars(other) | {'name': 'mine'}))\n", "digits.py")
    assert [load(f"{path}{what}").name for what in ("", ":other", ":named")] == ["digits", "digits_other", "mine"]
