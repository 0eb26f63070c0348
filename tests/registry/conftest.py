"""One SQLite store for all tests here, as creating one takes seconds; each test uses its own names."""

import contextlib
import socket
from collections.abc import Iterator

import pytest

from crowdray.models.export import ExportedCounter
from crowdray.registry.connection import connect, sqlite_uri
from crowdray.registry.packaging import Package, package_counter

from ..conftest import ODD_FOLDER
from ..support.cluster import free_port
from ..support.counters import METRICS, TAGS, exported_counter, photo


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tracking URI of an existing store."""
    # MLflow's own loader, which a test calls, decodes paths of artifacts once too often.
    folder = tmp_path_factory.mktemp("mlflow") / ODD_FOLDER.replace("%25", "%")
    folder.mkdir()
    uri = sqlite_uri(folder / "mlflow.db")
    with contextlib.chdir(folder):
        connect(uri, timeout_s=60)
    return uri


@pytest.fixture(scope="session")
def counter() -> ExportedCounter:
    return exported_counter()


@pytest.fixture(scope="session")
def package(counter: ExportedCounter, tmp_path_factory: pytest.TempPathFactory) -> Package:
    folder = tmp_path_factory.mktemp("package") / "model"
    return package_counter(counter, photo(1, 240, 320), folder, config={"seed": 0}, metrics=METRICS, tags=TAGS)


@pytest.fixture(scope="session")
def other_package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """A package with other weights."""
    folder = tmp_path_factory.mktemp("package") / "other"
    return package_counter(exported_counter(seed=1), photo(1, 90, 120), folder, config={}, metrics=METRICS, tags=TAGS)


@pytest.fixture
def closed_port() -> str:
    """Address on which no server listens."""
    return f"http://127.0.0.1:{free_port()}"


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Address of a server that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
