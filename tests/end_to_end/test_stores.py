"""A training run on an object store with injected faults equals one on a local disk."""

import dataclasses
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs
import torch

from crowdray import storage
from crowdray.config import NumericsConfig
from crowdray.data.shards import Dataset, write_index
from crowdray.documents import parse_document
from crowdray.presets import preset
from crowdray.registry.connection import connect
from crowdray.registry.loading import load_counter
from crowdray.stage_cache.keys import StageKey
from crowdray.stage_cache.store import StageStore
from crowdray.training.checkpoint import MEASURED_METRICS
from crowdray.training.distributed import World
from crowdray.training.result import TrainingResult, final_result
from crowdray.training.trainer import Trainer

from ..support.processes import Job, job_command
from ..support.stores import Kind, Store, moto

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(400)]


TRANSIENT_FAULTS: tuple[tuple[Kind, str, str], ...] = (
    ("cut", "/data/shard", "GET"),
    ("short", "/data/shard", "GET"),
    ("error", "/data/index", "GET"),
    ("error", "/runs/faulty/run.json", "GET"),
    ("error", "/runs/faulty/checkpoint", "PUT"),
    ("cut", "/runs/faulty/checkpoint.*safetensors", "GET"),
    ("short", "/runs/faulty/checkpoint.*safetensors", "GET"),
    ("lost", "/runs/faulty/trained/result.json", "PUT"),
    ("error", "/runs/stages/.*manifest.json", "PUT"),
    ("cut", "/runs/faulty/trained/weights", "GET"),
    ("error", "/artifacts/", "PUT"),
)


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    """An S3 store that this process can reach too."""
    with moto() as made, pytest.MonkeyPatch.context() as patch:
        for name, value in made.environment.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield made
        s3fs.S3FileSystem.clear_instance_cache()


def uploaded(dataset: Dataset, uri: str) -> str:
    """Copy a dataset to another URI."""
    for shard in dataset.index.shards:
        content = storage.read_bytes(storage.join(dataset.uri, shard.path))
        storage.write_bytes(storage.join(uri, shard.path), content)
    index = dataset.index
    write_index(uri, index.shards, source=index.name, depth_teacher=index.depth_teacher, notes=index.notes)
    return uri


@pytest.fixture
def tracking(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def train(store: Store, tmp_path: Path, tracking: str) -> Iterator[Callable[..., Job]]:
    """Function that starts a training job with access to the store."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "PYTEST_"))}
    settings = {"MLFLOW_TRACKING_URI": tracking, "CROWDRAY_CACHE": str(tmp_path / "cache")}
    started: list[Job] = []

    def start(*arguments: str) -> Job:
        environment = {**inherited, **store.environment, **settings}
        started.append(Job(job_command("train.py", ["--preset", "debug", *arguments]), environment, tmp_path))
        return started[-1]

    yield start
    for job in started:
        if job.running:  # the test failed before the job ended
            job.kill()


def assert_refused(job: Job, message: str) -> None:
    """It ends with one error, which says so."""
    assert job.end() == 2, job.output
    assert len(re.findall("^error", job.output, re.MULTILINE)) == 1, job.output
    assert re.search(message, " ".join(job.output.split())), job.output
    assert "Traceback" not in job.output


def without_clocks(result: TrainingResult) -> dict[str, Any]:
    content = parse_document(result.to_json())
    content["history"] = [{k: v for k, v in row.items() if k not in MEASURED_METRICS} for row in content["history"]]
    return content


def test_train_on_faulty_store_equals_local_run(
    discs: Dataset, store: Store, tmp_path: Path, tracking: str, train: Callable[..., Job]
) -> None:
    data = uploaded(discs, f"{store.uri}/data")
    connect(tracking, 60).create_experiment(f"crowdray-{discs.index.name}", artifact_location=f"{store.uri}/artifacts")
    arguments = ["--data", data, "--storage", f"{store.uri}/runs", "--name", "faulty", "--json", "out.json"]
    arguments += ["--numerics.threads", "1"]

    expired = store.proxy.inject("expired", "/runs/faulty/checkpoint-00002", method="PUT", times=1000)
    for kind, path, method in TRANSIENT_FAULTS:
        store.proxy.inject(kind, path, method=method)
    slow = store.proxy.inject("slow", "/data/shard")
    job = train(*arguments)
    assert slow.stalled.wait(120), job.output
    time.sleep(2)
    slow.resume.set()
    assert_refused(job, "token has expired.*renew your credentials")
    expired.times = 0

    job = train(*arguments)
    assert job.end() == 0, job.output
    assert [(fault.kind, fault.path) for fault in store.proxy.faults if fault.times] == []

    outcome = json.loads((tmp_path / "out.json").read_text())
    found = TrainingResult.from_json(json.dumps(outcome["result"]), "out.json")
    config = dataclasses.replace(preset("debug"), numerics=NumericsConfig(threads=1))
    local_run = Trainer(config, discs, world=World(), device=torch.device("cpu"))
    local_run.fit(lambda row, save: None)
    assert without_clocks(found) == without_clocks(final_result(local_run))

    image = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    registered = load_counter(outcome["registered"], tracking_uri=tracking)
    assert torch.equal(registered(image), load_counter(outcome["model"])(image))
    assert any("/artifacts/" in path and path.endswith("overview.png") for _, path in store.proxy.requests)
    stage_cache = StageStore(f"{store.uri}/runs/stages", 10**9)
    stored = {file.name.split("/")[0] for file in storage.find_files(f"{store.uri}/runs/stages/states")}
    assert len(stored) == 3
    for key in stored:
        names = storage.find_files(f"{store.uri}/runs/stages/states/{key}")
        for epoch in {int(file.name.split("/")[0]) for file in names}:
            assert stage_cache.load(StageKey(key, "", epoch), epoch) is not None
