"""Tracking: one MLflow run per key and each epoch logged once, across restarts and outages."""

import logging
import math
import os
import shutil
import sys
import time
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from crowdray.errors import UserError
from crowdray.registry import pages, tracking
from crowdray.registry.connection import call_mlflow, connect, sqlite_path, sqlite_uri
from crowdray.registry.tracking import MlflowTracker, flatten, open_tracker

from ..conftest import ODD_FOLDER

pytestmark = pytest.mark.slow


def _open(store: str, key: str) -> MlflowTracker:
    tracker = open_tracker(store, "tracking", "a run", key)
    assert isinstance(tracker, MlflowTracker)
    return tracker


def _curve(store: str, run_id: str | None, key: str) -> list[tuple[int, float]]:
    assert run_id is not None
    history = MlflowClient(store, store).get_metric_history(run_id, key)
    return sorted((point.step, point.value) for point in history)


def _rows(epochs: range) -> list[dict[str, float]]:
    return [{"epoch": epoch, "val/mae": 10.0 / (epoch + 1), "stage1/loss/density": 0.5} for epoch in epochs]


def test_sync_history_after_a_restart_logs_each_epoch_once(store: str) -> None:
    first = _open(store, "overlap")
    first.sync_history(_rows(range(0, 3)))
    first.sync_history(_rows(range(0, 5)))
    # The process is killed here, so the run is not closed. The next one resumes at epoch 3.
    second = _open(store, "overlap")
    second.sync_history(_rows(range(0, 4)))
    second.sync_history(_rows(range(3, 7)))
    second.finish("FINISHED")

    assert second.run_id == first.run_id
    for key in ("val/mae", "stage1/loss/density"):
        assert _curve(store, first.run_id, key) == [(row["epoch"], row[key]) for row in _rows(range(0, 7))]


def test_open_tracker_of_a_finished_run_reopens_it_by_its_key(store: str) -> None:
    key = 'it\'s a "key" with C# 50%\\ ?'
    first = _open(store, key)
    first.finish("KILLED")
    client = MlflowClient(store, store)
    assert client.get_run(str(first.run_id)).info.status == "KILLED"
    assert _open(store, "other").run_id != first.run_id
    second = _open(store, key)
    assert second.run_id == first.run_id
    assert client.get_run(str(first.run_id)).info.status == "RUNNING"


@pytest.mark.parametrize(("lookup", "missing"), [("search_runs", []), ("get_experiment_by_name", None)])
def test_open_tracker_racing_with_another_start_agrees_on_one_run(
    store: str, monkeypatch: pytest.MonkeyPatch, lookup: str, missing: object
) -> None:
    first = _open(store, "race")
    real, early = getattr(MlflowClient, lookup), [True]

    def look(*args: object, **options: object) -> object:
        return missing if early and early.pop() else real(*args, **options)

    monkeypatch.setattr(MlflowClient, lookup, look)  # the second start looks before the first one has created it
    assert _open(store, "race").run_id == first.run_id
    client = MlflowClient(store, store)
    experiment = client.get_experiment_by_name("tracking")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id], "tags.`crowdray.run_key` = 'race'")) == 1


def test_sync_history_larger_than_a_batch_logs_every_epoch(store: str) -> None:
    rows = [{"epoch": epoch, **{f"m{index:03d}": float(epoch) for index in range(300)}} for epoch in range(10)]
    tracker = _open(store, "long")
    tracker.sync_history(rows)
    assert _curve(store, tracker.run_id, "m299") == [(epoch, float(epoch)) for epoch in range(10)]


def test_sync_history_leaves_out_nonfinite_values(store: str) -> None:
    tracker = _open(store, "nan")
    tracker.sync_history([{"epoch": 0, "loss": math.nan}, {"epoch": 1, "loss": 1.0, "grad": math.inf}])
    assert _curve(store, tracker.run_id, "loss") == [(1, 1.0)]
    assert _curve(store, tracker.run_id, "system/epoch") == [(0, 0.0), (1, 1.0)]


