"""Temporary folders: private, removed at their end, and removed once their owner was killed."""

import multiprocessing
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from crowdray.storage.scratch import remove_orphans, scratch_folder

FORK = multiprocessing.get_context("fork")


def _own(parent: str, ready: Any, end: Any) -> None:
    with scratch_folder("model", parent) as folder:
        (folder / "weights").write_bytes(b"w")
        ready.set()
        end.wait(60)
        os._exit(1)  # as if killed: nothing is cleaned up


def test_scratch_folder_is_private_and_removed_on_any_end(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), scratch_folder("model", str(tmp_path)) as folder:
        assert folder.name == "model" and os.listdir(folder) == []
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
        (folder / "a" / "b").mkdir(parents=True)
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_remove_orphans_removes_folders_of_killed_owners_only(tmp_path: Path) -> None:
    other = tmp_path / "crowdray-download" / "model"
    other.mkdir(parents=True)
    (tmp_path / "crowdray-link").symlink_to(other.parent)
    ready, end = FORK.Event(), FORK.Event()
    owner = FORK.Process(target=_own, args=(str(tmp_path), ready, end))
    owner.start()
    assert ready.wait(60)
    remove_orphans(tmp_path)
    assert len(list(tmp_path.glob("*/model/weights"))) == 1, "its owner is running"
    end.set()
    owner.join()
    with scratch_folder("state", str(tmp_path)) as mine:
        remove_orphans(tmp_path)
        assert mine.is_dir()
    assert sorted(os.listdir(tmp_path)) == ["crowdray-download", "crowdray-link"]
    assert other.is_dir()


def test_scratch_folders_of_racing_processes_are_never_removed(tmp_path: Path) -> None:
    remover = FORK.Process(target=_remove_for_a_while, args=(tmp_path,))
    remover.start()
    while remover.is_alive():
        with scratch_folder("state", str(tmp_path)) as folder:
            (folder / "file").write_bytes(b"")
            assert (folder / "file").exists()
    assert remover.exitcode == 0


def _remove_for_a_while(parent: Path) -> None:
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        remove_orphans(parent)
