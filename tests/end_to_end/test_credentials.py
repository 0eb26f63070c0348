"""Jobs use the credentials of every URI that they get, on all nodes, and write and print none of them."""

import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, urlsplit

import pytest
from PIL import Image

from ..support.cluster import Cluster, free_port, listens
from ..support.processes import Job, descendants, job_command, until
from .conftest import Workspace

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(400)]

CANARY = "canary-"
LOGIN, TOKEN = f"{CANARY}user:{CANARY}password", f"{CANARY}token-of-some-length"
QUERY = f"?token={TOKEN}"


class _Protected(SimpleHTTPRequestHandler):
    """Files for those who log in and send the token."""

    def _denies(self) -> bool:
        login = "Basic " + base64.b64encode(LOGIN.encode()).decode()
        allowed = self.headers["Authorization"] == login and parse_qs(urlsplit(self.path).query)["token"] == [TOKEN]
        if not allowed:
            self.send_error(401)
        return not allowed

    def do_GET(self) -> None:
        if not self._denies():
            super().do_GET()

    def do_HEAD(self) -> None:
        if not self._denies():
            super().do_HEAD()

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def web(workspace: Workspace) -> Iterator[str]:
    """The folder of the workspace behind a login."""
    Image.new("RGB", (96, 64)).save(workspace.folder / "photo.png")
    handler = partial(_Protected, directory=str(workspace.folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://{LOGIN}@127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address and folder of an MLflow server, which accepts any login."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    command = [str(Path(sys.executable).with_name("mlflow")), "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder)]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    silent = subprocess.DEVNULL
    server = subprocess.Popen(command, env=environment, cwd=folder, stdout=silent, stderr=silent)
    try:
        until(lambda: listens(port), 120, "the MLflow server did not start")
        yield f"127.0.0.1:{port}", folder
    finally:
        for pid in [*descendants(server.pid), server.pid]:
            os.kill(pid, signal.SIGTERM)
        server.wait(timeout=30)


@pytest.fixture
def run(cluster: Cluster, tracking: tuple[str, Path], tmp_path: Path) -> Callable[..., None]:
    """Function that runs a job on the cluster; no file of it, of Ray or of MLflow has a credential then."""
    address, server = tracking
    environment = {
        **cluster.environment,
        "RAY_ADDRESS": cluster.address,
        "MLFLOW_TRACKING_URI": f"http://{LOGIN}@{address}",
        "CROWDRAY_CACHE": str(tmp_path / "cache"),
        "TMPDIR": str(tmp_path),
    }

    def run_job(script: str, *arguments: str) -> None:
        job = Job(job_command(script, arguments), environment, tmp_path)
        assert job.end() == 0, job.output
        assert CANARY not in job.output
        folders = [tmp_path, server, *map(Path, cluster.folders)]
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        assert len(files) > 50
        assert [path for path in files if CANARY.encode() in path.read_bytes()] == []

    return run_job


def test_train_and_predict_with_credentials_write_none(
    run: Callable[..., None], web: str, tracking: tuple[str, Path], tmp_path: Path
) -> None:
    options = ["--preset", "debug", "--storage", "runs", "--json", "out.json"]
    run("train.py", "--data", f"{web}/data{QUERY}", *options)
    outcome = json.loads((tmp_path / "out.json").read_text())
    assert outcome["run_url"].startswith(f"http://{tracking[0]}/#/")
    run("predict.py", "--model", outcome["registered"], "--input", f"{web}/photo.png{QUERY}", "--output", "counts")


@pytest.mark.slow
def test_tune_with_credentials_writes_none(run: Callable[..., None], web: str, tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/trials.db{QUERY}"
    options = ["--preset", "debug", "--storage", "runs", "--trials", "1", "--database", database]
    run("tune.py", "--data", f"{web}/data{QUERY}", *options)
    assert (tmp_path / "trials.db").is_file()
