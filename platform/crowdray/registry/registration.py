"""Registration of packaged counters in the model registry, linked to their run, data and code."""

import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from crowdray.errors import UserError
from crowdray.registry.connection import connect, translated_errors
from crowdray.registry.loading import DESCRIPTION, MODEL_NAME, load_counter
from crowdray.registry.packaging import Package

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion

CANDIDATE = "candidate"
"""Alias of the newest verified version."""
WEIGHTS = "crowdray.weights"
"""Tag with the sha256 of the weights: a run registers the same weights once."""
MODEL = "crowdray.model"
"""Tag of a run: its registered version."""

_VERSIONS_OF_MODEL = "mlflow.modelVersions"


@dataclass(frozen=True)
class RegisteredVersion:
    """A version in the model registry."""

    name: str
    """Name of the registered model."""
    version: int
    """Number of the version."""
    uri: str
    """models:/NAME/VERSION"""
    alias: str | None
    """"candidate" if this version has that alias."""
    created: bool
    """False if the same run registered the same weights before."""


def register(
    package: Package, name: str, run_id: str, epoch: int, tracking_uri: str, timeout_s: float = 20.0
) -> RegisteredVersion:
    """Register a packaged counter as the next version of `name`, or return the version this run registered before.

    The version gets the tags, metrics and run of the package; the run gets the model, its metrics as "best/..." and
    the version as a tag. The alias `candidate` moves to the version if the registered copy returns the density of the
    package, all metrics are finite, and it is newer than the version that has the alias.

    Args:
        epoch: Epoch of the weights (MLflow step).

    Raises:
        UserError: The server does not answer, the run does not exist, or the name is invalid.
    """
    client = connect(tracking_uri, timeout_s)
    with translated_errors(tracking_uri):
        run = client.get_run(run_id)
        version = _find_version(client, name, run_id, package.weights)
        created = version is None
        if version is None:
            version = _create_version(client, name, _logged_model(client, run, package, epoch), package)
        number = int(version.version)
        uri = f"models:/{name}/{number}"
        _check_copy(uri, tracking_uri, package)
        if package.metrics and all(math.isfinite(value) for value in package.metrics.values()):
            _log_metrics(client, run, package.metrics, epoch)
            _advance_alias(client, name, number)
        client.set_tag(run_id, MODEL, uri)
        alias = CANDIDATE if _alias_version(client, name) == number else None
    return RegisteredVersion(name, number, uri, alias, created)


def _find_version(client: "MlflowClient", name: str, run_id: str, weights: str) -> "ModelVersion | None":
    if "'" in name:
        raise UserError(f"the model name {name!r} contains a quote; use letters, digits, - and _")
    found = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    return next((version for version in found if version.tags.get(WEIGHTS) == weights), None)


def _logged_model(client: "MlflowClient", run: "Run", package: Package, epoch: int) -> "LoggedModel":
    """Return the run's model with these weights: that of an interrupted registration, or a new one."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    experiment = run.info.experiment_id
    for logged in client.search_logged_models([experiment], filter_string=f"tags.`{WEIGHTS}` = '{package.weights}'"):
        if logged.source_run_id == run.info.run_id:
            if logged.status == LoggedModelStatus.READY:
                return logged
            client.delete_logged_model(logged.model_id)
    model = client.create_logged_model(
        experiment,
        name=MODEL_NAME,
        source_run_id=run.info.run_id,
        params=_model_params(run.data.params),
        tags={**package.tags, WEIGHTS: package.weights},
    )
    client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step=epoch)])
    with tempfile.TemporaryDirectory(prefix="crowdray-register-") as scratch:
        client.log_model_artifacts(model.model_id, str(_with_lineage(package.path, Path(scratch), model)))
    return client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def _with_lineage(path: Path, scratch: Path, model: "LoggedModel") -> Path:
    """Return a copy of the package whose MLmodel file names its run and its model."""
    from mlflow.models import Model

    folder = scratch / MODEL_NAME
    shutil.copytree(path, folder)
    description = Model.load(str(folder))
    description.run_id = model.source_run_id
    description.model_id = model.model_id
    description.artifact_path = model.artifact_location
    description.save(str(folder / DESCRIPTION))
    return folder


def _create_version(client: "MlflowClient", name: str, model: "LoggedModel", package: Package) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(
            name, description="Crowd counter: raw RGB (B, 3, H, W), 0..255, to a density map."
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    metrics = {key: f"{value:.4g}" for key, value in package.metrics.items()}
    version = client.create_model_version(
        name,
        source=model.artifact_location,
        run_id=model.source_run_id,
        model_id=model.model_id,
        tags={**package.tags, **metrics, WEIGHTS: package.weights},
        description=_describe(name, model, package),
    )
    known = json.loads(client.get_logged_model(model.model_id).tags.get(_VERSIONS_OF_MODEL, "[]"))
    if not any(str(entry.get("version")) == str(version.version) and entry.get("name") == name for entry in known):
        known.append({"name": name, "version": int(version.version)})
        client.set_logged_model_tags(model.model_id, {_VERSIONS_OF_MODEL: json.dumps(known)})
    return version


def _describe(name: str, model: "LoggedModel", package: Package) -> str:
    metrics = ", ".join(f"{key} {value:.3f}" for key, value in package.metrics.items()) or "not measured"
    origin = "\n".join(f"- {key}: `{value}`" for key, value in package.tags.items())
    return (
        f"{package.parameters:,} parameters. {metrics}.\n\nRun `{model.source_run_id}`\n{origin}\n\n"
        "```python\n"
        f'counter = mlflow.pytorch.load_model("models:/{name}@{CANDIDATE}")\n'
        "count = counter(image).sum()  # image: raw RGB (1, 3, H, W), 0..255, uint8 or float32\n"
        "```"
    )


def _check_copy(uri: str, tracking_uri: str, package: Package) -> None:
    density = load_counter(uri, tracking_uri=tracking_uri)(package.example)
    if not torch.allclose(density, package.density, rtol=1e-5, atol=1e-5 * float(package.density.abs().max())):
        raise UserError(
            f"{uri} does not return the density of the packaged counter; delete that version and run the same "
            "command again"
        )


def _log_metrics(client: "MlflowClient", run: "Run", metrics: Mapping[str, float], epoch: int) -> None:
    from mlflow.entities import Metric

    # With a fixed timestamp, MLflow treats a repeated call as the same points and does not log them twice.
    points = [Metric(f"best/{key}", float(value), run.info.start_time, epoch) for key, value in metrics.items()]
    client.log_batch(run.info.run_id, metrics=points)


def _advance_alias(client: "MlflowClient", name: str, number: int) -> None:
    current = _alias_version(client, name)
    if current is None or current < number:
        client.set_registered_model_alias(name, CANDIDATE, str(number))


def _alias_version(client: "MlflowClient", name: str) -> int | None:
    version = client.get_registered_model(name).aliases.get(CANDIDATE)
    return None if version is None else int(version)


def _model_params(params: Mapping[str, str]) -> dict[str, str]:
    # MLflow allows a model fewer and shorter parameters than a run; the package contains the whole configuration.
    return {key: value for key, value in list(params.items())[:100] if len(value) <= 250}
