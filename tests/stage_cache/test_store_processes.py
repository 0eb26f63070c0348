"""The stage store under racing and killed processes: at any moment it contains whole states only."""

import multiprocessing
import os
import signal
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from crowdray import storage
from crowdray.config import Config
from crowdray.stage_cache import store as store_module
from crowdray.stage_cache.keys import StageKey
from crowdray.stage_cache.store import StageStore, StateId
from crowdray.training.checkpoint import Checkpoint, Progress, save_checkpoint

FORK = multiprocessing.get_context("fork")
KEY = StageKey("a" * 32, "baseline", 10)
UNLIMITED = 10**9


@pytest.fixture
def all_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every state as idle for long."""
    monkeypatch.setattr(store_module, "IDLE_S", -5.0)


def save(number: int) -> Callable[[Path], None]:
    weights = {"w": torch.full((1000,), float(number))}
    made = Checkpoint(Config(seed=number), Progress(1.0, float(number), "data", 1), weights, weights, weights)
    return lambda folder: save_checkpoint(made, folder)


def number_of(checkpoint: Checkpoint) -> int:
    """The number that all parts of a whole state contain."""
    parts = (checkpoint.weights, checkpoint.ema, checkpoint.optimizer)
    values = {value for part in parts for value in part["w"].tolist()}
    (number,) = values | {checkpoint.progress.count_scale, float(checkpoint.config.seed)}
    return int(number)


def stored(store: StageStore) -> dict[int, int]:
    """The number in each stored state, by epoch; fails unless all are whole."""
    numbers = {}
    for epoch in store.epochs(KEY):
        checkpoint = store.load(StateId(KEY.key, KEY.stage, epoch))
        assert checkpoint is not None, f"epoch {epoch} is torn"
        numbers[epoch] = number_of(checkpoint)
    return numbers


def _publish_until(uri: str, limit: int, last: int, events: Any) -> None:
    """Publish epoch 2 and die before file-system operation number `last`."""
    count = 0
    watched = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "shutil.copyfile", "os.utime")

    def hook(event: str, _: object) -> None:
        nonlocal count
        if event in watched:
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    write = save(2)
    sys.addaudithook(hook)
    StageStore(uri, limit).publish(KEY, 2, write)
    events.put(count)


@pytest.mark.usefixtures("all_idle")
def test_publish_killed_at_any_operation_leaves_whole_states_only(tmp_path: Path) -> None:
    """Twenty moments distributed over the file-system operations of a publication with an eviction."""
    base = StageStore(str(tmp_path / "base"), UNLIMITED)
    base.publish(KEY, 1, save(1))
    limit = base.size() + 100  # the second state evicts the first
    events, seen = FORK.Queue(), set()

    def attempt(name: str, last: int) -> tuple[int | None, str]:
        uri = str(tmp_path / name)
        StageStore(uri, limit).publish(KEY, 1, save(1))
        process = FORK.Process(target=_publish_until, args=(uri, limit, last, events))
        process.start()
        process.join()
        return process.exitcode, uri

    assert attempt("whole", 0)[0] == 0
    total = events.get(timeout=10)
    for last in sorted({round(1 + part * (total - 1) / 19) for part in range(20)}):
        status, uri = attempt(f"killed-{last}", last)
        assert status == -signal.SIGKILL
        store = StageStore(uri, limit)
        left = stored(store)
        seen.add(tuple(left.items()))
        assert left in ({1: 1}, {1: 1, 2: 2}, {2: 2})
        store.publish(KEY, 2, save(2))
        store.publish(KEY, 3, save(3))
        assert stored(store)[3] == 3 and store.find([KEY]) == StateId(KEY.key, KEY.stage, 3)
    assert len(seen) > 1


class _Killed(BaseException):
    """Stands for a kill where the store is in the memory of one process."""


def test_upload_killed_at_any_file_leaves_whole_states_only(monkeypatch: pytest.MonkeyPatch) -> None:
    fs = type(fsspec.filesystem("memory"))
    put = fs.put_file
    for last in range(1, 7):
        store = StageStore(f"memory://{uuid.uuid4().hex}", UNLIMITED)
        store.publish(KEY, 1, save(1))
        done = 0

        def dying(self: Any, local: str, remote: str, last: int = last, **options: Any) -> None:
            nonlocal done
            done += 1
            if done == last:
                raise _Killed
            put(self, local, remote, **options)

        with monkeypatch.context() as patch:
            patch.setattr(fs, "put_file", dying)
            patch.setattr(fs, "rm_file", lambda self, path: None)  # a killed process cleans nothing up
            with pytest.raises(_Killed):
                store.publish(KEY, 2, save(2))
        assert stored(store) == {1: 1}
        store.publish(KEY, 2, save(3))
        assert stored(store) == {1: 1, 2: 3}


def test_concurrent_uploads_leave_one_whole_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second publisher starts before each of the files of the first."""
    fs = type(fsspec.filesystem("memory"))
    put = fs.put_file
    for moment in range(1, 7):
        store = StageStore(f"memory://{uuid.uuid4().hex}", UNLIMITED)
        done = 0

        def between(
            self: Any, local: str, remote: str, moment: int = moment, store: Any = store, **options: Any
        ) -> None:
            nonlocal done
            done += 1
            if done == moment:
                store.publish(KEY, 1, save(2))
            put(self, local, remote, **options)

        with monkeypatch.context() as patch:
            patch.setattr(fs, "put_file", between)
            store.publish(KEY, 1, save(1))
        assert stored(store)[1] in (1, 2)


def _race(uri: str, limit: int, number: int, start: Any) -> None:
    store = StageStore(uri, limit)
    for epoch in range(1, 8):
        start.wait(60)
        store.publish(KEY, epoch, save(number))
        store.load(StateId(KEY.key, KEY.stage, max(1, epoch - 1)))


@pytest.mark.usefixtures("all_idle")
@pytest.mark.parametrize("tight", [False, True], ids=["unlimited", "evicting"])
def test_racing_publishers_leave_one_whole_state_per_epoch(tmp_path: Path, tight: bool) -> None:
    StageStore(str(tmp_path / "one"), UNLIMITED).publish(KEY, 1, save(1))
    limit = 2 * StageStore(str(tmp_path / "one"), UNLIMITED).size() + 100 if tight else UNLIMITED
    uri, racers = str(tmp_path / "store"), 3
    start = FORK.Barrier(racers)
    processes = [FORK.Process(target=_race, args=(uri, limit, number, start)) for number in range(racers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    store = StageStore(uri, limit)
    left = stored(store)
    assert set(left.values()) <= set(range(racers)) and max(left) == 7
    assert tight or set(left) == set(range(1, 8))
    assert not tight or store.size() <= limit
    partial = [file.name for file in storage.find_files(uri) if storage.PARTIAL in file.name]
    assert partial == []


def test_publish_leaves_foreign_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "IDLE_S", -5.0)
    monkeypatch.setattr(store_module, "LEFTOVER_S", -5.0)
    note = tmp_path / "states" / "note.txt"
    note.parent.mkdir()
    note.write_text("mine")
    store = StageStore(str(tmp_path), 1)
    store.publish(KEY, 1, save(1))
    assert note.read_text() == "mine" and store.epochs(KEY) == [1]
