"""Real clients against two object stores: objects are whole, and each fault is retried or reported."""

import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import s3fs

from crowdray import storage
from crowdray.data.shards import Dataset
from crowdray.datasets import conversion
from crowdray.datasets.sources import open_source
from crowdray.errors import UserError
from crowdray.stage_cache import store as store_module
from crowdray.stage_cache.store import StageStore
from crowdray.storage import files, paths
from crowdray.storage.lock import Lock

from ..support.builders import sample_fields, samples, write_dataset
from ..support.states import BASELINE, UNLIMITED, publish, stored
from ..support.stores import Store, moto, rclone

pytestmark = pytest.mark.slow

ROWS = 12


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Store]]:
    with moto() as one, rclone(tmp_path_factory.mktemp("rclone")) as other:
        yield {store.name: store for store in (one, other)}


@pytest.fixture(params=["moto", "rclone"])
def store(
    request: pytest.FixtureRequest, stores: dict[str, Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    """An object store that this process is configured for, with an empty cache."""
    chosen = stores[request.param]
    for name, value in {**chosen.environment, "CROWDRAY_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(paths, "RETRY_DELAYS_S", (0.0, 0.0))
    s3fs.S3FileSystem.clear_instance_cache()
    files.exclusive_create_support.clear()
    yield chosen
    chosen.proxy.faults.clear()
    s3fs.S3FileSystem.clear_instance_cache()


only_moto = pytest.mark.parametrize("store", ["moto"], indirect=True)


@pytest.fixture
def prefix(store: Store) -> str:
    """An unused prefix in the store."""
    return storage.join(store.uri, uuid.uuid4().hex)


def make_dataset(prefix: str, shards: int = 3) -> Dataset:
    return write_dataset(prefix, [row for seed in range(shards) for row in samples(ROWS, seed=seed)], ROWS)


def shards_of(dataset: Dataset) -> list[str]:
    return [storage.join(dataset.uri, shard.path) for shard in dataset.index.shards]


def cached(folder: Path) -> list[str]:
    """Names of the files in a test's cache, lock files excluded."""
    return [path.name for path in folder.glob("cache/??/*") if path.suffix != ".lock"]


def test_dataset_on_a_store_equals_a_local_one(store: Store, prefix: str, tmp_path: Path) -> None:
    local, remote = make_dataset(str(tmp_path / "local")), make_dataset(prefix)
    assert remote.digest == local.digest
    for row in range(len(local)):
        assert sample_fields(local.sample(row)) == sample_fields(remote.sample(row))
    assert [store.proxy.count("GET", uri) for uri in shards_of(remote)] == [1, 1, 1]
    names = {file.name: file.size for file in storage.find_files(prefix)}
    assert names == {file.name: file.size for file in storage.find_files(str(tmp_path / "local"))}
    assert all(abs(time.time() - file.modified) < 600 for file in storage.find_files(prefix))


def test_conversion_to_a_store_resumes(
    store: Store, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after two of three slices, it converts only the third, to the same bytes."""
    monkeypatch.setattr(conversion, "ROWS_PER_SHARD", 2)
    source = open_source("synthetic", train=4, test=2, width=64, height=64)
    whole = conversion.convert(source, str(tmp_path / "whole"))
    messages: list[str] = []
    with pytest.raises(KeyboardInterrupt), conversion.open_conversion(source, prefix, log=messages.append) as work:
        for part in work.pending[:2]:
            work.add(work.convert(part))
        raise KeyboardInterrupt
    assert ["If-None-Match" in line for line in messages] == [True] * (store.name == "rclone")
    done: list[int] = []
    index = conversion.convert(source, prefix, on_slice=lambda result: done.append(result.number))
    assert done == [2] and index == whole == Dataset.open(prefix).index
    assert {file.name for file in storage.find_files(prefix)} == {"index.json", *(s.path for s in whole.shards)}
    with pytest.raises(UserError, match="already contains a dataset"):
        conversion.convert(source, prefix)


def test_dataset_larger_than_the_cache_is_read_remotely(
    store: Store, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROWDRAY_CACHE_GIB", "0")
    local, remote = make_dataset(str(tmp_path / "local"), 1), make_dataset(prefix, 1)
    store.proxy.inject("error", "shard")
    store.proxy.inject("cut", "shard")
    for row in (7, 0, 7):
        assert sample_fields(local.sample(row)) == sample_fields(remote.sample(row))
    assert cached(tmp_path) == []


@pytest.mark.parametrize("kind", ["error", "cut", "short", "slow"])
def test_fetch_retries_transient_faults(
    store: Store, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    if kind == "slow":
        monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 2}})
        s3fs.S3FileSystem.clear_instance_cache()
    dataset = make_dataset(prefix, 1)
    (uri,) = shards_of(dataset)
    store.proxy.inject(kind, uri[4:])
    assert bytes(dataset.sample(3).image) == bytes(samples(ROWS)[3].image)
    assert store.proxy.count("GET", uri) >= 2
    assert cached(tmp_path) == [dataset.index.shards[0].sha256]


@pytest.mark.parametrize(
    ("kind", "message", "attempts"),
    [
        ("error", "cannot cache {uri} .*internal error", 3),  # AWS_MAX_ATTEMPTS
        ("gone", "{uri} is missing but listed in the index; copy it back", 1),
        ("expired", "cannot cache {uri} .*The provided token has expired.*renew your credentials", 1),
    ],
)
def test_fetch_reports_lasting_faults_after_the_clients_attempts(
    store: Store, prefix: str, tmp_path: Path, kind: Any, message: str, attempts: int
) -> None:
    dataset = make_dataset(prefix, 1)
    (uri,) = shards_of(dataset)
    store.proxy.inject(kind, uri[4:], times=1000)
    with pytest.raises(UserError, match=message.format(uri=uri)):
        dataset.sample(0)
    assert store.proxy.count("GET", uri) == attempts and cached(tmp_path) == []


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_open_with_expired_credentials_does_not_report_a_missing_dataset(
    store: Store, prefix: str, method: str
) -> None:
    make_dataset(prefix, 1)
    store.proxy.inject("expired", r"index\.json", method=method, times=1000)
    with pytest.raises(UserError, match=rf"{prefix}/index\.json.*credentials"):
        Dataset.open(prefix)


def test_stage_store_keeps_whole_states_and_evicts_idle_ones(
    store: Store, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = StageStore(prefix, UNLIMITED)
    store.proxy.inject("error", r"manifest\.json", method="PUT", times=3)
    with pytest.raises(UserError, match="internal error"):
        publish(states, BASELINE, 1)
    assert storage.find_files(storage.join(prefix, "states")) == []
    publish(states, BASELINE, 1)
    tight = StageStore(prefix, states.size() + 100)
    publish(tight, BASELINE, 2)
    assert states.epochs(BASELINE) == [1, 2]
    monkeypatch.setattr(store_module, "IDLE_S", -60.0)
    assert publish(tight, BASELINE, 3) == states.find([BASELINE])
    store.proxy.inject("cut", r"weights\.safetensors")
    assert stored(states) == {3: 3}


@only_moto
def test_create_bytes_and_lock_have_one_winner_even_if_a_response_is_lost(store: Store, prefix: str) -> None:
    uri = storage.join(prefix, "file")
    assert storage.create_bytes(storage.join(prefix, "other"), b"")
    store.proxy.inject("lost", "/file$", method="PUT")
    assert storage.create_bytes(uri, b"ours")
    assert not storage.create_bytes(uri, b"other") and storage.read_bytes(uri) == b"ours"
    with Lock(storage.join(prefix, "lock"), "the study", "wait") as lock:
        assert not Lock(storage.join(prefix, "lock"), "the study", "wait").try_acquire() and lock.renew()
    assert {file.name for file in storage.find_files(prefix)} == {"file", "other"}


@pytest.mark.parametrize("store", ["rclone"], indirect=True)
def test_create_bytes_rejects_a_store_without_conditional_writes(store: Store, prefix: str) -> None:
    uri = storage.join(prefix, "file")
    storage.write_bytes(uri, b"existing")
    for _ in range(2):
        with pytest.raises(UserError, match=rf"cannot create {uri} exclusively: its store ignores `If-None-Match"):
            storage.create_bytes(uri, b"ours")
    assert storage.read_bytes(uri) == b"existing"
    messages: list[str] = []
    with Lock(storage.join(prefix, "lock"), "the study", "wait", messages.append) as lock:
        assert lock.renew() and len(messages) == 1
    assert [file.name for file in storage.find_files(prefix)] == ["file"]


def test_publish_directory_is_all_or_nothing(store: Store, prefix: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    (made / "deep").mkdir(parents=True)
    for name in ("a.json", "deep/b.bin", "z.bin"):
        (made / name).write_bytes(name.encode() * 100)
    store.proxy.inject("expired", r"a\.json", method="PUT", times=1)
    with pytest.raises(UserError, match="token has expired"):
        storage.publish_directory(made, prefix, "a.json")
    assert storage.find_files(prefix) == []
    store.proxy.inject("lost", r"z\.bin", method="PUT")
    storage.publish_directory(made, prefix, "a.json")
    published = {file.name: file.size for file in storage.find_files(prefix)}
    assert published == {"a.json": 600, "deep/b.bin": 1000, "z.bin": 500}
    puts = [path.rpartition("/")[2] for method, path in store.proxy.requests if method == "PUT" and prefix[5:] in path]
    assert puts[-1] == "a.json"
    store.proxy.inject("short", r"z\.bin")
    with storage.local_copy(prefix) as copy:
        assert {file.name: file.read_bytes() for file in copy.iterdir()} == {
            "a.json": b"a.json" * 100,
            "z.bin": b"z.bin" * 100,
        }
    assert not copy.exists()
    storage.unpublish_directory(prefix, "a.json")
    assert storage.find_files(prefix) == []
    with pytest.raises(UserError, match=rf"cannot copy {prefix} to .*it does not exist"), storage.local_copy(prefix):
        pass
