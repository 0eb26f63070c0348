"""Storage: whole or not there at all, the same on a local folder and on a remote file system."""

import contextlib
import errno
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from crowdray import storage
from crowdray.errors import DataError, UserError
from crowdray.storage import files, paths


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CROWDRAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(paths, "RETRY_DELAYS_S", (0.0, 0.0))
    return tmp_path / "cache"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_resolve_makes_local_paths_absolute_and_keeps_remote_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.resolve("a/../b") == str(tmp_path / "b")
    assert storage.resolve(f"file://{tmp_path}/b/") == str(tmp_path / "b")
    assert storage.resolve("memory://bucket/c/") == "memory://bucket/c"
    assert storage.resolve(storage.resolve("a")) == storage.resolve("a")


@pytest.mark.parametrize("uri", ["nosuch://bucket/x", ""])
def test_what_cannot_be_resolved_is_the_users_error(uri: str) -> None:
    with pytest.raises(UserError, match=r"scheme|empty"):
        storage.resolve(uri)


def test_written_bytes_come_back_and_are_listed_in_order(place: str) -> None:
    for name in ("b.txt", "a.TXT", "c.bin"):
        storage.write_bytes(storage.join(place, name), name.encode())
    assert storage.read_bytes(storage.join(place, "b.txt")) == b"b.txt"
    assert storage.list_files(place, (".txt",)) == [
        storage.join(place, "a.TXT"),
        storage.join(place, "b.txt"),
    ]
    assert len(storage.list_files(place)) == 3
    storage.remove(storage.join(place, "c.bin"))
    storage.remove(storage.join(place, "c.bin"))
    assert not storage.exists(storage.join(place, "c.bin"))


def test_a_missing_file_is_named(place: str) -> None:
    for read in (storage.read_bytes, storage.list_files):
        with pytest.raises(UserError, match=r"nothing\.bin.*does not exist"):
            read(storage.join(place, "nothing.bin"))


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    storage.write_bytes(str(target), b"old")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match=r"file.*no space left"):
        storage.write_bytes(str(target), b"new")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("method", "ask"),
    [
        ("find", lambda place: [file.name for file in storage.find_files(place)] == ["a"]),
        ("exists", lambda place: storage.exists(f"{place}/a")),
        ("pipe_file", lambda place: storage.write_bytes(f"{place}/a", b"new")),
        ("rm_file", lambda place: storage.remove(f"{place}/a")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_connection_that_is_cut_once_is_tried_again(
    method: str, ask: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, cut = f"memory://{uuid.uuid4().hex}", list[str]()
    storage.write_bytes(f"{place}/a", b"old")
    whole = getattr(MemoryFileSystem, method)

    def once(*arguments: Any, **named: Any) -> Any:
        if not cut:
            cut.append(method)
            raise ConnectionResetError("cut")
        return whole(*arguments, **named)

    monkeypatch.setattr(MemoryFileSystem, method, once)
    assert ask(place) is not False and cut == [method]


def make_folder(root: Path) -> dict[str, bytes]:
    content = {"weights.bin": b"w" * 100, "deep/er/config.json": b"{}", "a_complete.json": b"done"}
    for name, data in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return content


def test_a_published_folder_is_whole(place: str, tmp_path: Path) -> None:
    content = make_folder(tmp_path / "made")
    storage.publish_directory(tmp_path / "made", place, "a_complete.json")
    assert {name: storage.read_bytes(storage.join(place, name)) for name in content} == content
    with pytest.raises(UserError, match="already holds"):
        storage.publish_directory(tmp_path / "made", place, "a_complete.json")
    with pytest.raises(UserError, match=r"holds no other\.json"):
        storage.publish_directory(tmp_path / "made", place, "other.json")


def test_the_last_file_is_put_last_and_a_failed_upload_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "made")
    fs = fsspec.filesystem("memory")
    seen: list[str] = []
    real = type(fs).put_file

    def put_file(self: Any, local: str, remote: str, **options: Any) -> None:
        seen.append(remote.rsplit("/", 1)[1])
        if len(seen) == 3:
            no_space()
        real(self, local, remote, **options)

    monkeypatch.setattr(type(fs), "put_file", put_file)
    place = f"memory://{uuid.uuid4().hex}"
    with pytest.raises(UserError, match="no space left"):
        storage.publish_directory(tmp_path / "made", place, "a_complete.json")
    assert seen[-1] == "a_complete.json" and len(seen) == 3
    assert fs.find(place) == []


def test_a_failed_local_publish_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "made")
    monkeypatch.setattr("shutil.copytree", no_space)
    with pytest.raises(UserError, match="no space left"):
        storage.publish_directory(tmp_path / "made", str(tmp_path / "out" / "run"), "a_complete.json")
    assert os.listdir(tmp_path / "out") == []


def test_a_published_folder_is_taken_back_and_then_is_gone(place: str, tmp_path: Path) -> None:
    make_folder(tmp_path / "made")
    uri = storage.join(place, "folder")
    storage.publish_directory(tmp_path / "made", uri, "a_complete.json")
    storage.write_bytes(storage.join(place, "folder-2"), b"a neighbour")
    for _ in range(2):
        storage.unpublish_directory(uri, "a_complete.json")
        assert [file.name for file in storage.find_files(place)] == ["folder-2"]
    storage.publish_directory(tmp_path / "made", uri, "a_complete.json")


def test_taken_back_remotely_the_last_file_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "made")
    place = f"memory://{uuid.uuid4().hex}"
    storage.publish_directory(tmp_path / "made", place, "a_complete.json")
    fs = fsspec.filesystem("memory")
    gone: list[str] = []
    monkeypatch.setattr(type(fs), "rm_file", lambda self, path: gone.append(path.rsplit("/", 1)[1]))
    storage.unpublish_directory(place, "a_complete.json")
    assert gone[0] == "a_complete.json" and len(gone) == 3


