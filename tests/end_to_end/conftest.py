"""A small dataset, a Ray cluster, and one uninterrupted training run that was submitted to it."""

import importlib.util
import json
import os
import secrets
import shutil
import sqlite3
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ..support.cluster import Cluster, free_port, kill, listens
from ..support.processes import Job, job_command, until

LENGTH = ("--stages.decoders.epochs", "12")
"""Long enough to kill the job in the middle of the second stage."""


@dataclass(frozen=True)
class Workspace:
    """Folder, data and environment of the jobs under test."""

    folder: Path
    data: Path
    environment: Mapping[str, str]
    started: list[Job] = field(default_factory=list)

    @property
    def tracking_uri(self) -> str:
        """URI of the tracking store."""
        return self.environment["MLFLOW_TRACKING_URI"]

    def arguments(self, name: str) -> list[str]:
        """Options of a run or study with a stage cache of its own."""
        folder = self.folder
        options = ["--preset", "debug", "--data", str(self.data), "--name", name, "--storage", str(folder / "runs")]
        return [*options, "--stage-cache", str(folder / f"stages-{name}"), "--json", str(folder / f"{name}.json")]

    def train(self, name: str, *overrides: str, workers: int = 2) -> Job:
        """Start a training run on a Ray of its own; without overrides, the run that the tests compare with."""
        options = [*self.arguments(name), "--workers", str(workers), *(overrides or LENGTH)]
        return self.start("train.py", options)

    def tune(self, name: str, trials: int, *overrides: str) -> Job:
        """Start a study that runs one trial at a time, on a Ray of its own."""
        options = ["--trials", str(trials), "--concurrent", "1", *overrides]
        return self.start("tune.py", [*self.arguments(name), *options])

    def start(self, script: str, options: list[str]) -> Job:
        """Start a job outside the repository: jobs must not depend on the working directory."""
        self.started.append(Job(job_command(script, options), self.environment, self.folder))
        return self.started[-1]

    def outcome(self, name: str) -> dict[str, Any]:
        """The JSON result of a job."""
        content: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
        return content

    def query(self, sql: str, *values: str) -> list[Any]:
        """Rows of the tracking store."""
        with sqlite3.connect(self.folder / "mlflow.db") as database:
            return database.execute(sql, values).fetchall()

    def assert_tracked_once(self, name: str, epochs: int) -> None:
        """There is one finished MLflow run of that name, and each metric has each epoch exactly once."""
        runs = self.query("select run_uuid, status from runs where name = ?", name)
        assert [status for _, status in runs] == ["FINISHED"]
        steps = "select step from metrics where run_uuid = ? and key = 'system/epoch' order by step"
        assert [step for (step,) in self.query(steps, runs[0][0])] == list(range(1, epochs + 1))
        self.assert_no_duplicates(runs[0][0])

    def assert_no_duplicates(self, run: str) -> None:
        """Each metric of an MLflow run has each step at most once."""
        duplicates = "select key, step from metrics where run_uuid = ? group by key, step having count(*) > 1"
        assert self.query(duplicates, run) == []


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    folder = tmp_path_factory.mktemp("workspace")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "PYTEST_"))}
    environment = {**inherited, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    data = folder / "data"
    options = ["synthetic", "--dest", str(data), "--train", "24", "--test", "6", "--width", "128", "--height", "96"]
    job = Job(job_command("convert.py", options), environment, folder)
    assert job.end() == 0, job.output
    created = Workspace(folder, data, environment)
    yield created
    for started in created.started:
        if started.running:  # a test failed before the job ended
            started.kill()


@pytest.fixture(scope="session")
def cluster(workspace: Workspace) -> Iterator[Cluster]:
    """A head and two worker nodes of one CPU each, with the environment that has their token."""
    assert importlib.util.find_spec("aiohttp_cors"), "job submission needs ray[default]: make setup"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    environment = {**workspace.environment, **access, "PATH": path}
    port, jobs = free_port(), free_port()
    cluster = Cluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{jobs}", environment)
    try:
        cluster.start("--head", f"--port={port}", f"--dashboard-port={jobs}")
        until(lambda: listens(jobs), 60, "the head's job server did not start")
        cluster.start()
        cluster.start()
        yield cluster
    finally:
        for node in reversed(cluster.nodes):
            kill(node)
        for folder in cluster.folders:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def reference_run(workspace: Workspace, cluster: Cluster) -> Job:
    """The uninterrupted training run, submitted to the cluster from the working tree."""
    options = [*workspace.arguments("reference"), "--workers", "2", *LENGTH]
    job = cluster.submit("train.py", options, workspace.tracking_uri)
    assert job.end() == 0, job.output
    return job
