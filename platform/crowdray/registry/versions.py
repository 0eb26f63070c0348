"""Registered versions behind a model's URI."""

from dataclasses import dataclass

from crowdray.registry.connection import call_mlflow, connect


@dataclass(frozen=True)
class Version:
    """A registered version, and what it came from."""

    uri: str
    """models:/NAME/NUMBER"""
    run_id: str | None
    """MLflow run that registered it."""
    model_id: str | None
    """MLflow's logged model."""


def find_version(uri: str, tracking_uri: str, timeout_s: float = 20.0) -> Version | None:
    """Return the version that models:/NAME/NUMBER, models:/NAME@ALIAS or models:/NAME/latest means; None for others.

    Raises:
        UserError: The server does not answer, or the version does not exist.
    """
    if not uri.startswith("models:/"):
        return None
    client = connect(tracking_uri, timeout_s)

    def find() -> Version | None:
        from mlflow.store.artifact.utils.models import get_model_name_and_version

        name, number = get_model_name_and_version(client, uri)  # type: ignore[no-untyped-call]
        found = client.get_model_version(name, number)
        return Version(f"models:/{name}/{number}", found.run_id, found.model_id)

    return call_mlflow(tracking_uri, timeout_s, find)
