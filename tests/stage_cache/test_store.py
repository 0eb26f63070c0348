"""The stage store: states are whole, even under killed and racing processes, and only idle ones are evicted."""

import json
import multiprocessing
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from crowdray import storage
from crowdray.errors import UserError
from crowdray.stage_cache import store as store_module
from crowdray.stage_cache.keys import StageKey
from crowdray.stage_cache.store import MANIFEST, StageStore
from crowdray.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

from ..support.states import BASELINE, DECODERS, UNLIMITED, checkpoint, publish, same, stored

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def store(root_uri: str) -> StageStore:
    return StageStore(root_uri, UNLIMITED)


@pytest.fixture
def all_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every state as idle for long."""
    monkeypatch.setattr(store_module, "IDLE_S", -5.0)


def files(store: StageStore, folder: str = "") -> list[str]:
    return [file.name for file in storage.find_files(storage.join(store.uri, folder) if folder else store.uri)]


def test_load_returns_the_published_state_bit_for_bit(store: StageStore) -> None:
    state = publish(store, BASELINE, 3)
    assert store.find([BASELINE]) == state and store.epochs(BASELINE) == [3]
    assert same(store.load(*state), checkpoint(3))
    publish(store, BASELINE, 3, number=4)  # the first one stays
    assert same(store.load(*state), checkpoint(3))
    assert store.load(BASELINE, 4) is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.sets(st.integers(1, 8))), max_size=4))
def test_find_returns_the_longest_stored_prefix(stored: list[tuple[int, set[int]]]) -> None:
    store = StageStore(f"memory://{uuid.uuid4().hex}", UNLIMITED)
    keys = [StageKey(f"{number:032x}", "baseline", length) for number, (length, _) in enumerate(stored)]
    for key, (_, epochs) in zip(keys, stored, strict=True):
        for epoch in epochs:
            storage.write_bytes(storage.join(store.uri, "states", key.key, f"{epoch:05d}", MANIFEST), b"{}")
        storage.write_bytes(storage.join(store.uri, "states", key.key, "00001", "0f", "half.bin"), b"no manifest")
    usable = [(n, epoch) for n, (length, epochs) in enumerate(stored) for epoch in epochs if epoch <= length]
    found, expected = store.find(keys), max(usable, default=None)
    assert found == (expected and (keys[expected[0]], expected[1]))
    assert store.find(keys, store.stored()) == found


@pytest.mark.parametrize("victim", ["weights.safetensors", "state.json", MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "cut", "lose"])
def test_load_removes_a_damaged_state(
    store: StageStore, victim: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    publish(store, BASELINE, 1)
    state = publish(store, BASELINE, 2)
    name = next(name for name in files(store, f"states/{BASELINE.key}/00002") if name.endswith(victim))
    uri = storage.join(store.uri, "states", BASELINE.key, "00002", name)
    content = bytearray(storage.read_bytes(uri))
    content[-1] ^= 1  # in the weights a number, which only the hash detects
    if damage == "lose":
        storage.remove(uri)
    else:
        storage.write_bytes(uri, bytes(content) if damage == "flip" else bytes(content[: len(content) // 2]))
    if (victim, damage) != (MANIFEST, "flip"):  # a flipped bit there may be in unused bytes
        assert store.load(*state) is None
        assert (victim, damage) == (MANIFEST, "lose") or "cannot be used and will be trained again" in caplog.text
        assert store.find([BASELINE]) == (BASELINE, 1)
        publish(store, BASELINE, 2)
    assert (loaded := store.load(*state)) is None or same(loaded, checkpoint(2))


def test_load_removes_a_state_with_unknown_config_fields(store: StageStore) -> None:
    def save(folder: Path) -> None:
        save_checkpoint(checkpoint(1), folder)
        (folder / "config.json").write_text('{"sampling": {"removed_field": 1}}')

    store.publish(BASELINE, 1, save)
    assert store.load(BASELINE, 1) is None and store.epochs(BASELINE) == []


def test_load_keeps_a_state_without_read_permission(store: StageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path) -> str:
        raise PermissionError(13, os.strerror(13))

    state = publish(store, BASELINE, 1)
    monkeypatch.setattr(storage, "hash_file", forbidden)
    with pytest.raises(UserError, match=r"cannot read .*ermission"):
        store.load(*state)
    assert store.epochs(BASELINE) == [1]


@pytest.mark.parametrize(("folder", "file"), [("..", "x"), ("a", "../x"), ("a", "")])
def test_load_rejects_a_manifest_with_paths_to_other_folders(store: StageStore, folder: str, file: str) -> None:
    state = publish(store, BASELINE, 1)
    manifest = json.dumps({"folder": folder, "files": {file: {"bytes": 1, "sha256": ""}}})
    storage.write_bytes(storage.join(store.uri, "states", BASELINE.key, "00001", MANIFEST), manifest.encode())
    assert store.load(*state) is None and store.epochs(BASELINE) == []


def test_load_of_a_state_removed_meanwhile_returns_none_without_warning(
    store: StageStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state = publish(store, BASELINE, 1)
    read = storage.read_bytes_or_none

    def remove_after_reading(uri: str) -> bytes | None:
        content = read(uri)
        if uri.endswith(MANIFEST):
            monkeypatch.setattr(storage, "read_bytes_or_none", read)
            storage.unpublish_directory(storage.join(store.uri, "states", BASELINE.key, "00001"), MANIFEST)
        return content

    monkeypatch.setattr(storage, "read_bytes_or_none", remove_after_reading)
    assert store.load(*state) is None and not caplog.records


def test_publish_replaces_a_folder_without_manifest(store: StageStore) -> None:
    storage.write_bytes(storage.join(store.uri, "states", BASELINE.key, "00001", "0f", "weights.safetensors"), b"half")
    assert store.find([BASELINE]) is None and store.load(BASELINE, 1) is None
    assert same(store.load(*publish(store, BASELINE, 1)), checkpoint(1))


@pytest.mark.parametrize("source", ["os", "safetensors"])
def test_publish_on_a_full_disk_raises_user_error_and_leaves_nothing(
    store: StageStore, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> None:
        (folder / "weights.safetensors").write_bytes(b"half")
        if source == "os":
            raise OSError(28, os.strerror(28))
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(UserError, match=r"no space left.*00001.*TMPDIR"):
        store.publish(BASELINE, 1, full)
    assert files(store) == []

    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("shutil.copytree", no_space)
    monkeypatch.setattr(MemoryFileSystem, "put_file", no_space)
    with pytest.raises(UserError, match=r"00001.*no space left"):
        publish(store, BASELINE, 1)
    assert files(store) == []


@pytest.mark.usefixtures("all_idle")
def test_eviction_removes_the_least_recently_used_states(store: StageStore) -> None:
    states = []
    for epoch in range(1, 6):
        states.append(publish(store, BASELINE, epoch))
        time.sleep(0.02)
    assert store.load(*states[0]) is not None
    time.sleep(0.02)
    store.touch(*states[1])
    time.sleep(0.02)
    tight = StageStore(store.uri, store.size() * 4 // 5 + 100)  # four of the six states
    publish(tight, DECODERS, 1)
    # In the order of their last use: 3, 4, 5, 1 (loaded), 2 (touched), the new one.
    assert tight.epochs(BASELINE) == [1, 2, 5] and tight.epochs(DECODERS) == [1]
    assert tight.size() <= tight.limit_bytes
    publish(tight, DECODERS, 2)
    assert tight.epochs(BASELINE) == [1, 2] and tight.epochs(DECODERS) == [1, 2]
    assert set(files(store, "used")) == {f"{BASELINE.key}-0000{epoch}" for epoch in (1, 2)}


@pytest.mark.parametrize("use", ["publish", "load", "touch"])
def test_eviction_spares_recently_used_states(
    root_uri: str, use: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_module, "IDLE_S", 1.0)
    tight = StageStore(root_uri, 10)
    publish(tight, BASELINE, 1)
    state = publish(tight, BASELINE, 2)
    assert tight.epochs(BASELINE) == [1, 2] and "more than its limit of 10" in caplog.text
    time.sleep(1.1)
    if use == "publish":
        state = publish(tight, BASELINE, 3)
    elif use == "load":
        assert same(tight.load(*state), checkpoint(2))
    else:
        tight.touch(*state)
    publish(tight, DECODERS, 1)
    assert tight.epochs(BASELINE) == [state[1]] and tight.epochs(DECODERS) == [1]


@pytest.mark.usefixtures("all_idle")
def test_eviction_spares_the_state_just_published(root_uri: str) -> None:
    store = StageStore(root_uri, 10)
    for epoch in (1, 2):
        publish(store, BASELINE, epoch)
        assert store.epochs(BASELINE) == [epoch]


@pytest.mark.usefixtures("all_idle")
def test_eviction_by_two_processes_at_once_removes_only_idle_states(
    store: StageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for epoch in (1, 2, 3):
        publish(store, BASELINE, epoch)
    tight = StageStore(store.uri, store.size() // 3 + 100)
    unpublish = storage.unpublish_directory

    def publish_meanwhile(uri: str, last: str) -> None:
        monkeypatch.setattr(storage, "unpublish_directory", unpublish)
        publish(tight, DECODERS, 1)  # evicts all baseline states
        unpublish(uri, last)

    monkeypatch.setattr(storage, "unpublish_directory", publish_meanwhile)
    publish(tight, DECODERS, 2)
    assert tight.epochs(BASELINE) == [] and tight.size() <= tight.limit_bytes
    assert len(tight.epochs(DECODERS)) == 1  # each process treats the other's state like any other


def test_load_protects_a_state_while_a_slow_reader_reads(store: StageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "IDLE_S", 1.0)
    state = publish(store, BASELINE, 1)
    time.sleep(1.1)
    epochs_while_reading: list[list[int]] = []

    def load_slowly(folder: Path) -> Checkpoint:
        publish(StageStore(store.uri, 1), DECODERS, 1)
        epochs_while_reading.append(store.epochs(BASELINE))
        return load_checkpoint(folder)

    monkeypatch.setattr(store_module, "load_checkpoint", load_slowly)
    assert same(store.load(*state), checkpoint(1))
    assert epochs_while_reading == [[1]]


def test_publish_removes_old_remains_of_killed_processes(store: StageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.load(*publish(store, BASELINE, 1))
    remains = ["states/c/.partial-0-00001/manifest.json", "states/c/00002/0f/half.bin"]
    for name in remains:
        storage.write_bytes(storage.join(store.uri, name), b"remains")
    publish(store, BASELINE, 2)
    assert set(remains) <= set(files(store))
    monkeypatch.setattr(store_module, "LEFTOVER_S", -5.0)
    publish(store, BASELINE, 3)
    assert not set(remains) & set(files(store))
    assert store.epochs(BASELINE) == [1, 2, 3] and f"used/{BASELINE.key}-00001" in files(store)


def kill_before_operation(uri: str, limit: int, last: int, events: Any) -> None:
    """Publish epoch 2 and die before file-system operation number `last`."""
    count = 0
    watched = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "shutil.copyfile", "os.utime")

    def hook(event: str, _: object) -> None:
        nonlocal count
        if event in watched:
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    publish(StageStore(uri, limit), BASELINE, 2)
    events.put(count)


@pytest.mark.usefixtures("all_idle")
def test_publish_killed_at_any_operation_leaves_whole_states_only(tmp_path: Path) -> None:
    """Twenty moments distributed over the file-system operations of a publication with an eviction."""
    base = StageStore(str(tmp_path / "base"), UNLIMITED)
    publish(base, BASELINE, 1)
    limit = base.size() + 100  # the second state evicts the first
    events, seen = FORK.Queue(), set()

    def attempt(name: str, last: int) -> tuple[int | None, str]:
        uri = str(tmp_path / name)
        publish(StageStore(uri, limit), BASELINE, 1)
        process = FORK.Process(target=kill_before_operation, args=(uri, limit, last, events))
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
        publish(store, BASELINE, 2)
        assert publish(store, BASELINE, 3) == store.find([BASELINE]) and stored(store)[3] == 3
    assert len(seen) > 1


class Killed(BaseException):
    """Stands for a kill where the store is in the memory of one process."""


def before_upload(number: int, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call `action` before the upload of file `number`, counted from 1, to fsspec's memory."""
    put, done = MemoryFileSystem.put_file, list[str]()

    def interrupted(self: Any, local: str, remote: str, **options: Any) -> None:
        done.append(remote)
        if len(done) == number:
            action()
        put(self, local, remote, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", interrupted)


@pytest.mark.parametrize("number", range(1, 7))
def test_upload_killed_at_any_file_leaves_whole_states_only(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def die() -> None:
        raise Killed

    store = StageStore(f"memory://{uuid.uuid4().hex}", UNLIMITED)
    publish(store, BASELINE, 1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_upload(number, die, patch)
        patch.setattr(MemoryFileSystem, "rm_file", lambda self, path: None)  # a killed process cleans nothing up
        publish(store, BASELINE, 2)
    assert stored(store) == {1: 1}
    publish(store, BASELINE, 2, number=3)
    assert stored(store) == {1: 1, 2: 3}


@pytest.mark.parametrize("number", range(1, 7))
def test_concurrent_uploads_leave_one_whole_state(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second publisher starts before each of the files of the first."""
    store = StageStore(f"memory://{uuid.uuid4().hex}", UNLIMITED)
    before_upload(number, lambda: publish(store, BASELINE, 1, number=2), monkeypatch)
    publish(store, BASELINE, 1)
    assert stored(store)[1] in (1, 2)


def publish_seven_epochs(uri: str, limit: int, number: int, start: Any) -> None:
    store = StageStore(uri, limit)
    for epoch in range(1, 8):
        start.wait(60)
        publish(store, BASELINE, epoch, number)
        store.load(BASELINE, max(1, epoch - 1))


@pytest.mark.usefixtures("all_idle")
@pytest.mark.parametrize("tight", [False, True], ids=["unlimited", "evicting"])
def test_racing_publishers_leave_one_whole_state_per_epoch(tmp_path: Path, tight: bool) -> None:
    one = StageStore(str(tmp_path / "one"), UNLIMITED)
    publish(one, BASELINE, 1)
    limit = 2 * one.size() + 100 if tight else UNLIMITED
    uri, racers = str(tmp_path / "store"), 3
    start = FORK.Barrier(racers)
    processes = [FORK.Process(target=publish_seven_epochs, args=(uri, limit, n, start)) for n in range(racers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    store = StageStore(uri, limit)
    left = stored(store)
    assert set(left.values()) <= set(range(racers)) and max(left) == 7
    assert store.size() <= limit if tight else set(left) == set(range(1, 8))
    assert not [file.name for file in storage.find_files(uri) if storage.PARTIAL in file.name]


@pytest.mark.usefixtures("all_idle")
def test_publish_leaves_foreign_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "LEFTOVER_S", -5.0)
    note = tmp_path / "states" / "note.txt"
    note.parent.mkdir()
    note.write_text("mine")
    store = StageStore(str(tmp_path), 1)
    publish(store, BASELINE, 1)
    assert note.read_text() == "mine" and store.epochs(BASELINE) == [1]
