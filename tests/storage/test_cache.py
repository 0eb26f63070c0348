"""The node's cache: each remote file is downloaded once, the size is limited, and partial downloads are never read."""

import errno
import hashlib
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
import pytest

from crowdray import storage
from crowdray.errors import DataError, UserError
from crowdray.storage import paths

FORK = multiprocessing.get_context("fork")
MEMORY = type(fsspec.filesystem("memory"))
SIZE = 10_000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache that is large enough for two and a half files."""
    monkeypatch.setenv("CROWDRAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CROWDRAY_CACHE_GIB", f"{2.5 * SIZE / 2**30:.30f}")
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


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def fetch(uri: str) -> Path:
    path = storage.fetch(uri, sha256=sha256(content(uri)), size=SIZE)
    assert path.read_bytes() == content(uri)
    return path


def start_process(work: Callable[[], object]) -> Any:
    """Start `work` in a forked process."""
    process = FORK.Process(target=work, daemon=True)
    process.start()
    return process


def fetch_in_finished_process(*uris: str) -> None:
    process = start_process(lambda: [fetch(uri) for uri in uris])
    process.join()
    assert process.exitcode == 0


def cached_letters(cache: Path) -> set[str]:
    """Letters of the copies; checks that nothing else is in the cache but lock files."""
    copies = [path for path in cache.glob("??/*") if path.suffix != ".lock"]
    assert all(len(path.read_bytes()) == SIZE for path in copies)
    return {chr(path.read_bytes()[0]) for path in copies}


def test_fetch_evicts_the_least_recently_used_copy(cache: Path, uris: list[str]) -> None:
    a, b, c, d = uris
    fetch_in_finished_process(a, b)
    fetch_in_finished_process(a)
    fetch_in_finished_process(c)
    assert cached_letters(cache) == {"a", "c"}
    fetch_in_finished_process(d)
    assert cached_letters(cache) == {"c", "d"}


def test_fetch_spares_copies_that_running_processes_use(cache: Path, uris: list[str]) -> None:
    a, b, c, d = uris
    ready, end = FORK.Event(), FORK.Event()

    def read() -> None:
        fetch(a)
        ready.set()
        end.wait()

    reader = start_process(read)
    assert ready.wait(60)
    fetch_in_finished_process(b)
    fetch_in_finished_process(c)
    assert cached_letters(cache) == {"a", "c"}
    fetch(d)
    with pytest.raises(
        storage.CacheFullError, match=rf"{b} .*{SIZE} bytes.* 25000 bytes, and 20000 are in use.*CROWDRAY_CACHE_GIB"
    ):
        fetch(b)
    assert cached_letters(cache) == {"a", "d"}
    os.kill(reader.pid, signal.SIGKILL)
    reader.join()
    fetch(b)
    assert cached_letters(cache) == {"b", "d"}


def test_fetch_from_racing_processes_downloads_once_even_if_one_is_killed(
    cache: Path, uris: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, log, get_file = FORK.Barrier(4), tmp_path / "log", MEMORY.get_file

    def die_first(self: Any, remote: str, local: str, **options: Any) -> None:
        with log.open("a") as file:
            file.write(f"{remote[-1]}\n")
        if log.read_text() == "a\n":
            Path(local).write_bytes(b"partial")
            os.kill(os.getpid(), signal.SIGKILL)
        get_file(self, remote, local, **options)

    monkeypatch.setattr(MEMORY, "get_file", die_first)
    processes = [start_process(lambda: (start.wait(60), fetch(uris[0]), fetch(uris[1]))) for _ in range(4)]
    for process in processes:
        process.join()
    assert sorted(process.exitcode for process in processes) == [-signal.SIGKILL, 0, 0, 0]
    assert sorted(log.read_text().split()) == ["a", "a", "b"] and cached_letters(cache) == {"a", "b"}


def test_fetch_removes_partial_downloads_of_killed_processes(
    cache: Path, uris: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(self: Any, remote: str, local: str, **options: Any) -> None:
        Path(local).write_bytes(content(remote)[: SIZE // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    a, b, c, _ = uris
    with monkeypatch.context() as patch:
        patch.setattr(MEMORY, "get_file", die)
        for uri in (a, b):
            process = start_process(partial(fetch, uri))
            process.join()
            assert process.exitcode == -signal.SIGKILL
    assert len(list(cache.glob("??/.partial-*"))) == 1  # the second process removed the file of the first
    fetch(a)  # over the partial file
    fetch(c)  # fits once the other partial file is removed
    assert cached_letters(cache) == {"a", "c"}


def test_fetch_retries_transient_faults_and_reports_permanent_ones(
    cache: Path, uris: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    get_file, downloads = MEMORY.get_file, list[str]()

    def get_file_with_faults(self: Any, remote: str, local: str, **options: Any) -> None:
        downloads.append(remote[-1])
        if len(downloads) == 1:
            raise ConnectionResetError(errno.ECONNRESET, "reset by peer")
        if len(downloads) == 2 or remote[-1] == "b":
            Path(local).write_bytes(content(remote)[:-1])
            return
        get_file(self, remote, local, **options)

    monkeypatch.setattr(MEMORY, "get_file", get_file_with_faults)
    fetch(uris[0])
    with pytest.raises(DataError, match=rf"{uris[1]} is truncated.* 9999 bytes, its index says 10000"):
        fetch(uris[1])
    assert downloads == [*"aaa", *"bbb"] and cached_letters(cache) == {"a"}


def test_fetch_on_a_full_disk_raises_user_error_and_leaves_nothing(
    cache: Path, uris: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, remote: str, local: str, **options: Any) -> None:
        Path(local).write_bytes(b"some")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(MEMORY, "get_file", full)
    with pytest.raises(UserError, match=rf"cache {uris[0]} in {cache} .*CROWDRAY_CACHE.*no space left"):
        fetch(uris[0])
    assert cached_letters(cache) == set()


def test_cache_limit_defaults_to_half_of_the_usable_disk(
    cache: Path, uris: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CROWDRAY_CACHE_GIB")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2 * SIZE))
    fetch(uris[0])
    with pytest.raises(storage.CacheFullError, match=r"15000 bytes"):
        fetch(uris[1])


@pytest.mark.parametrize("size", ["much", "-1", "nan"])
def test_cache_limit_rejects_invalid_sizes(uris: list[str], monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    monkeypatch.setenv("CROWDRAY_CACHE_GIB", size)
    with pytest.raises(UserError, match=f"CROWDRAY_CACHE_GIB is '{size}'"):
        fetch(uris[0])


def test_fetch_reuses_a_copy_and_replaces_a_damaged_one(cache: Path, uris: list[str]) -> None:
    path = fetch(uris[0])
    assert cache in path.parents
    path.write_bytes(b"damaged")
    assert fetch(uris[0]) == path
    storage.remove(uris[0])
    assert fetch(uris[0]) == path


@pytest.mark.parametrize(
    ("size", "digest", "message"), [(999, sha256(b"a" * 999), "10000 bytes"), (SIZE, sha256(b"y"), sha256(b"y"))]
)
def test_fetch_never_caches_a_wrong_file(cache: Path, uris: list[str], size: int, digest: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        storage.fetch(uris[0], sha256=digest, size=size)
    assert cached_letters(cache) == set()


def test_fetch_returns_a_local_file_itself(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(b"abc")
    assert storage.fetch(str(path), sha256=sha256(b"abc"), size=3) == path
    path.write_bytes(b"abd")
    with pytest.raises(DataError, match=f"{sha256(b'abd')}.*{sha256(b'abc')}.*convert"):
        storage.fetch(str(path), sha256=sha256(b"abc"), size=3)
    path.unlink()
    with pytest.raises(DataError, match="missing"):
        storage.fetch(str(path), sha256=sha256(b"abc"), size=3)
    assert not cache.exists()
