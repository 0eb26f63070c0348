"""Tracking in MLflow: one run per training run, reopened after a restart, with each epoch logged once."""

import getpass
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from crowdray.credentials import redacted
from crowdray.errors import UserError
from crowdray.registry import pages
from crowdray.registry.connection import call_mlflow, connect, limit_artifact_store, sqlite_path
from crowdray.registry.metrics import EPOCH

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

Status = Literal["FINISHED", "FAILED", "KILLED"]

RUN_KEY = "crowdray.run_key"
"""Tag that identifies a training run; opening the same key reopens the same MLflow run."""
GIT_REVISION = "crowdray.git_revision"
DATA_DIGEST = "crowdray.data_digest"
DATASET_URI = "crowdray.dataset_uri"
PARENT = "mlflow.parentRunId"
"""MLflow's tag with the run of the study that a run is a trial of."""
INIT = "crowdray.init"
"""Counter from whose weights training started, such as models:/crowdray-mall/7."""
INIT_WEIGHTS = "crowdray.init_weights"
"""sha256 of these weights: the tag crowdray.weights of a registered counter."""

_NOTE = "mlflow.note.content"
_LAST_EPOCH = "system/epoch"
"""Metric with the epoch of each row. A run that an earlier version started lacks it, and gets all epochs again under
the present names."""
_MAX_PARAM_LENGTH = 500
_PARAMS_PER_BATCH = 100
_METRICS_PER_BATCH = 1000

_log = logging.getLogger(__name__)


