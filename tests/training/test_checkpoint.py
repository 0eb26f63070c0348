"""Checkpoints: a full disk, damaged files, and the previous form, which is still read."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from crowdray.errors import UserError
from crowdray.training.checkpoint import (
    disk_full_as_user_error,
    load_checkpoint,
    save_checkpoint,
)

from ..support.states import checkpoint, same

OLD_NAMES = {
    "stage_key": "chain",  # previous names
    "epochs_since_best": "stale",  # previous names
    "loss_weights": "factors",
    "gradient_norms": "norms",
    "ema_updates": "average_updates",
}


def test_load_checkpoint_returns_what_was_saved(tmp_path: Path) -> None:
    save_checkpoint(checkpoint(7), tmp_path)
    assert same(load_checkpoint(tmp_path), checkpoint(7))


def test_load_checkpoint_in_previous_form_renames_its_fields(tmp_path: Path) -> None:
    saved = checkpoint(7)
    saved.progress = replace(saved.progress, stage_key="c" * 32, epochs_since_best=3, loss_weights={"depth": 0.25})
    saved.progress = replace(saved.progress, gradient_norms={"depth": 8.0}, ema_updates=5)
    saved.progress.history = [{"epoch": 1, "stage": "baseline", "data_wait_fraction": 0.1, "mfu": 0.2}]
    save_checkpoint(saved, tmp_path)
    state, config = (json.loads((tmp_path / name).read_text()) for name in ("state.json", "config.json"))
    del state["sha256"], state["files"]
    state = {OLD_NAMES.get(name, name): value for name, value in state.items()}
    state["history"] = [{"epoch": 1, "stage": "baseline", "wait_share": 0.1, "matrix_share": 0.2}]  # previous names
    config["optimizer"]["accumulate"] = config["optimizer"].pop("grad_accumulation_steps")
    (tmp_path / "state.json").write_text(json.dumps(state))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert same(load_checkpoint(tmp_path), saved)


@pytest.mark.parametrize("name", ["state.json", "config.json", "weights.safetensors", "best-baseline.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "one bit flipped"])
def test_load_checkpoint_with_damaged_file_raises(tmp_path: Path, name: str, damage: str) -> None:
    save_checkpoint(checkpoint(7), tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if damage == "truncated":
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    elif damage == "one bit flipped":
        flipped = bytearray(content)
        flipped[-3] ^= 1
        (tmp_path / name).write_bytes(flipped)
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
