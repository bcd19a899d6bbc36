"""What all tests share: an application in this process, and fresh databases of each kind.

PostgreSQL comes with the test dependencies; `DATABASE_URL` points the tests at another server, whose user must be
allowed to create databases.
"""

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from sqlalchemy import make_url
from xdist.scheduler import LoadScopeScheduling

from tests.support.app import App, running_app
from tests.support.databases import Databases, postgresql_server

# A landing must not depend on luck, so examples are the same every time; `make fuzz` looks for new ones.
hypothesis.settings.register_profile("steady", derandomize=True, deadline=None)
hypothesis.settings.register_profile("fuzz", max_examples=2_000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))

E2E = Path(__file__).parent / "e2e"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small gain little from a second thread, and lose much to waiting for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[App]:
    async with running_app(tmp_path) as running:
        yield running


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    given = os.environ.get("DATABASE_URL", "")
    if given.startswith("postgres"):
        yield make_url(given).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
        return
    with postgresql_server() as url:
        yield url


@pytest.fixture(scope="session")
def sqlite_databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Databases]:
    databases = Databases("sqlite", "", tmp_path_factory.mktemp("databases"))
    yield databases
    databases.close()


@pytest.fixture(scope="session")
def postgresql_databases(postgresql_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Databases]:
    databases = Databases("postgresql", postgresql_url, tmp_path_factory.mktemp("databases"))
    yield databases
    databases.close()


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def databases(request: pytest.FixtureRequest) -> Databases:
    """Of each kind in turn. The fixtures that make them stay, however often a process changes from one to the other."""
    databases: Databases = request.getfixturevalue(f"{request.param}_databases")
    return databases


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if E2E in item.path.parents:
            item.add_marker("e2e")
    # What needs the cluster of `make serve` comes first: its last test stops it, so that only then two run at once.
    items.sort(key=lambda item: (E2E not in item.path.parents, "cluster" not in getattr(item, "fixturenames", ())))


class OneClusterAtATime(LoadScopeScheduling):
    """Gives each file to one process of `pytest -n`, and all that start a cluster to one of them."""

    def _split_scope(self, nodeid: str) -> str:
        return "e2e" if nodeid.startswith("tests/e2e/") else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneClusterAtATime:
    """xdist's own `loadgroup` writes groups into ids where pytest 9.2 no longer reads them: it groups nothing."""
    return OneClusterAtATime(config, log)
