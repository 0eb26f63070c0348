"""A small dataset and one uninterrupted training run on it."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ..support.processes import Job

LENGTH = ("--stages.decoders.epochs", "20")
"""Long enough to kill the job in the middle of the second stage."""


@dataclass(frozen=True)
class Workspace:
    """Folder, data and environment of the jobs under test."""

    folder: Path
    data: Path
    environment: Mapping[str, str]
    started: list[Job] = field(default_factory=list)

    @property
    def tracking(self) -> Path:
        """The tracking store's file."""
        return self.folder / "mlflow.db"

    def train(self, name: str, *overrides: str, workers: int = 2) -> Job:
        """Start a training run with its own stage cache; without overrides, the run that the tests compare with."""
        arguments = ["--preset", "debug", "--data", str(self.data), "--workers", str(workers), "--name", name]
        arguments += ["--stage-cache", f"stages-{name}", "--json", f"{name}.json", *(overrides or LENGTH)]
        self.started.append(Job("train.py", arguments, self.environment, self.folder))
        return self.started[-1]

    def tune(self, name: str, trials: int) -> Job:
        """Start a study with a stage cache of its own, one trial at a time."""
        arguments = ["--preset", "debug", "--data", str(self.data), "--trials", str(trials), "--name", name]
        arguments += ["--concurrent", "1", "--prune", "False"]
        arguments += ["--stage-cache", f"stages-{name}", "--json", f"{name}.json"]
        self.started.append(Job("tune.py", arguments, self.environment, self.folder))
        return self.started[-1]

    def outcome(self, name: str) -> dict[str, Any]:
        """The JSON result of a job."""
        content: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
        return content


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    folder = tmp_path_factory.mktemp("workspace")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "PYTEST_"))}
    environment = {**inherited, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    data = folder / "data"
    arguments = ["synthetic", "--dest", str(data), "--train", "24", "--test", "6", "--width", "128"]
    job = Job("convert.py", [*arguments, "--height", "96"], environment, folder)
    assert job.end() == 0, job.output
    created = Workspace(folder, data, environment)
    yield created
    for started in created.started:
        if started.running:  # a test failed before the job ended
            started.kill()


@pytest.fixture(scope="session")
def reference_run(workspace: Workspace) -> Job:
    """The uninterrupted training run."""
    job = workspace.train("reference")
    assert job.end() == 0, job.output
    return job
