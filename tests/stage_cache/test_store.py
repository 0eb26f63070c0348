"""The stage store: states are whole, the longest prefix is found, and recently used states are not evicted."""

import logging
import os
import time
import uuid
from pathlib import Path

import fsspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from crowdray import storage
from crowdray.config import Config
from crowdray.errors import UserError
from crowdray.stage_cache import store as store_module
from crowdray.stage_cache.keys import StageKey
from crowdray.stage_cache.store import MANIFEST, StageStore, StateId
from crowdray.training.checkpoint import BestEpoch, Checkpoint, Progress, load_checkpoint, save_checkpoint

UNLIMITED = 10**9
BASELINE = StageKey("a" * 32, "baseline", 10)
DECODERS = StageKey("b" * 32, "decoders", 4)


def checkpoint(number: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(number)
    weights = {"encoder.w": torch.randn(3, 4, generator=generator), "b": torch.full((5,), float(number))}
    progress = Progress(1.5, 2.5, "data", 1, stage_epochs=number, best={"baseline": BestEpoch(number, 1.0, 2.0)})
    moments = {"0.momentum": torch.randn(7, generator=generator)}
    return Checkpoint(Config(seed=number), progress, weights, weights, moments, {"baseline": weights})


def publish(store: StageStore, key: StageKey, epoch: int, number: int | None = None) -> StateId:
    made = checkpoint(epoch if number is None else number)
    store.publish(key, epoch, lambda folder: save_checkpoint(made, folder))
    return StateId(key.key, key.stage, epoch)


def same(one: Checkpoint | None, other: Checkpoint) -> bool:
    def tensors(saved: Checkpoint) -> dict[str, torch.Tensor]:
        named = {"weights": saved.weights, "average": saved.ema, "optimizer": saved.optimizer, **saved.best_weights}
        return {f"{group} {name}": value for group, values in named.items() for name, value in values.items()}

    if one is None or (one.config, one.progress) != (other.config, other.progress):
        return False
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def files(store: StageStore, folder: str = "") -> list[str]:
    return [file.name for file in storage.find_files(storage.join(store.uri, folder) if folder else store.uri)]


def must_not_save(folder: Path) -> None:
    raise AssertionError("a stored state was saved again")


def test_load_returns_the_published_state_bit_for_bit(root_uri: str) -> None:
    store = StageStore(root_uri, UNLIMITED)
    state = publish(store, BASELINE, 3)
    assert store.find([BASELINE]) == state and store.epochs(BASELINE) == [3]
    assert same(store.load(state), checkpoint(3))
    store.publish(BASELINE, 3, must_not_save)
    assert store.load(StateId(BASELINE.key, BASELINE.stage, 4)) is None
    assert store.size() == sum(f.size for f in storage.find_files(storage.join(root_uri, "states"))) > 0


def test_find_in_an_empty_store_returns_none(root_uri: str) -> None:
    store = StageStore(root_uri, UNLIMITED)
    assert store.find([BASELINE, DECODERS]) is None and store.find([]) is None
    assert store.epochs(BASELINE) == [] and store.size() == 0


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
    assert (found and (found.key, found.epoch)) == (expected and (keys[expected[0]].key, expected[1]))
    assert store.find(keys, store.stored()) == found


@pytest.mark.parametrize("victim", ["weights.safetensors", "state.json", MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "cut", "lose"])
def test_load_removes_a_damaged_state(
    root_uri: str, victim: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = StageStore(root_uri, UNLIMITED)
    publish(store, BASELINE, 1)
    state = publish(store, BASELINE, 2)
    name = next(name for name in files(store, f"states/{BASELINE.key}/00002") if name.endswith(victim))
    uri = storage.join(root_uri, "states", BASELINE.key, "00002", name)
    content = bytearray(storage.read_bytes(uri))
    content[-1] ^= 1  # in the weights a number, which only the hash detects
    if damage == "lose":
        storage.remove(uri)
    else:
        storage.write_bytes(uri, bytes(content) if damage == "flip" else bytes(content[: len(content) // 2]))
    if (victim, damage) != (MANIFEST, "flip"):  # a flipped bit there may be in unused bytes
        assert store.load(state) is None
        assert (victim, damage) == (MANIFEST, "lose") or "cannot be used and will be trained again" in caplog.text
        assert store.find([BASELINE]) == StateId(BASELINE.key, BASELINE.stage, 1)
        publish(store, BASELINE, 2)
    assert (loaded := store.load(state)) is None or same(loaded, checkpoint(2))


def test_load_removes_a_state_with_unknown_config_fields(root_uri: str) -> None:
    store = StageStore(root_uri, UNLIMITED)

    def save(folder: Path) -> None:
        save_checkpoint(checkpoint(1), folder)
        (folder / "config.json").write_text('{"sampling": {"removed_field": 1}}')

    store.publish(BASELINE, 1, save)
    assert store.load(StateId(BASELINE.key, BASELINE.stage, 1)) is None and store.epochs(BASELINE) == []


def test_load_keeps_a_state_without_read_permission(root_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StageStore(root_uri, UNLIMITED)
    state = publish(store, BASELINE, 1)

    def forbidden(path: Path) -> str:
        if path.name != "weights.safetensors":
            return hash_file(path)
        raise PermissionError(13, os.strerror(13))

    hash_file = storage.hash_file
    monkeypatch.setattr(storage, "hash_file", forbidden)
    with pytest.raises(UserError, match=r"cannot read .*weights.*ermission"):
        store.load(state)
    assert store.epochs(BASELINE) == [1]


def test_load_rejects_a_manifest_with_paths_to_other_folders(root_uri: str) -> None:
    store = StageStore(root_uri, UNLIMITED)
    state = publish(store, BASELINE, 1)
    uri = storage.join(root_uri, "states", BASELINE.key, "00001", MANIFEST)
    for bad in (
        b'{"folder": "..", "files": {}}',
        b"[]",
        b'{"folder": "a", "files": {"../x": {"bytes": 1, "sha256": ""}}}',
    ):
        storage.write_bytes(uri, bad)
        assert store.load(state) is None and store.epochs(BASELINE) == []


def test_load_of_a_state_removed_meanwhile_returns_none_without_warning(
    root_uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = StageStore(root_uri, UNLIMITED)
    state = publish(store, BASELINE, 1)
    read = storage.read_bytes_or_none

    def remove_after_reading(uri: str) -> bytes | None:
        content = read(uri)
        if uri.endswith(MANIFEST):
            monkeypatch.setattr(storage, "read_bytes_or_none", read)
            storage.unpublish_directory(storage.join(root_uri, "states", BASELINE.key, "00001"), MANIFEST)
        return content

    monkeypatch.setattr(storage, "read_bytes_or_none", remove_after_reading)
    assert store.load(state) is None and not caplog.records


def test_publish_keeps_the_first_whole_state(root_uri: str) -> None:
    store = StageStore(root_uri, UNLIMITED)

    def save(folder: Path) -> None:
        publish(store, BASELINE, 1, number=5)  # another process is faster
        save_checkpoint(checkpoint(6), folder)

    store.publish(BASELINE, 1, save)
    assert same(store.load(StateId(BASELINE.key, BASELINE.stage, 1)), checkpoint(5))


def test_publish_replaces_a_folder_without_manifest(root_uri: str) -> None:
    store = StageStore(root_uri, UNLIMITED)
    storage.write_bytes(storage.join(root_uri, "states", BASELINE.key, "00001", "0f", "weights.safetensors"), b"half")
    assert store.find([BASELINE]) is None and store.load(StateId(BASELINE.key, BASELINE.stage, 1)) is None
    assert same(store.load(publish(store, BASELINE, 1)), checkpoint(1))


@pytest.mark.parametrize("source", ["os", "safetensors"])
def test_publish_on_a_full_disk_raises_user_error_and_leaves_nothing(
    root_uri: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = StageStore(root_uri, UNLIMITED)

    def full(folder: Path) -> None:
        (folder / "weights.safetensors").write_bytes(b"half")
        if source == "os":
            raise OSError(28, os.strerror(28))
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(UserError, match=r"no space left.*00001.*TMPDIR"):
        store.publish(BASELINE, 1, full)
    assert files(store) == []
    fs = fsspec.filesystem("memory")

    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("shutil.copytree", no_space)
    monkeypatch.setattr(type(fs), "put_file", no_space)
    with pytest.raises(UserError, match=r"00001.*no space left"):
        publish(store, BASELINE, 1)
    assert files(store) == []


@pytest.fixture
def all_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every state as idle for long."""
    monkeypatch.setattr(store_module, "IDLE_S", -5.0)


@pytest.mark.usefixtures("all_idle")
def test_eviction_removes_the_least_recently_used_states(root_uri: str) -> None:
    store = StageStore(root_uri, UNLIMITED)
    states = []
    for epoch in range(1, 6):
        states.append(publish(store, BASELINE, epoch))
        time.sleep(0.02)
    assert store.load(states[0]) is not None
    time.sleep(0.02)
    store.touch(states[1])
    time.sleep(0.02)
    tight = StageStore(root_uri, store.size() * 4 // 5 + 100)  # four of the six states
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
        assert same(tight.load(state), checkpoint(2))
    else:
        tight.touch(state)
    publish(tight, DECODERS, 1)
    assert tight.epochs(BASELINE) == [state.epoch] and tight.epochs(DECODERS) == [1]


@pytest.mark.usefixtures("all_idle")
def test_eviction_spares_the_state_just_published(root_uri: str) -> None:
    store = StageStore(root_uri, 10)
    for epoch in (1, 2):
        publish(store, BASELINE, epoch)
        assert store.epochs(BASELINE) == [epoch]


@pytest.mark.usefixtures("all_idle")
def test_eviction_by_two_processes_at_once_removes_only_idle_states(
    root_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = StageStore(root_uri, UNLIMITED)
    for epoch in (1, 2, 3):
        publish(store, BASELINE, epoch)
    tight = StageStore(root_uri, store.size() // 3 + 100)
    unpublish = storage.unpublish_directory

    def publish_meanwhile(uri: str, last: str) -> None:
        monkeypatch.setattr(storage, "unpublish_directory", unpublish)
        publish(tight, DECODERS, 1)  # evicts all baseline states
        unpublish(uri, last)

    monkeypatch.setattr(storage, "unpublish_directory", publish_meanwhile)
    publish(tight, DECODERS, 2)
    assert tight.epochs(BASELINE) == [] and tight.size() <= tight.limit_bytes
    assert len(tight.epochs(DECODERS)) == 1  # each process treats the other's state like any other


def test_load_protects_a_state_while_a_slow_reader_reads(root_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "IDLE_S", 1.0)
    store = StageStore(root_uri, UNLIMITED)
    state = publish(store, BASELINE, 1)
    time.sleep(1.1)
    epochs_while_reading: list[list[int]] = []

    def load_slowly(folder: Path) -> Checkpoint:
        publish(StageStore(root_uri, 1), DECODERS, 1)
        epochs_while_reading.append(store.epochs(BASELINE))
        return load_checkpoint(folder)

    monkeypatch.setattr(store_module, "load_checkpoint", load_slowly)
    assert same(store.load(state), checkpoint(1))
    assert epochs_while_reading == [[1]]


def test_publish_removes_old_remains_of_killed_processes(root_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StageStore(root_uri, UNLIMITED)
    store.load(publish(store, BASELINE, 1))
    remains = ["states/c/.partial-0-00001/manifest.json", "states/c/00002/0f/half.bin"]
    for name in remains:
        storage.write_bytes(storage.join(root_uri, name), b"remains")
    publish(store, BASELINE, 2)
    assert set(remains) <= set(files(store))
    monkeypatch.setattr(store_module, "LEFTOVER_S", -5.0)
    publish(store, BASELINE, 3)
    assert not set(remains) & set(files(store))
    assert store.epochs(BASELINE) == [1, 2, 3] and f"used/{BASELINE.key}-00001" in files(store)


def test_publish_rejects_epoch_zero(root_uri: str) -> None:
    with pytest.raises(AssertionError, match="epoch is 0"):
        publish(StageStore(root_uri, UNLIMITED), BASELINE, 0)


def test_publish_and_load_log_nothing(root_uri: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="crowdray"):
        store = StageStore(root_uri, UNLIMITED)
        store.load(publish(store, BASELINE, 1))
    assert [record for record in caplog.records if record.name.startswith("crowdray")] == []
