"""A run is one run, whatever happens to the process or the server, and its curves hold each epoch once."""

import logging
import math
import os
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from crowdray.errors import UserError
from crowdray.registry import tracking
from crowdray.registry.connection import connect, redacted, request_timeout, sqlite_path
from crowdray.registry.tracking import MlflowTracker, NullTracker, Tracker, flatten, open_tracker


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


def test_run_is_found_again_and_overlapping_histories_give_each_step_once(store: str) -> None:
    first = _open(store, "overlap")
    first.sync_history(_rows(range(0, 3)))
    first.sync_history(_rows(range(0, 5)))
    # The process is killed here: nothing closes the run. The next one resumes at epoch 3.
    second = _open(store, "overlap")
    second.sync_history(_rows(range(0, 4)))
    second.sync_history(_rows(range(3, 7)))
    second.finish("FINISHED")

    assert second.run_id == first.run_id
    for key in ("val/mae", "stage1/loss/density"):
        assert _curve(store, first.run_id, key) == [(row["epoch"], row[key]) for row in _rows(range(0, 7))]


def test_finished_run_is_reopened(store: str) -> None:
    first = _open(store, "it's again")
    first.finish("KILLED")
    client = MlflowClient(store, store)
    assert client.get_run(str(first.run_id)).info.status == "KILLED"
    second = _open(store, "it's again")
    assert second.run_id == first.run_id
    assert client.get_run(str(first.run_id)).info.status == "RUNNING"


def test_other_key_is_another_run(store: str) -> None:
    assert _open(store, "left").run_id != _open(store, "right").run_id


def test_first_starts_that_race_agree_on_one_run(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = tracking._find_run
    answers = iter([lambda *a: None])

    def blind_once(client: MlflowClient, experiment_id: str, key: str) -> object:
        return next(answers, find)(client, experiment_id, key)

    first = _open(store, "race")
    monkeypatch.setattr(tracking, "_find_run", blind_once)  # the second saw no run before it created its own
    second = _open(store, "race")
    assert second.run_id == first.run_id
    client = MlflowClient(store, store)
    experiment = client.get_experiment_by_name("tracking")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id], "tags.`crowdray.run_key` = 'race'")) == 1


def test_long_history_crosses_batches(store: str) -> None:
    rows = [{"epoch": epoch, **{f"m{index:03d}": float(epoch) for index in range(300)}} for epoch in range(10)]
    tracker = _open(store, "long")
    tracker.sync_history(rows)
    assert _curve(store, tracker.run_id, "m299") == [(epoch, float(epoch)) for epoch in range(10)]


def test_nonfinite_values_stay_out_of_the_curves_and_are_named(store: str) -> None:
    tracker = _open(store, "nan")
    tracker.sync_history([{"epoch": 0, "loss": math.nan}, {"epoch": 1, "loss": 1.0, "grad": math.inf}])
    assert _curve(store, tracker.run_id, "loss") == [(1, 1.0)]
    tag = MlflowClient(store, store).get_run(str(tracker.run_id)).data.tags[tracking.NONFINITE]
    assert tag == "epoch 0: loss = nan; epoch 1: grad = inf"


