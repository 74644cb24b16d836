"""Fixtures for every test. Nothing here imports sheaf at the top: rooms are imported where they are used."""

import atexit
import os
from collections.abc import Iterator

import pytest

from pool import Pool


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "thinned(n): of its cases, every n-th runs; with SHEAF_NIGHTLY=1 all do")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep `make test` short: `make nightly` runs what is left out here."""
    if os.environ.get("SHEAF_NIGHTLY") or any("[" in argument for argument in config.args):
        return
    seen: dict[str, int] = {}
    left_out: list[pytest.Item] = []
    for item in items:
        marker = item.get_closest_marker("thinned")
        if marker is not None:
            name = item.nodeid.partition("[")[0]
            seen[name] = seen.get(name, -1) + 1
            if seen[name] % marker.args[0]:
                left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(scope="session")
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    """The session's ranks; tests take `ranks`."""
    session_pool = Pool(instrumented=request.config.getoption("jaxtyping_packages"))
    atexit.register(session_pool.close)
    yield session_pool
    session_pool.close()
    atexit.unregister(session_pool.close)


@pytest.fixture
def ranks(pool: Pool) -> Pool:
    """Real gloo ranks: `ranks(function, world=4, *args, timeout_s=60, **kwargs)` gives what each rank returned."""
    return pool
