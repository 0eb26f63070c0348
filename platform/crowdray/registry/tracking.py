"""Tracking in MLflow: one run per training run, reopened after a restart, with each epoch logged once."""

import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from crowdray.errors import UserError
from crowdray.registry.connection import connect, is_server, redacted, request_timeout, sqlite_path, translated_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Metric, Run

Status = Literal["FINISHED", "FAILED", "KILLED"]

RUN_KEY = "crowdray.run_key"
"""Tag that identifies a training run; opening the same key reopens the same MLflow run."""
GIT_REVISION = "crowdray.git_revision"
DATA_DIGEST = "crowdray.data_digest"
DATASET_URI = "crowdray.dataset_uri"
NONFINITE = "crowdray.nonfinite"
"""Tag that lists NaN and infinite metrics, which are not logged: charts cannot show them."""
CONFIG_CHANGED = "crowdray.config_changed"
"""Tag that lists parameters changed since the run was created: MLflow keeps their first value."""

_PARENT = "mlflow.parentRunId"
_EPOCH = "epoch"
_TIMESTAMP = "timestamp"
_MAX_PARAM_LENGTH = 500
_PARAMS_PER_BATCH = 100
_METRICS_PER_BATCH = 1000

_log = logging.getLogger(__name__)


class Tracker:
    """Interface of trackers; after one is opened, an outage of the server only causes warnings."""

    run_id: str | None = None
    url: str | None = None

    def log_config(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Log a nested configuration as parameters and as `config.json`, and tags; safe to repeat.

        Raises:
            UserError: The server does not answer.
        """

    def log_dataset(self, name: str, uri: str, digest: str) -> None:
        """Log the dataset as an input of the run; safe to repeat."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; those that cannot be sent are sent with the next call."""

    def sync_history(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Log the rows of the whole history that the run does not contain yet.

        Args:
            rows: Each has "epoch", an integer that counts over all stages and is MLflow's step, metrics by name, and
                optionally "timestamp" (seconds since 1970). Rows up to the last epoch of the run are skipped.
        """

    def log_summary(self, metrics: Mapping[str, float], epoch: int) -> None:
        """Log metrics of the whole run at its last epoch; safe to repeat."""

    def log_file(self, path: Path, folder: str = "") -> None:
        """Store a file in a folder of the run's artifacts, replacing one of the same name."""

    def finish(self, status: Status) -> None:
        """Send what is unsent and close the run."""


class NullTracker(Tracker):
    """Tracker that records nothing."""


def open_tracker(
    uri: str | None, experiment: str, run_name: str, run_key: str, *, parent: str | None = None, timeout_s: float = 20.0
) -> Tracker:
    """Return the tracker of the run with tag `run_key`, which is created if it does not exist.

    Args:
        uri: MLflow tracking URI; None returns a NullTracker.
        parent: Id of the parent run, such as that of a study.

    Raises:
        UserError: The tracking URI cannot be used, within about `timeout_s` seconds.
    """
    if uri is None:
        return NullTracker()
    if "'" in run_key and '"' in run_key:
        raise UserError(
            f"the run key {run_key!r} contains both kinds of quotes, which MLflow cannot search; remove one kind"
        )
    client = connect(uri, timeout_s)
    with translated_errors(uri), request_timeout(timeout_s, retries=1):
        experiment_id = _experiment(client, uri, experiment).experiment_id
        run = find_run(client, experiment_id, run_key)
        if run is None:
            run = _create_run(client, experiment_id, run_name, run_key, parent)
        else:
            client.update_run(run.info.run_id, status="RUNNING")
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
        if is_server(uri):
            self.url = f"{uri.rstrip('/')}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
        self._id: str = run.info.run_id
        self._started: int = run.info.start_time
        self.client = client
        self._uri = uri
        self.timeout_s = timeout_s
        self._params: dict[str, str] = dict(run.data.params)
        # Every row contains its epoch as a metric, in one batch with the others.
        self._last_epoch = int(run.data.metrics.get(_EPOCH, -1))
        self._timestamps: dict[int, int] = {}
        self._unsent_rows: Sequence[Mapping[str, float]] = ()
        self._unsent_tags: dict[str, str] = {}
        self._nonfinite = run.data.tags.get(NONFINITE, "")

    def log_config(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """See Tracker.log_config."""
        from mlflow.entities import Param

        flat = dict(flatten(params))
        new = [Param(key, value) for key, value in flat.items() if key not in self._params]
        changed = [
            f"{key}: {self._params[key]} -> {value}"
            for key, value in flat.items()
            if self._params.get(key, value) != value
        ]
        with translated_errors(self._uri), request_timeout(self.timeout_s, retries=2):
            for start in range(0, len(new), _PARAMS_PER_BATCH):
                self.client.log_batch(self._id, params=new[start : start + _PARAMS_PER_BATCH])
            if params:
                self.client.log_dict(self._id, dict(params), "config.json")
            all_tags = dict(tags) | ({CONFIG_CHANGED: "; ".join(changed)[:2000]} if changed else {})
            if GIT_REVISION in all_tags:
                all_tags["mlflow.source.git.commit"] = all_tags[GIT_REVISION]
            self._send_tags(all_tags)
        self._params.update({param.key: param.value for param in new})

    def log_dataset(self, name: str, uri: str, digest: str) -> None:
        """See Tracker.log_dataset."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        # MLflow allows 36 characters of digest; the tag contains all of them.
        source = Dataset(
            name=name,
            digest=digest[:36],
            source_type=urlsplit(uri).scheme or "local",
            source=json.dumps({"uri": uri}),
        )
        entry = DatasetInput(source, tags=[InputTag("mlflow.data.context", "training")])
        self._attempt(lambda: self.client.log_inputs(self._id, datasets=[entry]), "the dataset")
        self.set_tags({DATA_DIGEST: digest, DATASET_URI: uri})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """See Tracker.set_tags."""
        self._unsent_tags.update(tags)
        if self._attempt(lambda: self._send_tags(self._unsent_tags), "tags"):
            self._unsent_tags = {}

    def sync_history(self, rows: Sequence[Mapping[str, float]]) -> None:
        """See Tracker.sync_history."""
        fresh = {int(row[_EPOCH]): row for row in rows if int(row[_EPOCH]) > self._last_epoch}
        ordered = [fresh[epoch] for epoch in sorted(fresh)]
        self._unsent_rows = ordered
        if self._attempt(lambda: self._send_rows(ordered), "metrics"):
            self._unsent_rows = ()

    def log_summary(self, metrics: Mapping[str, float], epoch: int) -> None:
        """See Tracker.log_summary."""
        from mlflow.entities import Metric

        # With a fixed timestamp, MLflow treats a repeated call as the same points and does not log them twice.
        points = [Metric(k, float(v), self._started, epoch) for k, v in metrics.items() if math.isfinite(v)]
        self._attempt(lambda: self.client.log_batch(self._id, metrics=points), "the summary")

    def log_file(self, path: Path, folder: str = "") -> None:
        """See Tracker.log_file."""
        self._attempt(lambda: self.client.log_artifact(self._id, str(path), folder or None), f"the file {path.name}")

    def finish(self, status: Status) -> None:
        """See Tracker.finish."""
        if self._unsent_rows:
            self.sync_history(self._unsent_rows)
        if self._unsent_tags:
            self.set_tags({})
        self._attempt(lambda: self.client.set_terminated(self._id, status), f"the status {status}")

    def _attempt(self, send: Callable[[], object], what: str) -> bool:
        try:
            with translated_errors(self._uri), request_timeout(self.timeout_s, retries=1):
                send()
        except UserError as error:
            _log.warning("%s not tracked, training continues: %s", what, error)
            return False
        return True

    def _send_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        if tags:
            self.client.log_batch(self._id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

    def _send_rows(self, rows: Sequence[Mapping[str, float]]) -> None:
        from mlflow.entities import RunTag

        # A batch is one transaction of whole rows: a killed process leaves no partial row.
        for batch in _batches(rows):
            metrics = [metric for row in batch for metric in self._metrics(row)]
            nonfinite = self._list_nonfinite(batch)
            tags = [RunTag(NONFINITE, nonfinite)] if nonfinite != self._nonfinite else []
            self.client.log_batch(self._id, metrics=metrics, tags=tags)
            self._nonfinite = nonfinite
            self._last_epoch = int(batch[-1][_EPOCH])

    def _metrics(self, row: Mapping[str, float]) -> list["Metric"]:
        from mlflow.entities import Metric

        # The timestamp of a row is fixed at the first attempt: a retry sends the same points, which MLflow recognizes
        # even if its answer to the first request was lost.
        epoch = int(row[_EPOCH])
        timestamp = self._timestamps.setdefault(epoch, int(row.get(_TIMESTAMP, time.time()) * 1000))
        return [
            Metric(key, float(value), timestamp, epoch)
            for key, value in row.items()
            if key != _TIMESTAMP and math.isfinite(value)
        ]

    def _list_nonfinite(self, rows: Sequence[Mapping[str, float]]) -> str:
        found = [
            f"epoch {int(row[_EPOCH])}: {key} = {value}"
            for row in rows
            for key, value in row.items()
            if not math.isfinite(value)
        ]
        return "; ".join(filter(None, [self._nonfinite, *found]))[:1000]


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


def _batches(rows: Sequence[Mapping[str, float]]) -> Iterator[list[Mapping[str, float]]]:
    batch: list[Mapping[str, float]] = []
    size = 0
    for row in rows:
        assert len(row) <= _METRICS_PER_BATCH, f"epoch {row[_EPOCH]} has {len(row)} metrics, MLflow accepts 1,000"
        if size + len(row) > _METRICS_PER_BATCH:
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += len(row)
    if batch:
        yield batch


def _experiment(client: "MlflowClient", uri: str, name: str) -> "Experiment":
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.get_experiment(client.create_experiment(name, artifact_location=_artifact_root(uri, name)))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
            assert found is not None
    if found.lifecycle_stage != "active":
        raise UserError(
            f"the MLflow experiment {name!r} was deleted; restore it (mlflow experiments restore "
            f"--experiment-id {found.experiment_id}) or choose another name"
        )
    if found.artifact_location.startswith("mlflow-artifacts:") and not is_server(uri):
        raise UserError(
            f"the MLflow experiment {name!r} was created through a server, which stores its files, but the "
            f"tracking URI {redacted(uri)} bypasses it; set MLFLOW_TRACKING_URI to the server's address, "
            "or choose another name"
        )
    return found


def _artifact_root(uri: str, experiment: str) -> str | None:
    # MLflow would use ./mlruns in the working directory; a server has its own default.
    if is_server(uri) or not uri.startswith("sqlite"):
        return None
    return (sqlite_path(uri).parent / "mlartifacts" / re.sub(r"[^\w.-]+", "-", experiment)).as_uri()


def find_run(client: "MlflowClient", experiment_id: str, run_key: str) -> "Run | None":
    """Return the oldest run of an experiment with this key."""
    quote = '"' if "'" in run_key else "'"
    found = client.search_runs(
        [experiment_id],
        filter_string=f"tags.`{RUN_KEY}` = {quote}{run_key}{quote}",
        order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
        max_results=1,
    )
    return found[0] if found else None


def _create_run(client: "MlflowClient", experiment_id: str, run_name: str, run_key: str, parent: str | None) -> "Run":
    tags = {RUN_KEY: run_key} | ({_PARENT: parent} if parent else {})
    created = client.create_run(experiment_id, run_name=run_name, tags=tags)
    # Two processes that start at the same moment both create a run; both then use the older one.
    first = find_run(client, experiment_id, run_key) or created
    if first.info.run_id != created.info.run_id:
        client.delete_run(created.info.run_id)
    return first