def test_outage_costs_a_warning_and_is_made_up_for(
    store: str, closed_port: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = _open(store, "outage")
    tracker.sync_history(_rows(range(0, 2)))
    up = tracker._client
    with monkeypatch.context() as outage:
        outage.setattr(tracker, "_client", MlflowClient(closed_port, closed_port))
        outage.setattr(tracker, "_timeout_s", 1.0)
        with caplog.at_level(logging.WARNING):
            tracker.sync_history(_rows(range(0, 4)))
            tracker.set_tags({"crowdray.stage1": "epochs 0 to 3"})
    assert "the training goes on" in caplog.text
    assert tracker._client is up
    tracker.finish("FINISHED")
    assert [step for step, _ in _curve(store, tracker.run_id, "val/mae")] == [0, 1, 2, 3]
    assert up.get_run(str(tracker.run_id)).data.tags["crowdray.stage1"] == "epochs 0 to 3"


def test_artifacts_that_cannot_be_stored_cost_a_warning_or_one_clear_error(
    store: str, closed_port: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "somebody")
    monkeypatch.setenv("AWS_ENDPOINT_URL", closed_port)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    MlflowClient(store, store).create_experiment("afar", artifact_location="s3://bucket/afar")
    tracker = open_tracker(store, "afar", "a run", "afar")
    (tmp_path / "note.txt").write_text("a note")
    tracker.log_file(tmp_path / "note.txt")
    assert "note.txt not tracked now" in caplog.text and "Connection refused" in caplog.text
    with pytest.raises(UserError, match=r"artifact store of .*check its credentials"):
        tracker.log_config({"seed": 1}, {})


def test_config_may_be_logged_again_and_is_kept_whole(store: str) -> None:
    config = {"model": {"name": "cfcn", "sizes": [1, 2]}, "stages": [{"epochs": 3}], "note": "x" * 7000}
    for value in (3, 4):
        tracker = _open(store, "config")
        config["stages"] = [{"epochs": value}]
        tracker.log_config(config, {tracking.GIT_REVISION: "abc+dirty"})
    client = MlflowClient(store, store)
    data = client.get_run(str(tracker.run_id)).data
    assert data.params == {"model.name": "cfcn", "model.sizes": "[1, 2]", "stages.0.epochs": "3"}
    assert data.tags[tracking.CONFIG_CHANGED] == "stages.0.epochs: 3 -> 4"
    assert data.tags["mlflow.source.git.commit"] == "abc+dirty"
    kept = client.download_artifacts(str(tracker.run_id), "config.json")
    assert '"epochs": 4' in Path(kept).read_text() and "x" * 7000 in Path(kept).read_text()


def test_dataset_is_one_input_of_the_run(store: str) -> None:
    tracker = _open(store, "dataset")
    for _ in range(2):
        tracker.log_dataset("mall", "s3://bucket/mall", "f" * 64)
    run = MlflowClient(store, store).get_run(str(tracker.run_id))
    assert run.inputs is not None
    (entry,) = run.inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("mall", "f" * 36)
    assert run.data.tags[tracking.DATA_DIGEST] == "f" * 64


def test_files_lie_beside_the_database_wherever_the_process_runs(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    figure = tmp_path / "figure.png"
    figure.write_bytes(b"png")
    tracker = _open(store, "files")
    tracker.log_file(figure, "figures/epoch-001")
    assert list(tmp_path.iterdir()) == [figure]
    kept = sqlite_path(store).parent / "mlartifacts" / "tracking" / str(tracker.run_id)
    assert (kept / "artifacts/figures/epoch-001/figure.png").read_bytes() == b"png"


def test_no_uri_gives_the_null_tracker(tmp_path: Path) -> None:
    tracker: Tracker = open_tracker(None, "any", "any", "any")
    assert isinstance(tracker, NullTracker) and tracker.run_id is None
    tracker.sync_history([{"epoch": 0}])
    tracker.finish("FINISHED")


def test_unreachable_server_is_refused_at_once(closed_port: str) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match=f"{closed_port}.*refused.*set MLFLOW_TRACKING_URI"):
        open_tracker(closed_port, "any", "any", "any", timeout_s=5)
    assert time.monotonic() - started < 5


def test_silent_server_is_refused_within_the_timeout(silent_server: str) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match=f"{silent_server}.*timed out"):
        open_tracker(silent_server, "any", "any", "any", timeout_s=1)
    assert time.monotonic() - started < 4


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("./mlruns", r"plain folder.*sqlite:///\./mlruns/mlflow\.db"),
        ("file:///a/b", r"plain folder.*sqlite:////a/b/mlflow\.db"),
        ("foo://x", "scheme 'foo'"),
        ("http://", "names no host"),
        ("sqlite:////proc/none/m.db", "cannot open the MLflow database /proc/none/m.db"),
        ("postgresql://me:secret@127.0.0.1:9/db", "127.0.0.1:9 does not answer"),
    ],
)
def test_impossible_uris_are_refused_with_the_mend(uri: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        connect(uri, timeout_s=2)
    assert "secret" not in str(caught.value)


def test_other_file_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "m.db").write_text("this is a text, and no database at all, however long it may be")
    with pytest.raises(UserError, match="not a database"):
        connect(f"sqlite:///{tmp_path}/m.db", timeout_s=2)


def test_passwords_are_not_shown() -> None:
    assert redacted("http://me:secret@host:5000/x") == "http://me:***@host:5000/x"


def test_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    with request_timeout(3, retries=0):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "3"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_flatten_names_every_leaf() -> None:
    nested = {"a": {"b": 1, "c": {"d": None}}, "e": [{"f": True}, {"f": False}], "g": (1, 2), "h": "text"}
    assert dict(flatten(nested)) == {
        "a.b": "1", "a.c.d": "null", "e.0.f": "true", "e.1.f": "false", "g": "[1, 2]", "h": "text",
    }  # fmt: skip
