"""The folder of a finished run: its table, weights and log, and the removal of its checkpoints."""

import csv
import io
from pathlib import Path

import pytest
import torch

from crowdray import storage
from crowdray.pipeline.results import results_csv, weights_file
from crowdray.pipeline.run import RAY_CHECKPOINT_LIST, remove_checkpoints
from crowdray.pipeline.run_log import LOG, RunLog
from crowdray.training.checkpoint import STATE, EpochMetrics


def test_results_csv_has_a_row_per_epoch_and_leaves_missing_metrics_empty() -> None:
    history: list[EpochMetrics] = [
        {"epoch": 1, "stage": "baseline", "val/mae": 2.5},
        {"epoch": 2, "stage": "decoders", "loss/count": 1.0},
    ]
    rows = list(csv.DictReader(io.StringIO(results_csv(history))))
    assert rows == [
        {"epoch": "1", "stage": "baseline", "val/mae": "2.5", "loss/count": ""},
        {"epoch": "2", "stage": "decoders", "val/mae": "", "loss/count": "1.0"},
    ]


def test_weights_file_is_a_plain_state_dict() -> None:
    weights = {"encoder.w": torch.arange(6.0).reshape(2, 3)[:, 1:], "decoders.density.b": torch.zeros(2)}
    loaded = torch.load(io.BytesIO(weights_file(weights)), weights_only=True)
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_remove_checkpoints_killed_in_between_leaves_all_results_and_ends_when_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ["outcome.json", "trained/result.json", "model/MLmodel", "weights.pt", "driver.lock"]
    partial = f"{storage.PARTIAL}0-checkpoint-00001"  # of an earlier removal that was killed
    removed = [RAY_CHECKPOINT_LIST, ".validate_storage_marker", f"{partial}/{STATE}"]
    removed += [f"checkpoint-{epoch:05d}/{name}" for epoch in (8, 9) for name in (STATE, "weights.safetensors")]
    for name in kept + removed:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    unpublish, calls = storage.unpublish_directory, []

    def killed(uri: str, last: str) -> None:
        calls.append(uri)
        if len(calls) == 2:
            raise KeyboardInterrupt
        unpublish(uri, last)

    with monkeypatch.context() as kill, pytest.raises(KeyboardInterrupt):
        kill.setattr(storage, "unpublish_directory", killed)
        remove_checkpoints(str(tmp_path))
    assert all((tmp_path / name).read_text() == name for name in kept)
    for _ in range(2):
        remove_checkpoints(str(tmp_path))
        left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
        assert left == sorted(kept) and not list(tmp_path.glob("*checkpoint-*"))


@pytest.mark.parametrize("folder", ["local", "memory"])
def test_run_log_keeps_the_lines_of_all_starts_without_credentials(tmp_path: Path, folder: str) -> None:
    run = str(tmp_path) if folder == "local" else f"memory://{tmp_path.name}"
    with RunLog(run) as log:
        log.write("starting on s3://me:secret@bucket/x")
        log.write_epoch({"epoch": 1, "stage": "joint", "val/mae": 1.23456789})
    with pytest.raises(ValueError, match="broken"), RunLog(run) as log:
        raise ValueError("broken\nfile")
    lines = storage.read_bytes(storage.join(run, LOG)).decode().splitlines()
    texts = ["starting on s3://bucket/x", "epoch 1 stage joint val/mae 1.2346", "ValueError: broken file"]
    assert [line[20:] for line in lines] == texts
