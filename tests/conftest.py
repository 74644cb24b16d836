"""Fixtures for every test. Nothing here imports sheaf at the top: rooms are imported where they are used."""

import atexit
from collections.abc import Iterator

import pytest

from pool import Pool


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
