"""Real clients against object stores of two makes: what lies there is whole, and each fault passes or is told."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import s3fs
import torch

from crowdray import storage
from crowdray.config import Config
from crowdray.data.shard_reader import RemoteShard
from crowdray.data.shards import Dataset, write_index, write_shard
from crowdray.datasets import conversion
from crowdray.datasets.sources import open_source
from crowdray.errors import UserError
from crowdray.stage_cache.keys import StageKey
from crowdray.stage_cache.store import StageStore, StateId
from crowdray.storage import files, paths
from crowdray.storage import lease as leases
from crowdray.training.checkpoint import Checkpoint, Progress, save_checkpoint

from ..support.builders import samples
from ..support.stores import Store, moto, rclone

ROOT = Path(__file__).resolve().parents[2]
ROWS = 12


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Store]]:
    with moto() as one, rclone(tmp_path_factory.mktemp("rclone")) as other:
        yield {store.name: store for store in (one, other)}


@pytest.fixture(params=["moto", "rclone"])
def store(
    request: pytest.FixtureRequest, stores: dict[str, Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    """A store that this process uses, with an empty cache."""
    chosen = stores[request.param]
    for name, value in {**chosen.environment, "CROWDRAY_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(paths, "RETRY_DELAYS_S", (0.0, 0.0))
    s3fs.S3FileSystem.clear_instance_cache()
    files._exclusive.clear()
    yield chosen
    chosen.proxy.faults.clear()
    s3fs.S3FileSystem.clear_instance_cache()


only_moto = pytest.mark.parametrize("store", ["moto"], indirect=True)


@pytest.fixture
def place(store: Store) -> str:
    """A prefix that nothing lies below."""
    return storage.join(store.uri, uuid.uuid4().hex)


def make(place: str, shards: int = 3) -> Dataset:
    infos = [write_shard(samples(ROWS, seed=number), place, number) for number in range(shards)]
    write_index(place, infos, source="listed", depth_teacher="none")
    return Dataset.open(place)


def shards_of(dataset: Dataset) -> list[str]:
    return [storage.join(dataset.uri, shard.path) for shard in dataset.index.shards]


def copies(cache: Path) -> list[str]:
    """Names of all in the cache that is no lock."""
    return [path.name for path in cache.glob("??/*") if path.suffix != ".lock"]


def test_a_dataset_lives_on_a_store(store: Store, place: str, tmp_path: Path) -> None:
    here, there = make(str(tmp_path / "here")), make(place)
    assert there.digest == here.digest
    for row in range(len(here)):
        ours, theirs = here.sample(row), there.sample(row)
        assert bytes(ours.image) == bytes(theirs.image) and ours.points.tobytes() == theirs.points.tobytes()
    there.verify()
    assert [store.proxy.count("GET", uri) for uri in shards_of(there)] == [1, 1, 1]
    names = {file.name: file.size for file in storage.find_files(place)}
    assert names == {file.name: file.size for file in storage.find_files(str(tmp_path / "here"))}
    assert all(abs(time.time() - file.modified) < 600 for file in storage.find_files(place))


def test_a_conversion_to_a_store(store: Store, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off after two slices of three, it goes on from them; the bytes are those of an unbroken one to a folder."""
    monkeypatch.setattr(conversion, "ROWS_PER_SHARD", 2)
    source = open_source("synthetic", train=4, test=2, width=64, height=64)
    whole = conversion.convert(source, str(tmp_path / "whole"))
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt), conversion.begun(source, place, tell=told.append) as work:
        for part in work.waiting[:2]:
            work.add(work.convert(part))
        raise KeyboardInterrupt
    assert ["If-None-Match" in line for line in told] == [True] * (store.name == "rclone")
    done: list[int] = []
    index = conversion.convert(source, place, on_slice=lambda result: done.append(result.number))
    assert done == [2] and index == whole == Dataset.open(place).index
    assert {file.name for file in storage.find_files(place)} == {"index.json", *(s.path for s in whole.shards)}
    with pytest.raises(UserError, match="already holds a dataset"):
        conversion.convert(source, place)


