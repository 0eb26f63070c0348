"""Registered versions: created once per run, linked to the run, loadable without crowdray."""

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
from PIL import Image

from crowdray.errors import UserError
from crowdray.models.export import ExportedCounter
from crowdray.registry.loading import load_counter
from crowdray.registry.packaging import Package
from crowdray.registry.registration import RegisteredVersion, register
from crowdray.registry.tracking import open_tracker

from ..support.cards import model_card
from ..support.counters import TAGS, photo

pytestmark = pytest.mark.slow


def _run(store: str, key: str) -> str:
    tracker = open_tracker(store, "registration", "a run", key)
    assert tracker.run_id is not None
    return tracker.run_id


def test_register_twice_returns_the_same_version_linked_to_its_run(
    store: str, package: Package, tmp_path: Path
) -> None:
    run_id = _run(store, "once")
    first = register(package, "crowdray-once", run_id, 7, store)
    again = register(package, "crowdray-once", run_id, 7, store)
    decision = "candidate is version 1: validation MAE 2.5, always predicting the mean 9.5"
    assert first == RegisteredVersion("models:/crowdray-once/1", "candidate", decision, "")
    assert again == replace(first, decision="kept candidate at version 1: validation MAE 2.5")

    client = MlflowClient(store, store)
    version = client.get_model_version_by_alias("crowdray-once", "candidate")
    assert (str(version.version), version.run_id) == ("1", run_id)
    assert version.tags == {
        **TAGS,
        "val/mae": "2.5",
        "val/rmse": "3.25",
        "crowdray.weights": package.weights,
        "crowdray.candidate": first.decision,
    }
    run = client.get_run(run_id)
    assert run.data.tags["crowdray.model"] == first.uri
    assert run.outputs is not None
    (output,) = run.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert (model.source_run_id, output.step) == (run_id, 7)
    assert (model.name, model.params) == ("a run", {"parameters": str(package.parameters)})
    assert {metric.key: metric.value for metric in model.metrics or ()} == {"best_val_mae": 2.5, "best_val_rmse": 3.25}
    description = download_artifacts(f"{version.source}/MLmodel", dst_path=str(tmp_path))
    assert f"run_id: {run_id}" in Path(description).read_text()
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "crowdray-once", "version": 1}]
    for uri in ("models:/crowdray-once@candidate", "models:/crowdray-once/1", f"runs:/{run_id}/model",
                f"models:/{model.model_id}"):  # fmt: skip
        torch.testing.assert_close(
            load_counter(uri, tracking_uri=store)(package.example), package.density, rtol=1e-5, atol=1e-6
        )


def test_register_a_sequence_of_versions_keeps_candidate_at_the_best(
    store: str, package: Package, other_package: Package
) -> None:
    def registered(key: str, mae: float, of: Package = package, images: str = "v") -> tuple[str | None, str]:
        tags = {"mean_predictor/val/mae": "66", "crowdray.validation_images": images}
        changed = replace(of, metrics={"val/mae": mae}, tags=tags)
        version = register(changed, "crowdray-sequence", _run(store, f"sequence {key}"), 1, store)
        held = MlflowClient(store, store).get_model_version_by_alias("crowdray-sequence", "candidate").version
        return version.alias, f"{held}: {version.decision}"

    sequence = [
        registered("first", 30),
        registered("worse", 34.5),
        registered("worse than the mean", 295),
        registered("equal", 30),
        registered("better", 21.1, other_package),
        registered("first", 30),  # an interrupted job, repeated
        registered("other images", 3, images="w"),
    ]
    assert sequence == [
        ("candidate", "1: candidate is version 1: validation MAE 30, always predicting the mean 66"),
        (None, "1: kept candidate at version 1: validation MAE 30, version 2 34.5"),
        (None, "1: kept candidate at version 1: validation MAE 295 of version 3 is not below 66 of always predicting "
         "the mean"),
        (None, "1: kept candidate at version 1: validation MAE 30, version 4 the same"),
        ("candidate", "5: candidate is version 5: validation MAE 21.1, version 1 30"),
        (None, "5: kept candidate at version 5: validation MAE 21.1, version 1 30"),
        (None, "5: kept candidate at version 5: version 6 was validated on other images; to move it anyway: "
         "jobs/promote.py --model crowdray-sequence --candidate models:/crowdray-sequence/6 --set-candidate"),
    ]  # fmt: skip


