from collections.abc import Iterator

import pytest

from tests.support.cluster import SERVE_STAND_IN, WITH_FAKE_STRIPE, Cluster, running_cluster


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """What `make serve` runs: the packaged model on a real Ray Serve cluster.

    The last of its tests, by name, stops it for good.
    """
    with running_cluster(tmp_path_factory.mktemp("cluster") / "data") as running:
        yield running


@pytest.fixture(scope="package")
def stand_in_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real cluster whose models are stand-ins, which fail when a test's actions ask them to."""
    with running_cluster(tmp_path_factory.mktemp("stand-in") / "data", (*WITH_FAKE_STRIPE, *SERVE_STAND_IN)) as running:
        yield running
