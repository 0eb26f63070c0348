"""The node's cache: each remote file fetched once, bounded, and whatever dies, nothing half-fetched is ever read."""

import errno
import hashlib
import logging
import multiprocessing
import os
import shutil
import signal
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest

from crowdray import storage
from crowdray.data.shard_reader import MappedShard, RemoteShard
from crowdray.data.shards import INDEX, Dataset, write_index, write_shard
from crowdray.errors import DataError, UserError
from crowdray.storage import paths

from ..support.builders import samples

FORK = multiprocessing.get_context("fork")
MEMORY = type(fsspec.filesystem("memory"))
SIZE = 10_000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache with room for two and a half files."""
    monkeypatch.setenv("CROWDRAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CROWDRAY_CACHE_GIB", str(2.5 * SIZE / 2**30))
    monkeypatch.setattr(paths, "RETRY_DELAYS_S", (0.0, 0.0))
    return tmp_path / "cache"


@pytest.fixture
def uris() -> list[str]:
    """Four remote files."""
    made = [f"memory://{uuid.uuid4().hex}/{name}" for name in "abcd"]
    for uri in made:
        storage.write_bytes(uri, content(uri))
    return made


def content(uri: str) -> bytes:
    return uri[-1].encode() * SIZE


def fetch(uri: str) -> Path:
    path = storage.fetch(uri, sha256=hashlib.sha256(content(uri)).hexdigest(), size=SIZE)
    assert path.read_bytes() == content(uri)
    return path


def elsewhere(work: Callable[[], object]) -> Any:
    """Start work in a process of its own."""
    process = FORK.Process(target=work, daemon=True)
    process.start()
    return process


def fetched_by_one_that_ended(*wanted: str) -> None:
    process = elsewhere(lambda: [fetch(uri) for uri in wanted])
    process.join()
    assert process.exitcode == 0


def kept(cache: Path) -> set[str]:
    """Letters of the whole copies; there is nothing else but locks and marks of readers."""
    copies = list(cache.glob("??/[!.]*[!k]"))
    others = [path for path in cache.rglob("*") if path.is_file() and path not in copies and path.suffix != ".lock"]
    assert {path.parent.name for path in others} <= {"cache", "readers"}
    assert all(len(path.read_bytes()) == SIZE for path in copies)
    return {chr(path.read_bytes()[0]) for path in copies}


def test_the_least_recently_used_copy_goes_first(cache: Path, uris: list[str]) -> None:
    a, b, c, d = uris
    fetched_by_one_that_ended(a, b)
    fetched_by_one_that_ended(a)
    fetched_by_one_that_ended(c)
    assert kept(cache) == {"a", "c"}
    fetched_by_one_that_ended(d)
    assert kept(cache) == {"c", "d"}


def test_what_a_living_process_reads_stays_and_what_a_killed_one_read_does_not(cache: Path, uris: list[str]) -> None:
    a, b, c, d = uris
    ready, end = FORK.Event(), FORK.Event()

    def read() -> None:
        fetch(a)
        ready.set()
        end.wait()

    reader = elsewhere(read)
    assert ready.wait(60)
    fetched_by_one_that_ended(b)
    fetched_by_one_that_ended(c)
    assert kept(cache) == {"a", "c"}
    fetch(d)
    with pytest.raises(
        storage.CacheFullError, match=rf"{b} .*{SIZE} bytes.* 25000 bytes, and 20000.*CROWDRAY_CACHE_GIB"
    ):
        fetch(b)
    assert kept(cache) == {"a", "d"}
    os.kill(reader.pid, signal.SIGKILL)
    reader.join()
    fetch(b)
    assert kept(cache) == {"b", "d"}


def test_processes_that_want_one_file_at_once_fetch_it_once(
    cache: Path, uris: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, log, get_file = FORK.Barrier(4), tmp_path / "log", MEMORY.get_file

    def logged(self: Any, remote: str, local: str, **options: Any) -> None:
        with log.open("a") as file:
            file.write(f"{remote[-1]}\n")
        get_file(self, remote, local, **options)

    monkeypatch.setattr(MEMORY, "get_file", logged)
    processes = [elsewhere(lambda: (start.wait(60), fetch(uris[0]), fetch(uris[1]))) for _ in range(4)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(log.read_text().split()) == ["a", "b"]


def test_what_a_killed_process_left_half_fetched_is_cleared_away(
    cache: Path, uris: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(self: Any, remote: str, local: str, **options: Any) -> None:
        Path(local).write_bytes(content(remote)[: SIZE // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    a, b, c, _ = uris
    with monkeypatch.context() as patch:
        patch.setattr(MEMORY, "get_file", dying)
        for uri in (a, b):
            process = elsewhere(partial(fetch, uri))
            process.join()
            assert process.exitcode == -signal.SIGKILL
    assert len(list(cache.glob("??/.partial-*"))) == 1  # the second of the dead cleared away after the first
    fetch(a)  # over its own remains
    fetch(c)  # there is room for it without the remains of the other
    assert kept(cache) == {"a", "c"}


def test_a_fault_that_passes_is_read_over_and_one_that_stays_is_told(
    cache: Path, uris: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    get_file, told = MEMORY.get_file, []

    def faulty(self: Any, remote: str, local: str, **options: Any) -> None:
        told.append(remote[-1])
        if len(told) == 1:
            raise ConnectionResetError(errno.ECONNRESET, "reset by peer")
        if len(told) == 2 or remote[-1] == "b":
            Path(local).write_bytes(content(remote)[:-1])
            return
        get_file(self, remote, local, **options)

    monkeypatch.setattr(MEMORY, "get_file", faulty)
    fetch(uris[0])
    with pytest.raises(DataError, match=rf"{uris[1]} is truncated.* 9999 bytes, its index says 10000"):
        fetch(uris[1])
    assert told == [*"aaa", *"bbb"] and kept(cache) == {"a"}


def test_a_missing_file_is_not_asked_for_twice(cache: Path, uris: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "RETRY_DELAYS_S", (1e9,))
    storage.remove(uris[0])
    with pytest.raises(DataError, match=rf"{uris[0]} is missing though the index names it"):
        fetch(uris[0])
    assert kept(cache) == set()


def test_a_full_disk_is_one_error_and_leaves_nothing(
    cache: Path, uris: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, remote: str, local: str, **options: Any) -> None:
        Path(local).write_bytes(b"some")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(MEMORY, "get_file", full)
    with pytest.raises(UserError, match=rf"cache {uris[0]} in {cache} .*CROWDRAY_CACHE.*no space left"):
        fetch(uris[0])
    assert kept(cache) == set()


def test_the_bound_is_half_of_what_the_disk_can_give_where_none_is_set(
    cache: Path, uris: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CROWDRAY_CACHE_GIB")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2 * SIZE))
    fetch(uris[0])
    with pytest.raises(storage.CacheFullError, match=r"15000 bytes"):
        fetch(uris[1])


@pytest.mark.parametrize("size", ["much", "-1", "nan"])
def test_a_bound_that_is_none_is_refused(uris: list[str], monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    monkeypatch.setenv("CROWDRAY_CACHE_GIB", size)
    with pytest.raises(UserError, match=f"CROWDRAY_CACHE_GIB is '{size}'"):
        fetch(uris[0])


@pytest.fixture
def twins(tmp_path: Path) -> tuple[Dataset, Dataset]:
    """The same three shards, the first of two record batches, in a folder and in a store."""
    listed = [*samples(70), *samples(20, "test", seed=1)]
    made = []
    for place in (str(tmp_path / "here"), f"memory://{uuid.uuid4().hex}"):
        shards = [write_shard(part, place, n) for n, part in enumerate((listed[:66], listed[66:77], listed[77:]))]
        write_index(place, shards, source="listed", depth_teacher="none")
        made.append(Dataset.open(place))
    return made[0], made[1]


def columns(dataset: Dataset) -> list[Any]:
    """All that a dataset gives."""
    found: list[Any] = []
    for split in ("train", "test"):
        found += [dataset.rows(split), dataset.sizes(split), dataset.counts(split), dataset.texts("name", split)]
        for row in dataset.rows(split).tolist():
            sample = dataset.sample(row)
            assert not sample.points.flags.writeable
            values = [getattr(sample, name) for name in sample.__slots__]
            found += [bytes(value) if isinstance(value, memoryview) else value for value in values]
    return found


@pytest.mark.parametrize(("room", "distant"), [(1.0, 0), (0.3, 1), (0.0, 3)], ids=["all", "some", "none"])
def test_what_does_not_fit_is_read_from_afar_to_the_same_bits(
    twins: tuple[Dataset, Dataset],
    room: float,
    distant: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    here, afar = twins
    total = sum(shard.bytes for shard in here.index.shards)
    monkeypatch.setenv("CROWDRAY_CACHE_GIB", str(room * total / 2**30))
    with caplog.at_level(logging.WARNING):
        for ours, theirs in zip(columns(here), columns(afar), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    kinds = [type(shard) for shard in afar._open.values()]
    assert kinds.count(RemoteShard) == distant and kinds.count(MappedShard) == 3 - distant
    assert caplog.text.count("read from afar, row by row") == min(distant, 1)
    afar.verify()


def test_a_row_from_afar_is_one_round_trip_for_its_own_bytes(
    twins: tuple[Dataset, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, afar = twins
    monkeypatch.setenv("CROWDRAY_CACHE_GIB", "0")
    afar.sample(0)
    asked: list[int] = []
    cat_ranges = MEMORY.cat_ranges

    def counted(self: Any, paths: Any, starts: Any, ends: Any, **options: Any) -> Any:
        asked.append(sum(ends) - sum(starts))
        return cat_ranges(self, paths, starts, ends, **options)

    monkeypatch.setattr(MEMORY, "cat_ranges", counted)
    for row in (64, 1, 65):
        afar.sample(row)
        sample = here.sample(row)
        assert asked.pop() == sum(len(s) for s in (sample.image, sample.roi or b"", sample.depth or b"")) + (
            sample.points.nbytes
        )
    assert not asked


@pytest.mark.parametrize("harm", ["cut", "image"])
def test_damage_is_found_from_afar_too(
    twins: tuple[Dataset, Dataset], monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    here, afar = twins
    monkeypatch.setenv("CROWDRAY_CACHE_GIB", "0")
    uri = storage.join(afar.uri, afar.index.shards[0].path)
    whole = storage.read_bytes(uri)
    image = bytes(here.sample(5).image)
    other = image[:-40] + bytes([image[-40] ^ 1]) + image[-39:]
    storage.write_bytes(uri, whole[:-200] if harm == "cut" else whole.replace(image, other))
    with pytest.raises(DataError, match=rf"{uri} is (truncated or was replaced|damaged).*convert"):
        afar.sample(5)
    with pytest.raises(DataError, match=rf"{uri} is (truncated or was replaced|damaged).*convert"):
        afar.verify()
    assert storage.exists(storage.join(afar.uri, INDEX))
