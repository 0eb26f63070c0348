"""Addresses of MLflow's web pages.

The page of an experiment without a path shows traces, which training does not have.
"""

import json
from urllib.parse import quote, urlsplit

from crowdray.credentials import redacted
from crowdray.registry.metrics import BEST_VAL_MAE

LOCAL_PORT = 5000
"""Port of `make ui`, which serves a store that no server serves yet."""
TRIAL_STATE = "crowdray.trial"
"""Tag of a trial: complete, pruned or failed."""

VIEW_TAG = "mlflow.sharedViewState.crowdray"
"""Tag of an experiment with VIEW."""
VIEW = json.dumps(
    {
        "orderByKey": f"metrics.`{BEST_VAL_MAE}`",
        "orderByAsc": True,
        "selectedColumns": [
            f"metrics.`{BEST_VAL_MAE}`",
            "metrics.`test_mae`",
            "metrics.`baseline_test_mae`",
            f"tags.`{TRIAL_STATE}`",
            "attributes.`Models`",
            "attributes.`User`",
            "attributes.`Source`",
        ],
        "runsHiddenMode": "FIRST_20_RUNS",
    }
)
"""The table of runs that links open: the lowest validation error first, and the columns in which runs differ."""

_TRAINING = "workflowType=machine_learning"
"""Without it, MLflow's navigation is that of language models."""


def server_of(tracking_uri: str) -> str:
    """Return the address of the tracking server, or that of `make ui` for a database."""
    if is_server(tracking_uri):
        return redacted(tracking_uri).rstrip("/")
    return f"http://127.0.0.1:{LOCAL_PORT}"


def is_server(tracking_uri: str) -> bool:
    """Whether a tracking URI is the address of a server."""
    return urlsplit(tracking_uri).scheme in ("http", "https")


def runs_page(server: str, experiment_id: str) -> str:
    """Return the address of an experiment's table of runs, the lowest validation error first."""
    return f"{server}/#/experiments/{experiment_id}/runs?{_TRAINING}&viewStateShareKey=crowdray"


def run_page(server: str, experiment_id: str, run_id: str) -> str:
    """Return the address of a run."""
    return f"{server}/#/experiments/{experiment_id}/runs/{run_id}?{_TRAINING}"


def model_page(server: str, name: str) -> str:
    """Return the address of a registered model, with its versions and aliases."""
    return f"{server}/#/models/{quote(name, safe='')}?{_TRAINING}"
