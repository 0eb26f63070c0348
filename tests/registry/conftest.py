"""One SQLite store for all tests here, as MLflow takes seconds to make one; each test has its own names."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from crowdray.registry.connection import connect
from crowdray.registry.packaging import Package, package_counter

from ..support.counters import METRICS, TAGS, PlainCounter, Repackage, photo


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tracking URI of a store that exists."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    connect(uri, timeout_s=60)
    return uri


@pytest.fixture(scope="session")
def counter() -> PlainCounter:
    return PlainCounter().eval()


@pytest.fixture(scope="session")
def package(counter: PlainCounter, tmp_path_factory: pytest.TempPathFactory) -> Package:
    folder = tmp_path_factory.mktemp("package") / "model"
    return package_counter(counter, photo(1, 240, 320), folder, config={"seed": 0}, metrics=METRICS, tags=TAGS)


@pytest.fixture(scope="session")
def other_package(repackage: Repackage, tmp_path_factory: pytest.TempPathFactory) -> Package:
    """A package with other weights."""
    return repackage(PlainCounter(seed=1), tmp_path_factory.mktemp("package") / "other")


@pytest.fixture
def closed_port() -> str:
    """The address of a server that is not there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that accepts and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(scope="session")
def repackage() -> Repackage:
    """Package a counter with the usual example and provenance."""

    def made(counter: nn.Module, folder: Path) -> Package:
        return package_counter(counter, photo(1, 90, 120), folder, config={}, metrics=METRICS, tags=TAGS)

    return made
