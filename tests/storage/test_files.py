"""Storage: atomic publication, with the same results on a local folder and on a remote file system."""

import contextlib
import errno
import os
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from crowdray import storage
from crowdray.errors import UserError

from ..conftest import ODD_FOLDER


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_resolve_makes_local_paths_absolute_and_keeps_remote_uris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.resolve("a/../b") == str(tmp_path / "b")
    assert storage.resolve(f"file://{tmp_path}/b/") == str(tmp_path / "b")
    assert storage.resolve("memory://bucket/c/") == "memory://bucket/c"
    assert storage.resolve(storage.resolve("a")) == storage.resolve("a")


def test_resolve_takes_paths_literally_and_decodes_file_uris(tmp_path: Path) -> None:
    path = tmp_path / ODD_FOLDER / "a:" / "b"
    for uri in (str(path), path.as_uri(), path.as_uri().replace("//", "//localhost", 1), f"local://{path}"):
        assert storage.resolve(uri) == str(path) and storage.is_local(uri)
    assert storage.resolve(f"{tmp_path}/a://b") == f"{tmp_path}/a:/b"


@pytest.mark.parametrize("uri", ["nosuch://bucket/x", ""])
def test_resolve_rejects_unknown_schemes_and_empty_paths(uri: str) -> None:
    with pytest.raises(UserError, match=r"scheme|empty"):
        storage.resolve(uri)


def test_list_files_returns_written_files_in_order(root_uri: str) -> None:
    for name in ("b.txt", "a.TXT", "c.bin"):
        storage.write_bytes(storage.join(root_uri, name), name.encode())
    assert storage.read_bytes(storage.join(root_uri, "b.txt")) == b"b.txt"
    assert storage.list_files(root_uri, (".txt",)) == [
        storage.join(root_uri, "a.TXT"),
        storage.join(root_uri, "b.txt"),
    ]
    assert len(storage.list_files(root_uri)) == 3
    storage.remove(storage.join(root_uri, "c.bin"))
    storage.remove(storage.join(root_uri, "c.bin"))
    assert not storage.exists(storage.join(root_uri, "c.bin"))


def test_read_of_a_missing_file_names_it(root_uri: str) -> None:
    for read in (storage.read_bytes, storage.list_files):
        with pytest.raises(UserError, match=r"nothing\.bin.*does not exist"):
            read(storage.join(root_uri, "nothing.bin"))


def test_write_bytes_on_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    storage.write_bytes(str(target), b"old")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match=r"file.*no space left"):
        storage.write_bytes(str(target), b"new")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("find", lambda uri: [file.name for file in storage.find_files(uri)] == ["a"]),
        ("exists", lambda uri: storage.exists(f"{uri}/a")),
        ("pipe_file", lambda uri: storage.write_bytes(f"{uri}/a", b"new")),
        ("rm_file", lambda uri: storage.remove(f"{uri}/a")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_operations_retry_after_a_lost_connection(
    method: str, call: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, failed = f"memory://{uuid.uuid4().hex}", list[str]()
    storage.write_bytes(f"{uri}/a", b"old")
    original = getattr(MemoryFileSystem, method)

    def fail_once(*arguments: Any, **options: Any) -> Any:
        if not failed:
            failed.append(method)
            raise ConnectionResetError("connection lost")
        return original(*arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, method, fail_once)
    assert call(uri) is not False and failed == [method]


def make_folder(root: Path) -> dict[str, bytes]:
    content = {"weights.bin": b"w" * 100, "deep/er/config.json": b"{}", "a_complete.json": b"done"}
    for name, data in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return content


def test_publish_directory_copies_every_file(root_uri: str, tmp_path: Path) -> None:
    content = make_folder(tmp_path / "made")
    storage.publish_directory(tmp_path / "made", root_uri, "a_complete.json")
    assert {name: storage.read_bytes(storage.join(root_uri, name)) for name in content} == content
    with pytest.raises(UserError, match="already contains"):
        storage.publish_directory(tmp_path / "made", root_uri, "a_complete.json")
    with pytest.raises(UserError, match=r"does not contain other\.json"):
        storage.publish_directory(tmp_path / "made", root_uri, "other.json")


def test_publish_directory_failing_locally_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "made")
    monkeypatch.setattr("shutil.copytree", no_space)
    with pytest.raises(UserError, match="no space left"):
        storage.publish_directory(tmp_path / "made", str(tmp_path / "out" / "run"), "a_complete.json")
    assert os.listdir(tmp_path / "out") == []


def test_unpublish_directory_removes_only_that_folder(root_uri: str, tmp_path: Path) -> None:
    make_folder(tmp_path / "made")
    uri = storage.join(root_uri, "folder")
    storage.publish_directory(tmp_path / "made", uri, "a_complete.json")
    storage.write_bytes(storage.join(root_uri, "folder-2"), b"sibling")
    for _ in range(2):
        storage.unpublish_directory(uri, "a_complete.json")
        assert [file.name for file in storage.find_files(root_uri)] == ["folder-2"]
    storage.publish_directory(tmp_path / "made", uri, "a_complete.json")


def test_unpublish_directory_removes_last_file_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "made")
    uri, removed = f"memory://{uuid.uuid4().hex}", list[str]()
    storage.publish_directory(tmp_path / "made", uri, "a_complete.json")
    monkeypatch.setattr(MemoryFileSystem, "rm_file", lambda self, path: removed.append(path.rsplit("/", 1)[1]))
    storage.unpublish_directory(uri, "a_complete.json")
    assert removed[0] == "a_complete.json" and len(removed) == 3