def test_rows_of_a_dataset_larger_than_the_cache(
    store: Store, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROWDRAY_CACHE_GIB", "0")
    here, there = make(str(tmp_path / "here"), 1), make(place, 1)
    store.proxy.plan("error", "shard")
    store.proxy.plan("cut", "shard")
    for row in (7, 0, 7):
        ours, theirs = here.sample(row), there.sample(row)
        assert bytes(ours.image) == theirs.image and ours.depth == theirs.depth
        assert ours.points.tobytes() == theirs.points.tobytes()
    assert isinstance(there._open[0], RemoteShard) and copies(tmp_path / "cache") == []
    there.verify()


@pytest.mark.parametrize("kind", ["error", "cut", "short", "slow"])
def test_a_fault_that_passes_costs_nothing_but_time(
    store: Store, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    if kind == "slow":
        monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 2}})
        s3fs.S3FileSystem.clear_instance_cache()
    dataset = make(place, 1)
    (uri,) = shards_of(dataset)
    store.proxy.plan(kind, uri[4:])
    assert bytes(dataset.sample(3).image) == bytes(samples(ROWS)[3].image)
    assert store.proxy.count("GET", uri) >= 2
    assert copies(tmp_path / "cache") == [dataset.index.shards[0].sha256]


def test_a_store_that_keeps_failing_is_given_up(store: Store, place: str, tmp_path: Path) -> None:
    dataset = make(place, 1)
    (uri,) = shards_of(dataset)
    store.proxy.plan("error", uri[4:], times=1000)
    with pytest.raises(UserError, match=rf"cannot cache {uri} .*internal error"):
        dataset.sample(0)
    assert store.proxy.count("GET", uri) == 3  # AWS_MAX_ATTEMPTS
    assert copies(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gone", "{uri} is missing though the index names it; copy it back"),
        ("expired", "cannot cache {uri} .*The provided token has expired.*renew your credentials"),
    ],
)
def test_what_does_not_pass_is_told_at_once(store: Store, place: str, tmp_path: Path, kind: Any, message: str) -> None:
    dataset = make(place, 1)
    (uri,) = shards_of(dataset)
    store.proxy.plan(kind, uri[4:], times=1000)
    with pytest.raises(UserError, match=message.format(uri=uri)):
        dataset.sample(0)
    assert store.proxy.count("GET", uri) == 1 and copies(tmp_path / "cache") == []


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_expired_credentials_are_not_taken_for_an_empty_place(store: Store, place: str, method: str) -> None:
    make(place, 1)
    store.proxy.plan("expired", r"index\.json", method=method, times=1000)
    with pytest.raises(UserError, match=rf"{place}/index\.json.*credentials"):
        Dataset.open(place)


CHAIN = StageKey("a" * 32, "baseline", 10)


def save(number: int) -> Any:
    weights = {"w": torch.full((1000,), float(number))}
    made = Checkpoint(Config(seed=number), Progress(1.0, 1.0, "data", 1), weights, weights, weights)
    return lambda folder: save_checkpoint(made, folder)


def test_states_of_trainings_are_stored_whole_and_evicted(store: Store, place: str) -> None:
    at = StageStore(place, 10**9)
    at.publish(CHAIN, 1, save(1))
    with at.hold(StateId(CHAIN.key, CHAIN.stage, 1)):
        tight = StageStore(place, at.size() + 100)
        tight.publish(CHAIN, 2, save(2))
        assert at.epochs(CHAIN) == [1, 2]
    tight.publish(CHAIN, 3, save(3))
    assert at.find([CHAIN]) == StateId(CHAIN.key, CHAIN.stage, 3) and at.epochs(CHAIN) == [3]
    store.proxy.plan("cut", r"weights\.safetensors")
    loaded = at.load(StateId(CHAIN.key, CHAIN.stage, 3))
    assert loaded is not None and loaded.weights["w"][0] == 3 and loaded.config.seed == 3


def test_a_state_whose_upload_fails_is_not_there_and_comes_with_the_next(store: Store, place: str) -> None:
    at = StageStore(place, 10**9)
    store.proxy.plan("error", r"manifest\.json", method="PUT", times=3)
    with pytest.raises(UserError, match="internal error"):
        at.publish(CHAIN, 1, save(1))
    assert at.epochs(CHAIN) == [] and storage.find_files(storage.join(place, "states")) == []
    at.publish(CHAIN, 1, save(1))
    assert at.epochs(CHAIN) == [1]


@only_moto
def test_only_one_creates_even_when_its_answer_is_lost(store: Store, place: str) -> None:
    uri = storage.join(place, "file")
    assert storage.create_bytes(storage.join(place, "other"), b"")
    store.proxy.plan("lost", "/file$", method="PUT")
    assert storage.create_bytes(uri, b"ours")
    assert not storage.create_bytes(uri, b"another's") and storage.read_bytes(uri) == b"ours"
    first = leases.take(place, "claim", "me")
    assert first is not None and leases.take(place, "claim", "you") is None
    first.release()
    assert leases.take(place, "claim", "you") is not None
    assert [file.name for file in storage.find_files(place) if paths.PARTIAL in file.name] == []


