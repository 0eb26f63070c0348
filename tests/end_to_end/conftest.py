"""A small dataset, and one training of it that nobody disturbed."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ..support.processes import Job

LENGTH = ("--stages.decoders.epochs", "20")
"""Long enough to be caught in the middle of the second stage."""


@dataclass(frozen=True)
class Workplace:
    """Where the jobs of these tests work."""

    folder: Path
    data: Path
    environment: Mapping[str, str]
    started: list[Job] = field(default_factory=list)

    @property
    def tracking(self) -> Path:
        """The tracking store's file."""
        return self.folder / "mlflow.db"

    def train(self, name: str, *overrides: str, workers: int = 2) -> Job:
        """Start a training under a name of its own, with a stage store of its own; without overrides it is the one that
        all tests here compare."""
        arguments = ["--preset", "debug", "--data", str(self.data), "--workers", str(workers), "--name", name]
        arguments += ["--store", f"stages-{name}", "--json", f"{name}.json", *(overrides or LENGTH)]
        self.started.append(Job("train.py", arguments, self.environment, self.folder))
        return self.started[-1]

    def tune(self, name: str, trials: int) -> Job:
        """Start a study of its own, one trial at a time, with a stage store of its own."""
        arguments = ["--preset", "debug", "--data", str(self.data), "--trials", str(trials), "--name", name]
        arguments += ["--concurrent", "1", "--prune", "False", "--store", f"stages-{name}", "--json", f"{name}.json"]
        self.started.append(Job("tune.py", arguments, self.environment, self.folder))
        return self.started[-1]

    def outcome(self, name: str) -> dict[str, Any]:
        """What a training wrote for machines."""
        content: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
        return content


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    folder = tmp_path_factory.mktemp("workplace")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "PYTEST_"))}
    environment = {**inherited, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    data = folder / "data"
    arguments = ["synthetic", "--dest", str(data), "--train", "24", "--test", "6", "--width", "128"]
    job = Job("convert.py", [*arguments, "--height", "96"], environment, folder)
    assert job.end() == 0, job.output
    place = Workplace(folder, data, environment)
    yield place
    for started in place.started:
        if started.running:  # a test failed while it waited
            started.kill()


@pytest.fixture(scope="session")
def unbroken(workplace: Workplace) -> Job:
    """The training from its start to its end."""
    job = workplace.train("unbroken")
    assert job.end() == 0, job.output
    return job
