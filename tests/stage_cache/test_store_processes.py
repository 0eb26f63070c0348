"""The stage store among processes that race and die: at any moment it holds whole states only."""

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
from crowdray.stage_cache import store
from crowdray.stage_cache.keys import StageKey
from crowdray.stage_cache.store import StageStore, StateId
from crowdray.training.checkpoint import Checkpoint, Progress, save_checkpoint

FORK = multiprocessing.get_context("fork")
CHAIN = StageKey("a" * 32, "baseline", 10)
PLENTY = 10**9


def save(number: int) -> Callable[[Path], None]:
    weights = {"w": torch.full((1000,), float(number))}
    made = Checkpoint(Config(seed=number), Progress(1.0, float(number), "data", 1), weights, weights, weights)
    return lambda folder: save_checkpoint(made, folder)


def number_of(checkpoint: Checkpoint) -> int:
    """The number that all parts of a state have in common."""
    parts = (checkpoint.weights, checkpoint.ema, checkpoint.optimizer)
    values = {value for part in parts for value in part["w"].tolist()}
    (number,) = values | {checkpoint.progress.count_scale, float(checkpoint.config.seed)}
    return int(number)


def stored(at: StageStore) -> dict[int, int]:
    """Number of each stored state by its epoch; each is whole."""
    numbers = {}
    for epoch in at.epochs(CHAIN):
        checkpoint = at.load(StateId(CHAIN.key, CHAIN.stage, epoch))
        assert checkpoint is not None, f"epoch {epoch} is torn"
        numbers[epoch] = number_of(checkpoint)
    return numbers


def _publish_until(place: str, limit: int, last: int, events: Any) -> None:
    """Publish epoch 2 and die before the file-system operation with the number `last`."""
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
    StageStore(place, limit).publish(CHAIN, 2, write)
    events.put(count)


def test_a_publisher_killed_at_any_moment_leaves_whole_states_only(tmp_path: Path) -> None:
    """Twenty moments, spread over all that a publish with an eviction does to the file system."""
    base = StageStore(str(tmp_path / "base"), PLENTY)
    base.publish(CHAIN, 1, save(1))
    limit = base.size() + 100  # the second state throws out the first
    events, seen = FORK.Queue(), set()

    def attempt(name: str, last: int) -> tuple[int | None, str]:
        place = str(tmp_path / name)
        StageStore(place, limit).publish(CHAIN, 1, save(1))
        process = FORK.Process(target=_publish_until, args=(place, limit, last, events))
        process.start()
        process.join()
        return process.exitcode, place

    assert attempt("whole", 0)[0] == 0
    total = events.get(timeout=10)
    for last in sorted({round(1 + part * (total - 1) / 19) for part in range(20)}):
        status, place = attempt(f"killed-{last}", last)
        assert status == -signal.SIGKILL
        at = StageStore(place, limit)
        left = stored(at)
        seen.add(tuple(left.items()))
        assert left in ({1: 1}, {1: 1, 2: 2}, {2: 2})
        at.publish(CHAIN, 2, save(2))
        at.publish(CHAIN, 3, save(3))
        assert stored(at)[3] == 3 and at.find([CHAIN]) == StateId(CHAIN.key, CHAIN.stage, 3)
    assert len(seen) > 1


class _Killed(BaseException):
    """Stands for a kill where all is in the memory of one process."""


def test_an_upload_killed_at_any_file_leaves_whole_states_only(monkeypatch: pytest.MonkeyPatch) -> None:
    fs = type(fsspec.filesystem("memory"))
    put = fs.put_file
    for last in range(1, 7):
        at = StageStore(f"memory://{uuid.uuid4().hex}", PLENTY)
        at.publish(CHAIN, 1, save(1))
        done = 0

        def dying(self: Any, local: str, remote: str, last: int = last, **options: Any) -> None:
            nonlocal done
            done += 1
            if done == last:
                raise _Killed
            put(self, local, remote, **options)

        with monkeypatch.context() as patch:
            patch.setattr(fs, "put_file", dying)
            patch.setattr(fs, "rm_file", lambda self, path: None)  # the dead take nothing back
            with pytest.raises(_Killed):
                at.publish(CHAIN, 2, save(2))
        assert stored(at) == {1: 1}
        at.publish(CHAIN, 2, save(3))
        assert stored(at) == {1: 1, 2: 3}


def test_two_uploads_at_once_end_in_one_whole_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the second publisher comes in between the first one's files."""
    fs = type(fsspec.filesystem("memory"))
    put = fs.put_file
    for moment in range(1, 7):
        at = StageStore(f"memory://{uuid.uuid4().hex}", PLENTY)
        done = 0

        def between(self: Any, local: str, remote: str, moment: int = moment, at: Any = at, **options: Any) -> None:
            nonlocal done
            done += 1
            if done == moment:
                at.publish(CHAIN, 1, save(2))
            put(self, local, remote, **options)

        with monkeypatch.context() as patch:
            patch.setattr(fs, "put_file", between)
            at.publish(CHAIN, 1, save(1))
        assert stored(at)[1] in (1, 2)


def _race(place: str, limit: int, number: int, start: Any) -> None:
    at = StageStore(place, limit)
    for epoch in range(1, 8):
        start.wait(60)
        at.publish(CHAIN, epoch, save(number))
        at.load(StateId(CHAIN.key, CHAIN.stage, max(1, epoch - 1)))


@pytest.mark.parametrize("tight", [False, True], ids=["room", "evicting"])
def test_racing_publishers_agree_on_one_whole_state(tmp_path: Path, tight: bool) -> None:
    StageStore(str(tmp_path / "one"), PLENTY).publish(CHAIN, 1, save(1))
    limit = 2 * StageStore(str(tmp_path / "one"), PLENTY).size() + 100 if tight else PLENTY
    place, racers = str(tmp_path / "store"), 3
    start = FORK.Barrier(racers)
    processes = [FORK.Process(target=_race, args=(place, limit, number, start)) for number in range(racers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    at = StageStore(place, limit)
    left = stored(at)
    assert set(left.values()) <= set(range(racers)) and max(left) == 7
    assert tight or set(left) == set(range(1, 8))
    assert not tight or at.size() <= limit
    partial = [file.name for file in storage.find_files(place) if storage.PARTIAL in file.name]
    assert partial == [] and [file for file in storage.find_files(storage.join(place, "leases"))] == []


def test_other_work_in_the_same_folder_is_not_touched(tmp_path: Path) -> None:
    note = tmp_path / "states" / "note.txt"
    note.parent.mkdir()
    note.write_text("mine")
    at = StageStore(str(tmp_path), 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "LEFTOVER_S", -5.0)
        at.publish(CHAIN, 1, save(1))
    assert note.read_text() == "mine" and at.epochs(CHAIN) == [1]