def test_sync_history_of_a_run_of_an_earlier_version_logs_all_epochs_under_the_present_names(store: str) -> None:
    first = _open(store, "earlier")
    for epoch in range(3):  # the epoch was a metric of another name
        first.client.log_metric(str(first.run_id), "epoch", float(epoch), step=epoch)
    second = _open(store, "earlier")
    second.sync_history(_rows(range(0, 4)))
    assert [step for step, _ in _curve(store, first.run_id, "val/mae")] == [0, 1, 2, 3]


def test_open_tracker_names_user_source_and_note_and_keeps_a_changed_note(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/crowdray/jobs/train.py", "--name", "secret"])
    monkeypatch.setenv("LOGNAME", "ann")
    for _ in range(2):
        tracker = open_tracker(store, "tracking", "a run", "origin", note="from s3://me:secret@bucket/mall")
        client = MlflowClient(store, store)
        tags = client.get_run(str(tracker.run_id)).data.tags
        assert (tags["mlflow.user"], tags["mlflow.source.name"]) == ("ann", "jobs/train.py")
        assert "secret" not in str(tags)
        client.set_tag(str(tracker.run_id), "mlflow.note.content", "mine")
    assert tags["mlflow.note.content"] == "mine"
    experiment = client.get_experiment_by_name("tracking")
    assert experiment is not None and experiment.tags[pages.VIEW_TAG] == pages.VIEW
    assert tracker.url == pages.run_page("http://127.0.0.1:5000", experiment.experiment_id, str(tracker.run_id))


def test_tracker_after_an_outage_sends_what_was_missed(
    store: str, closed_port: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = _open(store, "outage")
    tracker.sync_history(_rows(range(0, 2)))
    with monkeypatch.context() as outage:
        outage.setattr(tracker, "client", MlflowClient(closed_port, closed_port))
        outage.setattr(tracker, "timeout_s", 1.0)
        with caplog.at_level(logging.WARNING):
            tracker.sync_history(_rows(range(0, 4)))
    assert "training continues" in caplog.text
    tracker.sync_history(_rows(range(0, 5)))
    assert [step for step, _ in _curve(store, tracker.run_id, "val/mae")] == [0, 1, 2, 3, 4]


def test_tracker_with_an_unreachable_artifact_store_warns_or_raises(
    store: str, closed_port: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "key")
    monkeypatch.setenv("AWS_ENDPOINT_URL", closed_port)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    MlflowClient(store, store).create_experiment("remote", artifact_location="s3://bucket/remote")
    tracker = open_tracker(store, "remote", "a run", "remote")
    (tmp_path / "note.txt").write_text("a note")
    tracker.log_file(tmp_path / "note.txt")
    assert "note.txt not tracked" in caplog.text and "Connection refused" in caplog.text
    with pytest.raises(UserError, match=r"artifact store of .*check the credentials"):
        tracker.log_config({"seed": 1}, {})


def test_log_config_twice_keeps_the_first_parameters_and_the_last_config(store: str) -> None:
    config = {"model": {"name": "cfcn", "sizes": [1, 2]}, "stages": [{"epochs": 3}], "note": "x" * 7000}
    for value in (3, 4):
        tracker = _open(store, "config")
        config["stages"] = [{"epochs": value}]
        tracker.log_config(config, {tracking.GIT_REVISION: "abc+dirty"})
    client = MlflowClient(store, store)
    data = client.get_run(str(tracker.run_id)).data
    assert data.params == {"model.name": "cfcn", "model.sizes": "[1, 2]", "stages.0.epochs": "3"}
    assert data.tags["mlflow.source.git.commit"] == "abc+dirty"
    kept = client.download_artifacts(str(tracker.run_id), "config.json")
    assert '"epochs": 4' in Path(kept).read_text() and "x" * 7000 in Path(kept).read_text()


def test_log_dataset_twice_adds_one_input(store: str) -> None:
    tracker = _open(store, "dataset")
    for _ in range(2):
        tracker.log_dataset("mall", "s3://bucket/mall", "f" * 64)
    run = MlflowClient(store, store).get_run(str(tracker.run_id))
    assert run.inputs is not None
    (entry,) = run.inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("mall", "f" * 36)
    assert run.data.tags[tracking.DATA_DIGEST] == "f" * 64


def test_log_file_stores_artifacts_next_to_the_database(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    figure = tmp_path / "figure.png"
    figure.write_bytes(b"png")
    tracker = _open(store, "files")
    tracker.log_file(figure, "figures/epoch-001")
    assert list(tmp_path.iterdir()) == [figure]
    root = sqlite_path(store).parent / "mlartifacts" / "tracking" / str(tracker.run_id)
    assert (root / "artifacts/figures/epoch-001/figure.png").read_bytes() == b"png"


def test_sqlite_uri_is_opened_by_mlflow_as_exactly_that_file(store: str, tmp_path: Path) -> None:
    folder = tmp_path / ODD_FOLDER
    folder.mkdir()
    uri = sqlite_uri(Path(shutil.copy(sqlite_path(store), folder)))
    tracker = open_tracker(uri, "exact", "a run", "exact")
    tracker.log_config({"a": 1}, {})
    assert sqlite_path(uri) == folder / "mlflow.db" and os.listdir(tmp_path) == [ODD_FOLDER]
    assert (folder / "mlartifacts" / "exact" / str(tracker.run_id) / "artifacts" / "config.json").is_file()
    assert sqlite_path("sqlite:///a%20b.db") == Path("a b.db").absolute()
    for unnamed in ("sqlite://", "sqlite:///:memory:", "sqlite:///file:a.db?uri=true"):
        with pytest.raises(UserError, match="names no file; use sqlite:////"):
            sqlite_path(unnamed)


def test_open_tracker_of_mlflow_in_a_folder_with_a_percent_sign_says_so(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow, "__file__", "/home/100%/.venv/mlflow/__init__.py")
    with pytest.raises(UserError, match=r"from /home/100%/\.venv/mlflow, where.*move the checkout to a folder without"):
        _open(store, "any")


@pytest.mark.parametrize(("server", "problem"), [("closed_port", "refused.*start it"), ("silent_server", "timed out")])
def test_open_tracker_without_an_answer_raises_within_the_timeout(
    request: pytest.FixtureRequest, server: str, problem: str
) -> None:
    address, started = request.getfixturevalue(server), time.monotonic()
    with pytest.raises(UserError, match=f"{address}.*{problem}"):
        open_tracker(address, "any", "any", "any", timeout_s=1)
    assert time.monotonic() - started < 4


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("./mlruns", r"plain folder.*sqlite:///\./mlruns/mlflow\.db"),
        ("file:///a/b", r"plain folder.*sqlite:////a/b/mlflow\.db"),
        ("foo://x", "cannot use .*foo"),
        ("sqlite:////proc/none/m.db", "/proc/none/m.db: .*make the file and its folder writable"),
        ("postgresql+psycopg2://me:secret@127.0.0.1:9/db", "pip install psycopg2-binary"),
    ],
)
def test_connect_to_an_invalid_uri_raises_with_the_fix(uri: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        connect(uri, timeout_s=2)
    assert "secret" not in str(caught.value)


def test_connect_to_a_text_file_raises(tmp_path: Path) -> None:
    (tmp_path / "m.db").write_text("this is a text file and not a database, whatever its name says")
    with pytest.raises(UserError, match="not a database"):
        connect(f"sqlite:///{tmp_path}/m.db", timeout_s=2)


def test_call_mlflow_restores_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    assert call_mlflow("http://x", 3, lambda: os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]) == "3"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_flatten_nested_config_names_every_leaf() -> None:
    nested = {"a": {"b": 1, "c": {"d": None}}, "e": [{"f": True}, {"f": False}], "g": (1, 2), "h": "text"}
    assert dict(flatten(nested)) == {
        "a.b": "1", "a.c.d": "null", "e.0.f": "true", "e.1.f": "false", "g": "[1, 2]", "h": "text",
    }  # fmt: skip
