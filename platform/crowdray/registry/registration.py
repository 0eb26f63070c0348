"""Registration of packaged counters in the model registry, linked to their run, data and code."""

import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crowdray.credentials import redacted
from crowdray.errors import UserError
from crowdray.registry.aliases import (
    CANDIDATE,
    CANDIDATE_DECISION,
    CandidateDecision,
    Validation,
    alias_lock,
    choose_candidate,
)
from crowdray.registry.card import ModelCard, Source
from crowdray.registry.connection import call_mlflow, connect
from crowdray.registry.loading import DESCRIPTION, MODEL_NAME, load_counter
from crowdray.registry.metrics import exported_metrics
from crowdray.registry.packaging import Package, same_density
from crowdray.registry.tracking import PARENT

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion

WEIGHTS = "crowdray.weights"
"""Tag with the sha256 of the weights: a run registers the same weights once."""
MODEL = "crowdray.model"
"""Tag of a run: its registered version."""

_VERSIONS_OF_MODEL = "mlflow.modelVersions"


@dataclass(frozen=True)
class RegisteredVersion:
    """A version in the model registry."""

    uri: str
    """models:/NAME/VERSION"""
    alias: str | None
    """"candidate" if this version has that alias."""
    decision: str
    """Which version is `candidate`, and why."""
    card: str
    """Its model card in Markdown; empty without one."""


def register(
    package: Package,
    name: str,
    run_id: str,
    epoch: int,
    tracking_uri: str,
    *,
    card: ModelCard | None = None,
    timeout_s: float = 20.0,
) -> RegisteredVersion:
    """Register a packaged counter as the next version of `name`, or return the version this run registered before.

    The version gets the tags, metrics and run of the package; the run gets the model and the version as a tag. If the
    registered copy returns the density of the package, `choose_candidate` decides on the alias `candidate`.

    Args:
        package: Its description file is completed by the ids of the run and the model.
        epoch: Epoch of the weights (MLflow step).
        card: Description of the version; settings and dataset of the model in MLflow's table of models.

    Raises:
        UserError: The server does not answer, the run does not exist, or the name is invalid.
    """
    client = connect(tracking_uri, timeout_s)

    def find_or_create() -> RegisteredVersion:
        run = client.get_run(run_id)
        found = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
        version = next((version for version in found if version.tags.get(WEIGHTS) == package.weights), None)
        if version is None:
            version = _create_version(client, name, _logged_model(client, run, package, epoch, card), package)
        number = int(version.version)
        uri = f"models:/{name}/{number}"
        counter = load_counter(uri, tracking_uri=tracking_uri, timeout_s=timeout_s)
        if not same_density(counter(package.example), package.density):
            raise UserError(
                f"{uri} does not return the density of the packaged counter; delete that version and run the same "
                "command again"
            )
        client.set_tag(run_id, MODEL, uri)
        source = Source(redacted(tracking_uri), uri, run_id, run.info.experiment_id, run.data.tags.get(PARENT))
        if card is not None and not version.description:  # promotions are added to it
            client.update_model_version(name, str(number), redacted(card.description(source)))
        decision = move_candidate(client, name, Validation.of(number, version.tags))
        markdown = redacted(card.to_markdown(source)) if card else ""
        return RegisteredVersion(uri, CANDIDATE if decision.holder == number else None, decision.reason, markdown)

    size = sum(file.stat().st_size for file in package.path.rglob("*") if file.is_file())
    return call_mlflow(tracking_uri, timeout_s, find_or_create, payload_bytes=2 * size)  # sent, and received again


def _logged_model(
    client: "MlflowClient", run: "Run", package: Package, epoch: int, card: ModelCard | None
) -> "LoggedModel":
    """Return the run's model with these weights: that of an interrupted registration, or a new one."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric
    from mlflow.models import Model

    experiment = run.info.experiment_id
    for logged in client.search_logged_models([experiment], filter_string=f"tags.`{WEIGHTS}` = '{package.weights}'"):
        if logged.source_run_id == run.info.run_id:
            if logged.status == LoggedModelStatus.READY:
                return logged
            client.delete_logged_model(logged.model_id)
    model = client.create_logged_model(
        experiment,
        name=re.sub(r"[/:.%\"']", "-", run.info.run_name or MODEL_NAME),  # MLflow allows no others
        source_run_id=run.info.run_id,
        tags={**package.tags, WEIGHTS: package.weights},
        params={"parameters": str(package.parameters), **(card.settings if card else {})},
    )
    dataset = {"dataset_name": card.data.dataset, "dataset_digest": card.data_digest[:36]} if card else {}
    # MLflow has metrics of a model only as metrics of its run; an equal point is not logged twice.
    metrics = [
        Metric(key, value, run.info.start_time, epoch, model.model_id, **dataset)
        for key, value in exported_metrics(package.metrics).items()
        if math.isfinite(value)
    ]
    client.log_batch(run.info.run_id, metrics=metrics)
    client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step=epoch)])
    description = Model.load(str(package.path))
    description.run_id, description.model_id = run.info.run_id, model.model_id
    description.artifact_path = redacted(model.artifact_location)
    description.save(str(package.path / DESCRIPTION))
    client.log_model_artifacts(model.model_id, str(package.path))
    return client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def move_candidate(client: "MlflowClient", name: str, new: Validation) -> CandidateDecision:
    """Decide on the alias, against the version that has it now; the decision becomes a tag of the new version."""
    with alias_lock(client, name) as lock:
        holder = client.get_registered_model(name).aliases.get(CANDIDATE)
        validation = Validation.of(int(holder), client.get_model_version(name, str(holder)).tags) if holder else None
        decision = choose_candidate(new, validation, name)
        if decision.moves:
            lock.set_alias(CANDIDATE, new.version)
    if validation is None or validation.version != new.version:  # else it has the tag that says why
        client.set_model_version_tag(name, str(new.version), CANDIDATE_DECISION, decision.reason)
    return decision


def _create_version(client: "MlflowClient", name: str, model: "LoggedModel", package: Package) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(
            name, description="Crowd counter: raw RGB (B, 3, H, W), 0..255, to a density map."
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    metrics = {key: f"{value:.6g}" for key, value in package.metrics.items()}
    version = client.create_model_version(
        name,
        source=model.artifact_location,
        run_id=model.source_run_id,
        model_id=model.model_id,
        tags={**package.tags, **metrics, WEIGHTS: package.weights},
    )
    versions = [{"name": name, "version": int(version.version)}]
    client.set_logged_model_tags(model.model_id, {_VERSIONS_OF_MODEL: json.dumps(versions)})
    return version
