"""`ray job submit --working-dir .` on a cluster that has nothing but our dependencies."""

import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Workplace
from .processes import ROOT, alive, descendants, until

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(400)]

RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def cluster(workplace: Workplace) -> Iterator[tuple[str, dict[str, str]]]:
    """The job address of a Ray head of our own, and the environment in which one may speak to it."""
    assert importlib.util.find_spec("aiohttp_cors"), "job submission needs ray[default]: make setup"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    environment = {**workplace.environment, **access, "PATH": path}
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # its sockets' paths must stay short
    jobs = free_port()
    options = {"port": free_port(), "dashboard-port": jobs, "dashboard-agent-listen-port": free_port(), "num-cpus": 2}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    head = subprocess.Popen(
        [RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}", *arguments],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until(lambda: listens(jobs), 60, "the head's job server did not start")
        yield f"http://127.0.0.1:{jobs}", environment
    finally:
        for pid in filter(alive, [*descendants(head.pid), head.pid]):
            os.kill(pid, signal.SIGKILL)
        head.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_submitted_training_brings_its_own_code(
    workplace: Workplace, cluster: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    address, environment = cluster
    told = {"env_vars": {"MLFLOW_TRACKING_URI": workplace.environment["MLFLOW_TRACKING_URI"]}}
    job = ["python", "jobs/train.py", "--preset", "debug", "--data", str(workplace.data), "--workers", "2"]
    job += ["--storage", str(tmp_path / "runs"), "--name", "submitted", "--json", str(tmp_path / "out.json")]
    submit = [RAY, "job", "submit", "--address", address, "--working-dir", ".", "--runtime-env-json", json.dumps(told)]
    done = subprocess.run([*submit, "--", *job], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stdout + done.stderr
    outcome = json.loads((tmp_path / "out.json").read_text())
    assert outcome["registered"].startswith("models:/crowdray-synthetic/")
    assert outcome["run"] == str(tmp_path / "runs" / "submitted")
