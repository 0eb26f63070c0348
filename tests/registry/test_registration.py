"""A version is registered once, leads back to its run, and loads where our code is unknown."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from crowdray.errors import UserError
from crowdray.registry import registration
from crowdray.registry.loading import load_counter
from crowdray.registry.packaging import Package
from crowdray.registry.registration import RegisteredVersion, register
from crowdray.registry.tracking import open_tracker

from ..support.counters import METRICS, TAGS, PlainCounter, photo


def _run(store: str, key: str) -> str:
    tracker = open_tracker(store, "registration", "a run", key)
    assert tracker.run_id is not None
    return tracker.run_id


def test_same_run_registers_once_and_lineage_leads_both_ways(store: str, package: Package) -> None:
    run_id = _run(store, "once")
    first = register(package, "crowdray-once", run_id, 7, store)
    again = register(package, "crowdray-once", run_id, 7, store)
    assert first == RegisteredVersion("crowdray-once", 1, "models:/crowdray-once/1", "candidate", True)
    assert again == replace(first, created=False)

    client = MlflowClient(store, store)
    version = client.get_model_version_by_alias("crowdray-once", "candidate")
    assert (str(version.version), version.run_id) == ("1", run_id)
    assert version.tags == {**TAGS, "val/mae": "2.5", "val/rmse": "3.25", "crowdray.weights": package.weights}
    assert run_id in str(version.description)
    run = client.get_run(run_id)
    assert run.data.tags["crowdray.model"] == first.uri
    assert run.data.metrics["best/val/mae"] == METRICS["val/mae"]
    assert [(p.step, p.value) for p in client.get_metric_history(run_id, "best/val/mae")] == [(7, 2.5)]
    assert run.outputs is not None
    (output,) = run.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert model.source_run_id == run_id
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "crowdray-once", "version": 1}]
    for uri in ("models:/crowdray-once@candidate", "models:/crowdray-once/1", f"runs:/{run_id}/model",
                f"models:/{model.model_id}"):  # fmt: skip
        torch.testing.assert_close(
            load_counter(uri, tracking_uri=store)(package.example), package.density, rtol=1e-5, atol=1e-6
        )


def test_candidate_moves_forward_only(store: str, package: Package, other_package: Package) -> None:
    old, new = _run(store, "old"), _run(store, "new")
    register(package, "crowdray-forward", old, 1, store)
    second = register(other_package, "crowdray-forward", new, 1, store)
    assert (second.version, second.alias) == (2, "candidate")
    assert register(package, "crowdray-forward", old, 1, store).alias is None
    held = MlflowClient(store, store).get_model_version_by_alias("crowdray-forward", "candidate")
    assert str(held.version) == "2"


@pytest.mark.parametrize("metrics", [{}, {"val/mae": float("nan")}])
def test_without_finite_metrics_nothing_is_a_candidate(store: str, package: Package, metrics: dict[str, float]) -> None:
    name = f"crowdray-metrics-{len(metrics)}"
    version = register(replace(package, metrics=metrics), name, _run(store, name), 1, store)
    assert version.alias is None
    assert MlflowClient(store, store).get_registered_model(name).aliases == {}


def test_copy_that_counts_otherwise_is_no_candidate(store: str, package: Package) -> None:
    spoiled = replace(package, density=package.density + 1)
    with pytest.raises(UserError, match="does not give the density"):
        register(spoiled, "crowdray-spoiled", _run(store, "spoiled"), 1, store)
    assert MlflowClient(store, store).get_registered_model("crowdray-spoiled").aliases == {}


def test_interrupted_upload_leaves_one_model(store: str, package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = _run(store, "interrupted")
    with monkeypatch.context() as cut:
        cut.setattr(registration, "_with_lineage", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            register(package, "crowdray-cut", run_id, 1, store)
    assert register(package, "crowdray-cut", run_id, 1, store).version == 1
    client = MlflowClient(store, store)
    experiment = client.get_run(run_id).info.experiment_id
    models = [m for m in client.search_logged_models([experiment]) if m.source_run_id == run_id]
    assert [str(model.status) for model in models] == ["READY"]


STRANGER = """
import sys
sys.modules["crowdray"] = None  # where we are installed too, every import of ours fails from here on
import mlflow, numpy, torch
image = numpy.load("image.npy")
counter = mlflow.pytorch.load_model("models:/crowdray-stranger@candidate")
with torch.no_grad():
    results = [counter(torch.from_numpy(image)), counter(torch.from_numpy(image).float())]
results.append(torch.from_numpy(mlflow.pyfunc.load_model("models:/crowdray-stranger/1").predict(image)))
numpy.savez("density.npz", *[result.numpy() for result in results])
assert not [name for name in sys.modules if name.startswith("crowdray.")]
"""


def test_loads_in_a_python_that_does_not_know_us(
    store: str, package: Package, counter: PlainCounter, tmp_path: Path
) -> None:
    import numpy as np

    register(package, "crowdray-stranger", _run(store, "stranger"), 1, store)
    image = photo(2, 75, 131)
    np.save(tmp_path / "image.npy", image.numpy())
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    wanted = {"MLFLOW_TRACKING_URI": store, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
              "MLFLOW_DISABLE_TELEMETRY": "true"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", STRANGER], cwd=tmp_path, env=kept | wanted, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        expected = counter(image)
    with np.load(tmp_path / "density.npz") as results:
        assert len(results.files) == 3
        for name in results.files:
            torch.testing.assert_close(torch.from_numpy(results[name]), expected, rtol=1e-5, atol=1e-6)


def test_what_is_not_registered_is_refused_with_the_mend(store: str, package: Package) -> None:
    for uri in ("models:/nothing@candidate", "models:/nothing/3", "models:/nothing", "runs:/0123abc/model"):
        with pytest.raises(UserError, match=f"there is no model {uri} .*models:/NAME@ALIAS"):
            load_counter(uri, tracking_uri=store)
    with pytest.raises(UserError, match=r"0123abc.* not found"):
        register(package, "crowdray-none", "0123abc", 1, store)


def test_looking_up_needs_a_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="set MLFLOW_TRACKING_URI"):
        load_counter("models:/a@candidate")


def test_registered_files_name_their_run(store: str, package: Package, tmp_path: Path) -> None:
    run_id = _run(store, "files")
    register(package, "crowdray-files", run_id, 1, store)
    place = MlflowClient(store, store).get_model_version_download_uri("crowdray-files", "1")
    text = Path(download_artifacts(f"{place}/MLmodel", dst_path=str(tmp_path))).read_text()
    assert f"run_id: {run_id}" in text
