import os
from collections.abc import AsyncIterator
from pathlib import Path

import hypothesis
import pytest

from tests.support.app import App, running_app

# A landing must not depend on luck, so examples are the same every time; `make fuzz` looks for new ones.
hypothesis.settings.register_profile("steady", derandomize=True, deadline=None)
hypothesis.settings.register_profile("fuzz", max_examples=2_000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))

E2E = Path(__file__).parent / "e2e"


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[App]:
    async with running_app(tmp_path) as running:
        yield running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each file to one process of `pytest -n`, and all that start a cluster to one of them, before the others."""
    for item in items:
        if E2E in item.path.parents:
            item.add_marker("e2e")
        item.add_marker(pytest.mark.xdist_group("e2e" if E2E in item.path.parents else str(item.path)))
    items.sort(key=lambda item: E2E not in item.path.parents)
