"""One cluster for all of these tests."""

from collections.abc import Iterator

import pytest

from tests.ray.cluster import Cluster, running


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("ray")) as started:
        yield started
