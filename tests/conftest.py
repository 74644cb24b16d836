"""Fixtures for every test. Nothing here imports sheaf at the top: rooms are imported where they are used."""

import atexit
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from pool import Pool

collect_ignore_glob = ["*conftest.py"]  # two of one name cannot both be searched for doctests
torch.set_num_threads(1)  # models are tiny here, and threads of several processes wait for each other's cores

# No deadline, no limit on how long examples take to make: both tell how busy the machine is. The same examples at each
# run, so that a change is judged by what it changed; `make nightly` looks for new ones.
hypothesis.settings.register_profile(
    "sheaf",
    deadline=None,
    derandomize=not os.environ.get("SHEAF_NIGHTLY"),
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("sheaf")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "thinned(n): of its cases, every n-th runs; with SHEAF_NIGHTLY=1 all do")
    config.addinivalue_line("markers", "nightly: another test has its path for less; runs with SHEAF_NIGHTLY=1 only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep `make test` short: `make nightly` runs what is left out here."""
    if os.environ.get("SHEAF_NIGHTLY") or any("[" in argument or "::" in argument for argument in config.args):
        return
    seen: dict[str, int] = {}
    left_out: list[pytest.Item] = []
    for item in items:
        marker = item.get_closest_marker("thinned")
        if item.get_closest_marker("nightly"):
            left_out.append(item)
        elif marker is not None:
            name = item.nodeid.partition("[")[0]
            seen[name] = seen.get(name, -1) + 1
            if seen[name] % marker.args[0]:
                left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Look for no garbage while tests are imported, nor later in what that made: nearly all of it stays."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    """The session's ranks; tests take `ranks`."""
    session_pool = Pool(instrumented=request.config.getoption("jaxtyping_packages"))
    atexit.register(session_pool.close)
    yield session_pool
    session_pool.close()
    atexit.unregister(session_pool.close)


@pytest.fixture(scope="session", autouse=True)
def started_cold(pool: Pool) -> Iterator[Callable[..., Any]]:
    """`sheaf.launch` forks its workers from the pool's process; what it starts otherwise, a program, is the value."""
    from sheaf.launch import local

    start = local._start
    with pytest.MonkeyPatch.context() as patched:
        if sys.platform == "linux":
            patched.setattr(local, "_start", pool.nursery)
        yield start


@pytest.fixture
def program(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Python with a file, as `subprocess.Popen` starts it: `program(file, *arguments, path=[...])`.

    Forked from the pool's process, so that nothing is imported again; with SHEAF_NIGHTLY=1 really started.
    """

    def started(file: Path, *arguments: str, path: list[str]) -> Any:
        if not os.environ.get("SHEAF_NIGHTLY") and sys.platform == "linux":
            return pool.program(file, list(arguments), path, tmp_path_factory.mktemp("written"))
        return subprocess.Popen(
            [sys.executable, str(file), *arguments],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return started


@pytest.fixture
def cold_launch(started_cold: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """`sheaf.launch` as users have it: seconds slower."""
    from sheaf.launch import local

    monkeypatch.setattr(local, "_start", started_cold)


@pytest.fixture
def ranks(pool: Pool) -> Pool:
    """Real gloo ranks: `ranks(function, world=4, *args, timeout_s=100, **kwargs)` gives what each rank returned."""
    return pool