@pytest.mark.parametrize("store", ["rclone"], indirect=True)
def test_a_store_that_cannot_say_who_was_first_is_refused(store: Store, place: str) -> None:
    uri = storage.join(place, "file")
    storage.write_bytes(uri, b"there")
    for _ in range(2):
        with pytest.raises(UserError, match=rf"cannot create {uri}: its store ignores `If-None-Match"):
            storage.create_bytes(uri, b"ours")
    assert storage.read_bytes(uri) == b"there"
    assert [file.name for file in storage.find_files(place)] == ["file"]


def test_a_folder_is_published_whole_or_taken_back(store: Store, place: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    (made / "deep").mkdir(parents=True)
    for name in ("a.json", "deep/b.bin", "z.bin"):
        (made / name).write_bytes(name.encode() * 100)
    store.proxy.plan("expired", r"a\.json", method="PUT", times=1)
    with pytest.raises(UserError, match="token has expired"):
        storage.publish_directory(made, place, "a.json")
    assert storage.find_files(place) == []
    store.proxy.plan("lost", r"z\.bin", method="PUT")
    storage.publish_directory(made, place, "a.json")
    there = {file.name: file.size for file in storage.find_files(place)}
    assert there == {"a.json": 600, "deep/b.bin": 1000, "z.bin": 500}
    puts = [path.rpartition("/")[2] for method, path in store.proxy.seen if method == "PUT" and place[5:] in path]
    assert puts[-1] == "a.json"
    store.proxy.plan("short", r"z\.bin")
    with storage.local_copy(place) as copy:
        assert {file.name: file.read_bytes() for file in copy.iterdir()} == {
            "a.json": b"a.json" * 100,
            "z.bin": b"z.bin" * 100,
        }
    assert not copy.exists()
    storage.unpublish_directory(place, "a.json")
    assert storage.find_files(place) == []
    with pytest.raises(UserError, match=f"cannot copy {place}: it does not exist"), storage.local_copy(place):
        pass


READER = """
import hashlib, json, sys
from crowdray.data.shards import Dataset
dataset = Dataset.open(sys.argv[1])
print(json.dumps([hashlib.sha256(dataset.sample(row).image).hexdigest() for row in range(len(dataset))]))
"""


@pytest.fixture
def start(store: Store, place: str) -> Iterator[Callable[[Path], "subprocess.Popen[str]"]]:
    """Starts processes that read a whole dataset, through the cache of their node, and print the hashes of its
    images."""
    started: list[subprocess.Popen[str]] = []

    def begin(cache: Path) -> "subprocess.Popen[str]":
        told = {**store.environment, "CROWDRAY_CACHE": str(cache), "PYTHONPATH": str(ROOT / "platform")}
        told["FSSPEC_S3"] = json.dumps({"config_kwargs": {"read_timeout": 600}})
        command = [sys.executable, "-c", READER, place]
        started.append(subprocess.Popen(command, env={**os.environ, **told}, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@only_moto
def test_two_nodes_fetch_each_shard_once_and_a_kill_harms_nobody(
    store: Store, place: str, tmp_path: Path, start: Callable[[Path], "subprocess.Popen[str]"]
) -> None:
    dataset = make(place)
    first, *others = shards_of(dataset)
    stopped = store.proxy.plan("slow", first[4:])
    killed = start(tmp_path / "one")
    assert stopped.held.wait(120)
    living = [start(tmp_path / node) for node in ("one", "one", "two")]
    found = [json.loads(living[2].communicate(timeout=120)[0])]
    assert store.proxy.count("GET", first) == 2, "the others of its node wait for the one that fetches"
    os.kill(killed.pid, signal.SIGKILL)
    found += [json.loads(process.communicate(timeout=120)[0]) for process in living[:2]]
    stopped.go_on.set()
    assert found == [[sample.sha256 for seed in range(3) for sample in samples(ROWS, seed=seed)]] * 3
    assert store.proxy.count("GET", first) == 3
    assert [store.proxy.count("GET", uri) for uri in others] == [2, 2]
    whole = sorted(shard.sha256 for shard in dataset.index.shards)
    assert sorted(copies(tmp_path / "one")) == sorted(copies(tmp_path / "two")) == whole
