"""One MLflow run per training: opened again after a restart, and never a point twice in its curves."""

import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol
from urllib.parse import urlsplit

from crowdray.errors import UserError
from crowdray.registry.connection import connect, is_server, redacted, request_timeout, sqlite_path, translated_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Metric, Run

Status = Literal["FINISHED", "FAILED", "KILLED"]

RUN_KEY = "crowdray.run_key"
"""Tag that identifies a training; a start with the same key opens the same run again."""
GIT_REVISION = "crowdray.git_revision"
DATA_DIGEST = "crowdray.data_digest"
DATASET_URI = "crowdray.dataset_uri"
NONFINITE = "crowdray.nonfinite"
"""Tag that lists metrics which were NaN or infinite: no chart can show them, so the curves leave them out."""
CONFIG_CHANGED = "crowdray.config_changed"
"""Tag that lists parameters whose value differs from the run's first start: MLflow keeps the first one."""

_PARENT = "mlflow.parentRunId"
_EPOCH = "epoch"
_TIMESTAMP = "timestamp"
_LONGEST_VALUE = 500
_PARAMS_PER_BATCH = 100
_METRICS_PER_BATCH = 1000

_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where a training writes what it does; once open, an outage of the server costs warnings only."""

    run_id: str | None
    url: str | None

    def log_config(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Record a (nested) configuration as parameters, whole as `config.json`, and tags; may be repeated.

        Raises UserError when the server does not answer.
        """

    def log_dataset(self, name: str, uri: str, digest: str) -> None:
        """Record the dataset as an input of the run; may be repeated."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, such as the mark of a stage that ended; unsent ones follow with the next call."""

    def sync_history(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Log what the run does not hold yet; give the whole history each time.

        A row has "epoch", an integer that counts over all stages and becomes MLflow's step, its metrics by
        name, and optionally "timestamp" (seconds since 1970). Rows up to the run's last epoch are skipped.
        """

    def log_summary(self, metrics: Mapping[str, float], epoch: int) -> None:
        """Log figures that hold for the whole training at its last epoch; may be repeated."""

    def log_figure(self, path: Path, folder: str) -> None:
        """Store an image file under a folder of the run's artifacts; the same name replaces the file."""

    def log_file(self, path: Path, folder: str = "") -> None:
        """Store a file under a folder of the run's artifacts; the same name replaces the file."""

    def finish(self, status: Status) -> None:
        """Send what is unsent and close the run."""


class NullTracker:
    """The tracker of a training that nobody follows."""

    run_id: str | None = None
    url: str | None = None

    def log_config(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Do nothing."""

    def log_dataset(self, name: str, uri: str, digest: str) -> None:
        """Do nothing."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Do nothing."""

    def sync_history(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Do nothing."""

    def log_summary(self, metrics: Mapping[str, float], epoch: int) -> None:
        """Do nothing."""

    def log_figure(self, path: Path, folder: str) -> None:
        """Do nothing."""

    def log_file(self, path: Path, folder: str = "") -> None:
        """Do nothing."""

    def finish(self, status: Status) -> None:
        """Do nothing."""


def open_tracker(
    uri: str | None, experiment: str, run_name: str, run_key: str, *, parent: str | None = None, timeout_s: float = 20.0
) -> Tracker:
    """The tracker of one training: its run is found again by `run_key`, or made; None gives the NullTracker.

    parent: id of the run below which MLflow shows this one, such as a study's.

    Raises UserError within about `timeout_s` seconds when the tracking URI cannot be used.
    """
    if uri is None:
        return NullTracker()
    if "'" in run_key and '"' in run_key:
        raise UserError(
            f"the run key {run_key!r} holds both kinds of quotes, which MLflow cannot search; drop one kind"
        )
    client = connect(uri, timeout_s)
    with translated_errors(uri), request_timeout(timeout_s, retries=1):
        experiment_id = _experiment(client, uri, experiment).experiment_id
        run = _find_run(client, experiment_id, run_key)
        if run is None:
            run = _create_run(client, experiment_id, run_name, run_key, parent)
        else:
            client.update_run(run.info.run_id, status="RUNNING")
    return MlflowTracker(client, uri, run, timeout_s)


@contextmanager
def closing(tracker: Tracker) -> Iterator[Tracker]:
    """A tracker for the length of a block, whose end says how the block ended."""
    status: Status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)


class MlflowTracker:
    """A tracker that writes to one MLflow run; made by `open_tracker`."""

    def __init__(self, client: "MlflowClient", uri: str, run: "Run", timeout_s: float) -> None:
        self.run_id: str | None = run.info.run_id
        self.url: str | None = None
        if is_server(uri):
            self.url = f"{uri.rstrip('/')}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
        self._id: str = run.info.run_id
        self._started: int = run.info.start_time
        self._client = client
        self._uri = uri
        self._timeout_s = timeout_s
        self._params: dict[str, str] = dict(run.data.params)
        # Every row carries its epoch as a metric, in one batch with the others: the latest is the mark.
        self._mark = int(run.data.metrics.get(_EPOCH, -1))
        self._stamps: dict[int, int] = {}
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
        with translated_errors(self._uri), request_timeout(self._timeout_s, retries=2):
            for start in range(0, len(new), _PARAMS_PER_BATCH):
                self._client.log_batch(self._id, params=new[start : start + _PARAMS_PER_BATCH])
            if params:
                self._client.log_dict(self._id, dict(params), "config.json")
            marks = dict(tags) | ({CONFIG_CHANGED: "; ".join(changed)[:2000]} if changed else {})
            if GIT_REVISION in marks:
                marks["mlflow.source.git.commit"] = marks[GIT_REVISION]
            self._send_tags(marks)
        self._params.update({param.key: param.value for param in new})

    def log_dataset(self, name: str, uri: str, digest: str) -> None:
        """See Tracker.log_dataset."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        # MLflow allows 36 characters of digest; the tag holds all of them.
        source = Dataset(
            name=name,
            digest=digest[:36],
            source_type=urlsplit(uri).scheme or "local",
            source=json.dumps({"uri": uri}),
        )
        entry = DatasetInput(source, tags=[InputTag("mlflow.data.context", "training")])
        self._attempt(lambda: self._client.log_inputs(self._id, datasets=[entry]), "the dataset")
        self.set_tags({DATA_DIGEST: digest, DATASET_URI: uri})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """See Tracker.set_tags."""
        self._unsent_tags.update(tags)
        if self._attempt(lambda: self._send_tags(self._unsent_tags), "tags"):
            self._unsent_tags = {}

    def sync_history(self, rows: Sequence[Mapping[str, float]]) -> None:
        """See Tracker.sync_history."""
        fresh = {int(row[_EPOCH]): row for row in rows if int(row[_EPOCH]) > self._mark}
        ordered = [fresh[epoch] for epoch in sorted(fresh)]
        self._unsent_rows = ordered
        if self._attempt(lambda: self._send_rows(ordered), "metrics"):
            self._unsent_rows = ()

    def log_summary(self, metrics: Mapping[str, float], epoch: int) -> None:
        """See Tracker.log_summary."""
        from mlflow.entities import Metric

        # A fixed moment: repeated, these are the same points to MLflow, and not logged twice.
        points = [Metric(k, float(v), self._started, epoch) for k, v in metrics.items() if math.isfinite(v)]
        self._attempt(lambda: self._client.log_batch(self._id, metrics=points), "the summary")

    def log_figure(self, path: Path, folder: str) -> None:
        """See Tracker.log_figure."""
        self.log_file(path, folder)

    def log_file(self, path: Path, folder: str = "") -> None:
        """See Tracker.log_file."""
        self._attempt(lambda: self._client.log_artifact(self._id, str(path), folder or None), f"the file {path.name}")

    def finish(self, status: Status) -> None:
        """See Tracker.finish."""
        if self._unsent_rows:
            self.sync_history(self._unsent_rows)
        if self._unsent_tags:
            self.set_tags({})
        self._attempt(lambda: self._client.set_terminated(self._id, status), f"the end ({status})")

    def _attempt(self, send: Callable[[], object], what: str) -> bool:
        try:
            with translated_errors(self._uri), request_timeout(self._timeout_s, retries=1):
                send()
        except UserError as error:
            _log.warning("%s not tracked now, the training goes on: %s", what, error)
            return False
        return True

    def _send_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        if tags:
            self._client.log_batch(self._id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

    def _send_rows(self, rows: Sequence[Mapping[str, float]]) -> None:
        from mlflow.entities import RunTag

        # A batch is one transaction and holds whole rows: a start that died in between leaves no half row.
        for batch in _batches(rows):
            metrics = [metric for row in batch for metric in self._metrics(row)]
            listed = self._nonfinite_of(batch)
            tags = [RunTag(NONFINITE, listed)] if listed != self._nonfinite else []
            self._client.log_batch(self._id, metrics=metrics, tags=tags)
            self._nonfinite = listed
            self._mark = int(batch[-1][_EPOCH])

    def _metrics(self, row: Mapping[str, float]) -> list["Metric"]:
        from mlflow.entities import Metric

        # The moment of a row is fixed at its first attempt: a repeated request then repeats the same points,
        # which the store recognises, even when the answer to the first one was lost.
        epoch = int(row[_EPOCH])
        stamp = self._stamps.setdefault(epoch, int(row.get(_TIMESTAMP, time.time()) * 1000))
        return [
            Metric(key, float(value), stamp, epoch)
            for key, value in row.items()
            if key != _TIMESTAMP and math.isfinite(value)
        ]

    def _nonfinite_of(self, rows: Sequence[Mapping[str, float]]) -> str:
        found = [
            f"epoch {int(row[_EPOCH])}: {key} = {value}"
            for row in rows
            for key, value in row.items()
            if not math.isfinite(value)
        ]
        return "; ".join(filter(None, [self._nonfinite, *found]))[:1000]


def flatten(params: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of a nested configuration as ("a.b.0.c", text); lists of plain values stay one JSON text.

    Leaves longer than 500 characters are left out: the artifact config.json holds them.
    """
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name}.")
        elif isinstance(value, Sequence) and not isinstance(value, str) and any(isinstance(v, Mapping) for v in value):
            yield from flatten({str(index): item for index, item in enumerate(value)}, f"{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            if len(text) <= _LONGEST_VALUE:
                yield name, text


def _batches(rows: Sequence[Mapping[str, float]]) -> Iterator[list[Mapping[str, float]]]:
    batch: list[Mapping[str, float]] = []
    held = 0
    for row in rows:
        assert len(row) <= _METRICS_PER_BATCH, f"epoch {row[_EPOCH]} has {len(row)} metrics, MLflow takes 1,000 at once"
        if held + len(row) > _METRICS_PER_BATCH:
            yield batch
            batch, held = [], 0
        batch.append(row)
        held += len(row)
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
            f"the MLflow experiment {name!r} was made through a server, which keeps its files, but the "
            f"tracking URI {redacted(uri)} goes past it; set MLFLOW_TRACKING_URI to the server's address, "
            "or choose another name"
        )
    return found


def _artifact_root(uri: str, experiment: str) -> str | None:
    # MLflow would use ./mlruns under whatever folder the process runs in; a server knows its own place.
    if is_server(uri) or not uri.startswith("sqlite"):
        return None
    return (sqlite_path(uri).parent / "mlartifacts" / re.sub(r"[^\w.-]+", "-", experiment)).as_uri()


def _find_run(client: "MlflowClient", experiment_id: str, run_key: str) -> "Run | None":
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
    # Two first starts at the same moment both create a run; both then agree on the older one.
    first = _find_run(client, experiment_id, run_key) or created
    if first.info.run_id != created.info.run_id:
        client.delete_run(created.info.run_id)
    return first