def test_all_files_below_a_folder_are_found_with_size_and_time(place: str) -> None:
    assert storage.find_files(place) == []
    before = time.time()
    for name in ("b", "a/deep/c", "a/d"):
        storage.write_bytes(storage.join(place, name), name.encode())
    found = storage.find_files(place)
    assert {file.name: file.size for file in found} == {"b": 1, "a/deep/c": 8, "a/d": 3}
    assert all(before - 1 < file.modified < time.time() + 1 for file in found)
    assert {file.name for file in storage.find_files(storage.join(place, "a"))} == {"deep/c", "d"}


@pytest.mark.parametrize("name", ["mtime", "LastModified", "last_modified", "updated"])
@pytest.mark.parametrize("value", [12.5, datetime.fromtimestamp(12.5, UTC), "1970-01-01T00:00:12.500Z"])
def test_each_file_systems_time_is_understood(name: str, value: object) -> None:
    assert files._modified({name: value}) == 12.5


def test_a_file_is_created_once(place: str) -> None:
    uri = storage.join(place, "deep", "file")
    assert storage.read_bytes_or_none(uri) is None
    assert storage.create_bytes(uri, b"first")
    assert not storage.create_bytes(uri, b"second")
    assert storage.read_bytes_or_none(uri) == b"first"


def test_a_refusal_in_any_words_means_what_lies_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Object stores refuse a taken name with errors of their own, and refuse what they took when it comes twice."""
    fs = type(fsspec.filesystem("memory"))
    uri = f"memory://{uuid.uuid4().hex}/file"

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EINVAL, "At least one of the pre-conditions you specified did not hold")

    with monkeypatch.context() as patch:
        patch.setattr(fs, "pipe_file", refuse)
        with pytest.raises(UserError, match=r"create.*pre-conditions"):
            storage.create_bytes(uri, b"ours")
    storage.write_bytes(uri, b"ours")
    monkeypatch.setattr(fs, "pipe_file", refuse)
    assert storage.create_bytes(uri, b"ours")
    assert not storage.create_bytes(uri, b"another's")


def test_a_full_disk_creates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"

    @contextlib.contextmanager
    def full(self: Path, mode: str) -> Iterator[Any]:
        with open(self, mode) as file:
            yield SimpleNamespace(write=file.write, flush=no_space)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match="no space left"):
        storage.create_bytes(str(target), b"content")
    assert os.listdir(tmp_path) == []


def test_a_remote_file_is_fetched_once_and_verified(cache: Path) -> None:
    content = os.urandom(1000)
    uri = f"memory://{uuid.uuid4().hex}/shard"
    storage.write_bytes(uri, content)
    path = storage.fetch(uri, sha256=sha256(content), size=1000)
    assert path.read_bytes() == content and cache in path.parents

    storage.remove(uri)
    assert storage.fetch(uri, sha256=sha256(content), size=1000) == path


def test_a_damaged_cache_is_replaced(cache: Path) -> None:
    content = os.urandom(1000)
    uri = f"memory://{uuid.uuid4().hex}/shard"
    storage.write_bytes(uri, content)
    path = storage.fetch(uri, sha256=sha256(content), size=1000)
    path.write_bytes(content[:500])
    assert storage.fetch(uri, sha256=sha256(content), size=1000).read_bytes() == content


def test_a_wrong_remote_file_never_enters_the_cache(cache: Path) -> None:
    uri = f"memory://{uuid.uuid4().hex}/shard"
    storage.write_bytes(uri, b"x" * 1000)
    for size, digest, message in (
        (999, sha256(b"x" * 999), "1000 bytes"),
        (1000, sha256(b"y"), sha256(b"y")),
    ):
        with pytest.raises(DataError, match=message):
            storage.fetch(uri, sha256=digest, size=size)
    assert list(cache.glob("??/[!.]*[!k]")) == []


def test_a_local_file_is_its_own_cache(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(b"abc")
    assert storage.fetch(str(path), sha256=sha256(b"abc"), size=3) == path
    path.write_bytes(b"abd")
    assert storage.fetch(str(path), sha256=sha256(b"abc"), size=3, verify=False) == path
    with pytest.raises(DataError, match=f"{sha256(b'abd')}.*{sha256(b'abc')}.*convert"):
        storage.fetch(str(path), sha256=sha256(b"abc"), size=3)
    path.unlink()
    with pytest.raises(DataError, match="missing"):
        storage.fetch(str(path), sha256=sha256(b"abc"), size=3)
    assert not cache.exists()
