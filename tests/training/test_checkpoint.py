"""Checkpoints: a full disk, damaged files, and the previous form, which is still read."""

import errno
import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from crowdray.config import Config
from crowdray.errors import UserError
from crowdray.training.checkpoint import (
    BestEpoch,
    Checkpoint,
    Progress,
    disk_full_as_user_error,
    load_checkpoint,
    save_checkpoint,
)

WEIGHTS = {"encoder.a": torch.arange(4.0), "decoders.density.b": torch.ones(2, dtype=torch.int64)}

OLD_STATE = {  # previous names
    "format": 1,
    "density_scale": 50.0,
    "count_scale": 2.5,
    "data_digest": "d" * 64,
    "world_size": 2,
    "chain": "c" * 32,  # previous names
    "stage": 2,
    "stage_epochs": 1,
    "epochs": 4,
    "updates": 20,
    "stale": 3,  # previous names
    "factors": {"density": 1.0, "depth": 0.25},
    "norms": {"density": 2.0, "depth": 8.0},
    "learning_rate": 0.01,
    "plateau": {"best": 1.5, "bad_epochs": 1, "epoch": 4},
    "average_updates": 5,
    "best": {"baseline": {"epoch": 2, "mae": 1.5, "rmse": 2.0}},
    "history": [{"epoch": 1, "stage": "baseline", "wait_share": 0.1, "matrix_share": 0.2}],  # previous names
}


def save(folder: Path, progress: Progress) -> Checkpoint:
    checkpoint = Checkpoint(Config(seed=7), progress, WEIGHTS, WEIGHTS, WEIGHTS, {"baseline": WEIGHTS})
    save_checkpoint(checkpoint, folder)
    return checkpoint


def progress_of(stage: int = 0) -> Progress:
    return Progress(50.0, 2.5, "d" * 64, 2, stage=stage, best={"baseline": BestEpoch(2, 1.5, 2.0)})


def test_load_checkpoint_returns_what_was_saved(tmp_path: Path) -> None:
    saved, loaded = save(tmp_path, progress_of()), load_checkpoint(tmp_path)
    assert (loaded.config, loaded.progress) == (saved.config, saved.progress)
    for tensors in (loaded.weights, loaded.ema, loaded.optimizer, loaded.best_weights["baseline"]):
        assert tensors.keys() == WEIGHTS.keys()
        assert all(torch.equal(value, WEIGHTS[name]) for name, value in tensors.items())


def test_load_checkpoint_in_previous_form_renames_its_fields(tmp_path: Path) -> None:
    save(tmp_path, progress_of())
    (tmp_path / "state.json").write_text(json.dumps(OLD_STATE))
    config = json.loads((tmp_path / "config.json").read_text())
    config["optimizer"]["accumulate"] = config["optimizer"].pop("grad_accumulation_steps")
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.config == Config(seed=7)
    assert asdict(checkpoint.progress) == {
        **{name: OLD_STATE[name] for name in ("density_scale", "count_scale", "data_digest", "world_size", "best")},
        **{
            name: OLD_STATE[name] for name in ("stage", "stage_epochs", "epochs", "updates", "learning_rate", "plateau")
        },
        "stage_key": "c" * 32,
        "epochs_since_best": 3,
        "loss_weights": {"density": 1.0, "depth": 0.25},
        "gradient_norms": {"density": 2.0, "depth": 8.0},
        "ema_updates": 5,
        "history": [{"epoch": 1, "stage": "baseline", "data_wait_fraction": 0.1, "mfu": 0.2}],
    }


@pytest.mark.parametrize("name", ["state.json", "config.json", "weights.safetensors", "best-baseline.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_load_checkpoint_with_damaged_file_raises(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, progress_of())
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if damage == "truncated":
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=str(tmp_path)):
        load_checkpoint(tmp_path)


def test_disk_full_as_user_error_translates_a_full_disk_only() -> None:
    with (
        pytest.raises(UserError, match=r"no space left for s3://b/run, or in .*; free some, try again"),
        disk_full_as_user_error("s3://b/run", "try again"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match="refused"), disk_full_as_user_error("s3://b/run", "try again"):
        raise OSError(errno.ECONNREFUSED, "refused")