@pytest.mark.parametrize("metrics", [{}, {"val/mae": float("nan")}])
def test_register_without_finite_metrics_sets_no_alias(store: str, package: Package, metrics: dict[str, float]) -> None:
    name = f"crowdray-metrics-{len(metrics)}"
    version = register(replace(package, metrics=metrics), name, _run(store, name), 1, store)
    assert version.alias is None and version.decision.startswith("no candidate: the validation errors of version 1")
    assert MlflowClient(store, store).get_registered_model(name).aliases == {}


def test_register_with_a_different_density_raises_and_sets_no_alias(store: str, package: Package) -> None:
    altered = replace(package, density=package.density + 1)
    with pytest.raises(UserError, match="does not return the density"):
        register(altered, "crowdray-altered", _run(store, "altered"), 1, store)
    assert MlflowClient(store, store).get_registered_model("crowdray-altered").aliases == {}


def test_register_after_an_interrupted_upload_leaves_one_model(
    store: str, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = _run(store, "interrupted")
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_model_artifacts", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            register(package, "crowdray-interrupted", run_id, 1, store)
    assert register(package, "crowdray-interrupted", run_id, 1, store).uri == "models:/crowdray-interrupted/1"
    client = MlflowClient(store, store)
    experiment = client.get_run(run_id).info.experiment_id
    models = [m for m in client.search_logged_models([experiment]) if m.source_run_id == run_id]
    assert [str(model.status) for model in models] == ["READY"]


SCRIPT = """
import sys
sys.modules["crowdray"] = None  # importing crowdray fails from here on
exec(open("card.py").read())
print("--", file=sys.stderr)
import mlflow, numpy, torch
image = numpy.load("image.npy")
counter = mlflow.pytorch.load_model("models:/crowdray-portable@candidate")
with torch.no_grad():
    results = [counter(torch.from_numpy(image)), counter(torch.from_numpy(image).float())]
results.append(torch.from_numpy(mlflow.pyfunc.load_model("models:/crowdray-portable/1").predict(image)))
numpy.savez("density.npz", *[density.numpy() for density in results])
assert not [name for name in sys.modules if name.startswith("crowdray.")]
"""


def test_registered_model_loads_without_crowdray(
    store: str, package: Package, counter: ExportedCounter, tmp_path: Path
) -> None:
    import numpy as np

    run_id = _run(store, "portable")
    image = photo(2, 75, 131)
    Image.fromarray(image[0].permute(1, 2, 0).numpy()).save(tmp_path / "example.png")
    client = MlflowClient(store, store)
    client.log_artifact(run_id, str(tmp_path / "example.png"), "figures")
    version = register(package, "crowdray-portable", run_id, 1, store, card=model_card(example="figures/example.png"))
    description = client.get_model_version("crowdray-portable", "1").description
    assert description == version.card.strip()
    (tmp_path / "card.py").write_text(description.partition("```python\n")[2].partition("```")[0])
    np.save(tmp_path / "image.npy", image.numpy())
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"MLFLOW_TRACKING_URI": store, "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
                    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
                    "MLFLOW_DISABLE_TELEMETRY": "true"}  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("--"), "a warning"
    with torch.inference_mode():
        expected = counter(image)
    assert result.stdout == f"{expected[0].sum():.0f} people\n"
    with np.load(tmp_path / "density.npz") as results:
        assert len(results.files) == 3
        for name in results.files:
            torch.testing.assert_close(torch.from_numpy(results[name]), expected, rtol=1e-5, atol=1e-6)


def test_load_counter_of_an_unknown_model_raises_with_the_fix(store: str, package: Package) -> None:
    for uri in ("models:/nothing@candidate", "models:/nothing/3", "models:/nothing", "runs:/0123abc/model"):
        with pytest.raises(UserError, match=f"there is no model {uri} .*models:/NAME@ALIAS"):
            load_counter(uri, tracking_uri=store)
    with pytest.raises(UserError, match=r"0123abc.* not found"):
        register(package, "crowdray-none", "0123abc", 1, store)


def test_load_counter_without_a_tracking_uri_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="set MLFLOW_TRACKING_URI"):
        load_counter("models:/a@candidate")