class Tracker:
    """Tracker that records nothing, and the interface of others: once open, an outage only causes warnings."""

    run_id: str | None = None
    url: str | None = None
    """Web page of the run: of its server, or of `make ui` for a database."""
    runs_url: str | None = None
    """Web page of all runs of the experiment."""

    def log_config(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Log a nested configuration as parameters and as `config.json`, and tags; safe to repeat.

        Raises:
            UserError: The server does not answer.
        """

    def log_dataset(self, name: str, uri: str, digest: str, context: str = "training") -> None:
        """Log the dataset as an input of the run, for training or a split; safe to repeat."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""

    def sync_history(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Log the finite metrics of the epochs that the run does not contain yet.

        Args:
            rows: The whole history. Each has "epoch", which counts over all stages and is MLflow's step, and metrics.
        """

    def log_summary(self, metrics: Mapping[str, float], epoch: int) -> None:
        """Log metrics of the whole run at its last epoch; safe to repeat."""

    def log_scores(self, metrics: Mapping[str, float], dataset: str, digest: str, model_id: str | None) -> None:
        """Log metrics of an evaluation on a dataset, for the run and for the logged model that was evaluated."""

    def log_file(self, path: Path, folder: str = "") -> None:
        """Store a file in a folder of the run's artifacts, replacing one of the same name."""

    def finish(self, status: Status) -> None:
        """Close the run."""


def open_tracker(
    uri: str | None,
    experiment: str,
    run_name: str,
    run_key: str,
    *,
    parent: str | None = None,
    note: str = "",
    timeout_s: float = 20.0,
) -> Tracker:
    """Return the tracker of the run with tag `run_key`, which is created if it does not exist.

    Args:
        uri: MLflow tracking URI; None returns a tracker that records nothing.
        parent: Id of the parent run, such as that of a study.
        note: Description of a new run in Markdown; an existing one keeps its own, which a user may have changed.

    Raises:
        UserError: The tracking URI cannot be used, within about `timeout_s` seconds.
    """
    if uri is None:
        return Tracker()
    client = connect(uri, timeout_s)

    def open_run() -> "Run":
        experiment_id = _experiment_id(client, uri, experiment)
        run = _find_run(client, experiment_id, run_key)
        if run is None:
            tags = {RUN_KEY: _tag_value(run_key), **_origin()}
            tags |= ({PARENT: parent} if parent else {}) | ({_NOTE: redacted(note)} if note else {})
            return _create_run(client, experiment_id, run_name, tags)
        client.update_run(run.info.run_id, status="RUNNING")
        return run

    run = call_mlflow(uri, timeout_s, open_run)
    limit_artifact_store(run.info.artifact_uri, timeout_s)
    return MlflowTracker(client, uri, run, timeout_s)


@contextmanager
def finish_on_exit(tracker: Tracker) -> Iterator[Tracker]:
    """Finish a tracker at the end of the block, with the status of the block."""
    status: Status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)


class MlflowTracker(Tracker):
    """Tracker that writes to an MLflow run; created by `open_tracker`."""

    def __init__(self, client: "MlflowClient", uri: str, run: "Run", timeout_s: float) -> None:
        self.run_id = run.info.run_id
        server = pages.server_of(uri)
        self.url = pages.run_page(server, run.info.experiment_id, run.info.run_id)
        self.runs_url = pages.runs_page(server, run.info.experiment_id)
        self._id: str = run.info.run_id
        self._started: int = run.info.start_time
        self.client = client
        self._uri = uri
        self.timeout_s = timeout_s
        self._params: dict[str, str] = dict(run.data.params)
        # Every row contains its epoch as a metric, in one batch with the others.
        self._last_epoch = int(run.data.metrics.get(_LAST_EPOCH, -1))

    def log_config(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """See Tracker.log_config."""
        from mlflow.entities import Param

        # MLflow refuses to change a parameter; config.json has the present values.
        new = [Param(key, value) for key, value in flatten(params) if key not in self._params]
        all_tags = dict(tags)
        if GIT_REVISION in tags:
            all_tags["mlflow.source.git.commit"] = tags[GIT_REVISION]

        def send() -> None:
            for start in range(0, len(new), _PARAMS_PER_BATCH):
                self.client.log_batch(self._id, params=new[start : start + _PARAMS_PER_BATCH])
            self.client.log_dict(self._id, dict(params), "config.json")
            self._send_tags(all_tags)

        call_mlflow(self._uri, self.timeout_s, send, retries=2)
        self._params.update({param.key: param.value for param in new})

    def log_dataset(self, name: str, uri: str, digest: str, context: str = "training") -> None:
        """See Tracker.log_dataset."""
        uri = redacted(uri)
        from mlflow.entities import Dataset, DatasetInput, InputTag

        # MLflow allows 36 characters of digest; the tag contains all of them.
        source = Dataset(
            name=name,
            digest=digest[:36],
            source_type=urlsplit(uri).scheme or "local",
            source=json.dumps({"uri": uri}),
        )
        entry = DatasetInput(source, tags=[InputTag("mlflow.data.context", context)])
        self._attempt(lambda: self.client.log_inputs(self._id, datasets=[entry]), "the dataset")
        self.set_tags({DATA_DIGEST: digest, DATASET_URI: uri})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """See Tracker.set_tags."""
        self._attempt(lambda: self._send_tags(tags), "tags")

    def sync_history(self, rows: Sequence[Mapping[str, float]]) -> None:
        """See Tracker.sync_history."""
        fresh = [row for row in rows if int(row[EPOCH]) > self._last_epoch]
        self._attempt(lambda: self._send_rows(fresh), "metrics")

    def log_summary(self, metrics: Mapping[str, float], epoch: int) -> None:
        """See Tracker.log_summary."""
        # With a fixed timestamp, MLflow treats a repeated call as the same points and does not log them twice.
        points = _points(metrics, self._started, epoch)
        self._attempt(lambda: self.client.log_batch(self._id, metrics=points), "the summary")

    def log_scores(self, metrics: Mapping[str, float], dataset: str, digest: str, model_id: str | None) -> None:
        """See Tracker.log_scores."""
        from mlflow.entities import Metric

        points = [
            Metric(key, value, self._started, 0, model_id=model_id, dataset_name=dataset, dataset_digest=digest[:36])
            for key, value in metrics.items()
        ]
        self._attempt(lambda: self.client.log_batch(self._id, metrics=points), "the errors")

    def log_file(self, path: Path, folder: str = "") -> None:
        """See Tracker.log_file."""
        size = path.stat().st_size
        self._attempt(
            lambda: self.client.log_artifact(self._id, str(path), folder or None), f"the file {path.name}", size
        )

    def finish(self, status: Status) -> None:
        """See Tracker.finish."""
        self._attempt(lambda: self.client.set_terminated(self._id, status), f"the status {status}")

    def _attempt(self, send: Callable[[], object], what: str, payload_bytes: int = 0) -> None:
        try:
            call_mlflow(self._uri, self.timeout_s, send, payload_bytes=payload_bytes)
        except UserError as error:
            _log.warning("%s not tracked, training continues: %s", what, error)

    def _send_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(self._id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

    def _send_rows(self, rows: Sequence[Mapping[str, float]]) -> None:
        # A batch is one transaction of whole rows: a killed process leaves no partial row.
        size = _METRICS_PER_BATCH // max((len(row) for row in rows), default=1)
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            now = int(time.time() * 1000)
            points = []
            for row in batch:
                metrics = {_LAST_EPOCH if key == EPOCH else key: value for key, value in row.items()}
                points += _points(metrics, now, int(row[EPOCH]))
            self.client.log_batch(self._id, metrics=points)
            self._last_epoch = int(batch[-1][EPOCH])


def _points(metrics: Mapping[str, float], timestamp: int, epoch: int) -> list["Metric"]:
    """Return metrics for MLflow without NaN and infinity, which charts cannot show."""
    from mlflow.entities import Metric

    return [Metric(key, float(value), timestamp, epoch) for key, value in metrics.items() if math.isfinite(value)]


def flatten(params: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of a nested configuration as ("a.b.0.c", text); a list of scalars is one JSON text.

    Leaves of more than 500 characters are left out; the artifact config.json contains them.
    """
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name}.")
        elif isinstance(value, Sequence) and not isinstance(value, str) and any(isinstance(v, Mapping) for v in value):
            yield from flatten({str(index): item for index, item in enumerate(value)}, f"{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            if len(text) <= _MAX_PARAM_LENGTH:
                yield name, text


def _experiment_id(client: "MlflowClient", uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            tags = {pages.VIEW_TAG: pages.VIEW}
            return client.create_experiment(name, artifact_location=_artifact_root(uri, name), tags=tags)
        except MlflowException as error:  # another job may create it at the same moment
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
            assert found is not None
    if found.lifecycle_stage != "active":
        raise UserError(
            f"the MLflow experiment {name!r} was deleted; restore it (mlflow experiments restore "
            f"--experiment-id {found.experiment_id}) or choose another name"
        )
    if pages.VIEW_TAG not in found.tags:  # created by an earlier version
        client.set_experiment_tag(found.experiment_id, pages.VIEW_TAG, pages.VIEW)
    return str(found.experiment_id)


def _find_run(client: "MlflowClient", experiment_id: str, run_key: str) -> "Run | None":
    found = client.search_runs(
        [experiment_id],
        filter_string=f'tags.`{RUN_KEY}` = "{_tag_value(run_key)}"',
        order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
        max_results=1,
    )
    return found[0] if found else None


def _create_run(client: "MlflowClient", experiment_id: str, run_name: str, tags: Mapping[str, str]) -> "Run":
    created = client.create_run(experiment_id, run_name=run_name, tags=dict(tags))
    # Two first starts at the same moment both create a run; both then agree on the older one.
    first = _find_run(client, experiment_id, tags[RUN_KEY]) or created
    if first.info.run_id != created.info.run_id:
        client.delete_run(created.info.run_id)
    return first


def _origin() -> dict[str, str]:
    """Who started the process, and which program it is, in the tags that MLflow shows."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that has no name
        user = str(os.getuid())
    program = Path(sys.argv[0])
    source = f"jobs/{program.name}" if program.parent.name == "jobs" else program.name
    return {"mlflow.user": user, "mlflow.source.name": source, "mlflow.source.type": "LOCAL"}


def _tag_value(run_key: str) -> str:
    """The key without the quote that would end it in a filter, which has no way to escape one."""
    return run_key.replace('"', "%22")


def run_key_of(tag: str) -> str:
    """Return the key of a run from its tag."""
    return tag.replace("%22", '"')


def _artifact_root(uri: str, experiment: str) -> str | None:
    # MLflow would use ./mlruns in the working directory; a server has its own default.
    if not uri.startswith("sqlite"):
        return None
    return (sqlite_path(uri).parent / "mlartifacts" / re.sub(r"[^\w.-]+", "-", experiment)).as_uri()