def test_find_files_returns_sizes_and_times_of_all_files_below(root_uri: str) -> None:
    assert storage.find_files(root_uri) == []
    before = time.time()
    for name in ("b", "a/deep/c", "a/d"):
        storage.write_bytes(storage.join(root_uri, name), name.encode())
    found = storage.find_files(root_uri)
    assert {file.name: file.size for file in found} == {"b": 1, "a/deep/c": 8, "a/d": 3}
    assert all(before - 1 < file.modified < time.time() + 1 for file in found)
    assert {file.name for file in storage.find_files(storage.join(root_uri, "a"))} == {"deep/c", "d"}


@pytest.mark.parametrize("name", ["mtime", "LastModified", "last_modified", "updated"])
@pytest.mark.parametrize("value", [12.5, datetime.fromtimestamp(12.5, UTC), "1970-01-01T00:00:12.500Z"])
def test_find_files_understands_each_file_systems_times(
    name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(self: Any, path: str, **options: Any) -> dict[str, Any]:
        return {f"{path}/file": {"size": 3, name: value}}

    monkeypatch.setattr(MemoryFileSystem, "find", find)
    assert storage.find_files("memory://folder") == [storage.FileInfo("file", 3, 12.5)]


def test_create_bytes_creates_a_file_once(root_uri: str) -> None:
    uri = storage.join(root_uri, "deep", "file")
    assert storage.read_bytes_or_none(uri) is None
    assert storage.create_bytes(uri, b"first")
    assert not storage.create_bytes(uri, b"second")
    assert storage.read_bytes_or_none(uri) == b"first"


def test_create_bytes_decides_by_content_after_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Object stores refuse an existing name with various errors, and refuse a retried request that had succeeded."""
    uri = f"memory://{uuid.uuid4().hex}/file"

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EINVAL, "At least one of the pre-conditions you specified did not hold")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "pipe_file", refuse)
        with pytest.raises(UserError, match=r"create.*pre-conditions"):
            storage.create_bytes(uri, b"ours")
    storage.write_bytes(uri, b"ours")
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    assert storage.create_bytes(uri, b"ours") and not storage.create_bytes(uri, b"other")


def test_create_bytes_on_a_full_disk_creates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"

    @contextlib.contextmanager
    def full(self: Path, mode: str) -> Iterator[Any]:
        with open(self, mode) as file:
            yield SimpleNamespace(write=file.write, flush=no_space)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match="no space left"):
        storage.create_bytes(str(target), b"content")
    assert os.listdir(tmp_path) == []
