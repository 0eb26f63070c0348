"""Reading and publishing through fsspec, the only judge of URIs: folders, buckets and memory behave alike."""

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import fsspec
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem

from crowdray.errors import DataError, UserError

PARTIAL = ".partial-"
"""Start of the names that half-written files and folders carry until their one rename."""

_verified: set[tuple[str, str, int, int]] = set()


def resolve(uri: str | os.PathLike[str]) -> str:
    """The absolute form of a URI: an absolute path for local files, everything else without a trailing slash.

    Raises UserError for a scheme that nothing here can read.
    """
    text = os.fspath(uri)
    if not text:
        raise UserError("an empty path was given; name a folder, a file or a URI such as s3://bucket/folder")
    if text.startswith(("file://", "local://")):
        text = text.split("://", 1)[1]
    if "://" not in text:
        return os.path.abspath(os.path.expanduser(text))
    scheme, _, rest = text.partition("://")
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError:
        raise UserError(
            f"{text}: the scheme {scheme!r} is not known; use a path or a scheme of fsspec: s3://, gs://, ..."
        ) from None
    except ImportError as error:
        raise UserError(f"{text}: {error}; install that package to read {scheme}://") from error
    return f"{scheme}://{rest.rstrip('/')}"


def join(uri: str, *parts: str) -> str:
    """A URI below another one: join("s3://b/c", "d") is "s3://b/c/d"."""
    return "/".join([uri.rstrip("/") if uri != "/" else "", *(part.strip("/") for part in parts)])


def is_local(uri: str) -> bool:
    """Whether a URI names a place in this machine's own file system."""
    return "://" not in resolve(uri)


def exists(uri: str) -> bool:
    """Whether a file or a folder lies at the URI."""
    with _explained("look for", uri):
        fs, path = _filesystem(uri)
        fs.invalidate_cache()
        return bool(fs.exists(path))


def read_bytes(uri: str) -> bytes:
    """The whole content of a file; a missing one is a UserError that names it."""
    with _explained("read", uri):
        if is_local(uri):  # a file system object costs more than a small file
            return Path(resolve(uri)).read_bytes()
        fs, path = _filesystem(uri)
        content = fs.cat_file(path)
        assert isinstance(content, bytes)
        return content


def read_if_there(uri: str) -> bytes | None:
    """The whole content of a file, None when there is no such file."""
    try:
        return read_bytes(uri)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


@contextlib.contextmanager
def open_read(uri: str) -> Iterator[IO[bytes]]:
    """A file opened for reading, where a part of it is enough; a missing one is a UserError that names it."""
    with _explained("read", uri):
        fs, path = _filesystem(uri)
        with fs.open(path, "rb") as file:
            yield file


def list_files(uri: str, suffixes: Sequence[str] = ()) -> list[str]:
    """URIs of the files directly in a folder, sorted by name, that end with one of the suffixes in any case.

    Without suffixes all files are listed; a folder that is not there is a UserError.
    """
    resolved = resolve(uri)
    with _explained("list", uri):
        fs, path = _filesystem(uri)
        fs.invalidate_cache(path)
        entries = fs.ls(path, detail=True)
    endings = tuple(suffix.lower() for suffix in suffixes)
    names = [Path(entry["name"]).name for entry in entries if entry["type"] == "file"]
    return [join(resolved, name) for name in sorted(names) if not endings or name.lower().endswith(endings)]


@dataclass(frozen=True)
class Found:
    """A file somewhere below a folder."""

    name: str
    """Its path from the folder on, with slashes."""
    bytes: int
    """Its size."""
    modified: float
    """Seconds since 1970."""


def find_files(uri: str, depth: int | None = None) -> list[Found]:
    """All files below a folder, at most `depth` levels deep, in one listing; none when the folder is not there."""
    with _explained("list", uri):
        fs, path = _filesystem(uri)
        fs.invalidate_cache()
        entries = fs.find(path, maxdepth=depth, detail=True)
    found = [Found(name.removeprefix(path).strip("/"), e["size"], _modified(e)) for name, e in entries.items()]
    return [file for file in found if file.name]


def create_bytes(uri: str, data: bytes) -> bool:
    """Write a file that is not there yet: of many who try, each with other data, one gets True.

    A reader may meet a local file before its content.
    """
    with _explained("create", uri):
        fs, path = _filesystem(uri)
        try:
            if is_local(uri):
                _create_locally(Path(path), data)
            else:
                fs.pipe_file(path, data, mode="create")
        except OSError:
            # Object stores say "taken" in several ways, and a put that was sent twice is refused though it is ours.
            if (there := read_if_there(uri)) is None:
                raise
            return there == data
    return True


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file so that it is either whole or not there: a rename locally, one put remotely."""
    with _explained("write", uri):
        fs, path = _filesystem(uri)
        if not is_local(uri):
            fs.pipe_file(path, data)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial_sibling(target)
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def write_file(local: Path, uri: str) -> None:
    """Move a finished local file to its URI, where it appears whole: by one rename or one put."""
    with _explained("write", uri):
        fs, path = _filesystem(uri)
        if not is_local(uri):
            fs.put_file(str(local), path)
            local.unlink()
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial_sibling(target)
        try:
            shutil.move(local, partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def local_scratch(uri: str) -> Iterator[Path]:
    """A local file name to write before write_file publishes it at the URI: beside a local target, else in temp.

    Whatever is left there at the end is removed, and a full disk becomes a UserError that names the URI.
    """
    with _explained("write", uri):
        target = Path(resolve(uri)) if is_local(uri) else Path(tempfile.gettempdir()) / Path(uri).name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial_sibling(target)
        try:
            yield partial
        finally:
            partial.unlink(missing_ok=True)


def remove(uri: str) -> None:
    """Remove one file; one that is gone already is no error."""
    with _explained("remove", uri), contextlib.suppress(FileNotFoundError):
        fs, path = _filesystem(uri)
        fs.rm_file(path)


def publish_directory(local: Path, uri: str, last: str) -> None:
    """Publish every file of a local folder at a URI, the file named `last` last: it stands for the whole.

    Locally the folder is copied to a hidden sibling that is then renamed once. A place that is taken already
    is a UserError, and an attempt that fails takes back what it had uploaded.
    """
    files = sorted(path for path in local.rglob("*") if path.is_file())
    names = [path.relative_to(local).as_posix() for path in files]
    if last not in names:
        raise UserError(f"{local} holds no {last}, the file that is published last; found {names[:5]}")
    if exists(join(uri, last)):
        raise UserError(f"{uri} already holds {last}; choose another place, or remove that folder first")
    with _explained("publish", uri):
        if is_local(uri):
            _publish_locally(local, Path(resolve(uri)))
        else:
            _publish_remotely(local, uri, sorted(names, key=lambda name: name == last))


def retract_directory(uri: str, last: str) -> None:
    """Take back what publish_directory published: at once locally, elsewhere `last` first; if gone, no error."""
    with _explained("remove", uri):
        fs, path = _filesystem(uri)
        if is_local(uri):
            partial = _partial_sibling(Path(path))
            with contextlib.suppress(FileNotFoundError):
                Path(path).replace(partial)
            shutil.rmtree(partial, ignore_errors=True)
            return
        fs.invalidate_cache()
        for name in sorted(fs.find(path), key=lambda name: name != join(path, last)):
            with contextlib.suppress(FileNotFoundError):
                fs.rm_file(name)


def fetch(uri: str, *, sha256: str, size: int, verify: bool = True) -> Path:
    """A local path to map: the file itself when it is local, else a copy in this node's cache, fetched once.

    `size` is in bytes and always checked. The hash is checked once per process: always for a remote file, and
    with `verify` for a local one. The cache lies in $CROWDRAY_CACHE, or in ~/.cache/crowdray. Raises
    DataError when the content is not what the index says.
    """
    if is_local(uri):
        path = Path(resolve(uri))
        if not path.is_file():
            raise DataError(f"{path} is missing though the index names it; copy it back or convert the dataset again")
        check_content(path, uri, sha256=sha256 if verify else None, size=size)
        return path
    cached = cache_folder() / sha256[:2] / sha256
    with _explained("cache", f"{uri} in {cached.parent} (set CROWDRAY_CACHE to another folder if need be)"):
        cached.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{cached}.lock"):
            if cached.exists():
                with contextlib.suppress(DataError):
                    check_content(cached, uri, sha256=sha256, size=size)
                    return cached
            partial = _partial_sibling(cached)
            try:
                _download(uri, partial)
                check_content(partial, uri, sha256=sha256, size=size)
                partial.replace(cached)
            finally:
                partial.unlink(missing_ok=True)
    return cached


def check_content(path: Path, uri: str, *, sha256: str | None, size: int) -> None:
    """Check a local file against its expected size in bytes and, if given, its hash; raises DataError.

    A file that was found good is not hashed again by this process while its size and time stay the same.
    """
    status = path.stat()
    if status.st_size != size:
        raise DataError(
            f"{uri} is truncated or was replaced: it has {status.st_size} bytes, its index says {size}; "
            "copy it again or convert the dataset again"
        )
    if sha256 is None or (key := (str(path), sha256, status.st_size, status.st_mtime_ns)) in _verified:
        return
    found = hash_file(path)
    if found != sha256:
        raise DataError(
            f"{uri} is damaged: its sha256 is {found}, its index says {sha256}; "
            "copy it again or convert the dataset again"
        )
    _verified.add(key)


def hash_file(path: Path) -> str:
    """The sha256 of a local file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """The folder in which this node keeps what it fetched: $CROWDRAY_CACHE, else ~/.cache/crowdray."""
    return Path(os.environ.get("CROWDRAY_CACHE") or "~/.cache/crowdray").expanduser()


def _filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    resolved = resolve(uri)
    if "://" not in resolved:
        return LocalFileSystem(), resolved
    fs, path = fsspec.core.url_to_fs(resolved)
    return fs, path


def _partial_sibling(target: Path) -> Path:
    return target.with_name(f"{PARTIAL}{uuid.uuid4().hex[:12]}-{target.name}")


def _create_locally(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as file:  # LocalFileSystem.pipe_file looks first and then writes
        try:
            file.write(data)
            file.flush()  # a full disk shows here
        except OSError:
            target.unlink()
            raise


def _modified(entry: Mapping[str, Any]) -> float:
    """When a listed file was written: each file system has its own name and type for it."""
    times = (entry.get(name) for name in ("mtime", "LastModified", "last_modified", "updated", "created"))
    time = next((value for value in times if value is not None), 0.0)
    if isinstance(time, str):
        time = datetime.fromisoformat(time)
    return time.timestamp() if isinstance(time, datetime) else float(time)


def _download(uri: str, path: Path) -> None:
    fs, remote = _filesystem(uri)
    fs.get_file(remote, str(path))


def _publish_locally(local: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial_sibling(target)
    try:
        shutil.copytree(local, partial)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _publish_remotely(local: Path, uri: str, names: Sequence[str]) -> None:
    fs, root = _filesystem(uri)
    done: list[str] = []
    try:
        for name in names:
            done.append(join(root, name))
            fs.put_file(str(local / name), done[-1])
    except BaseException:
        for path in done:
            with contextlib.suppress(Exception):
                fs.rm_file(path)
        raise


@contextlib.contextmanager
def _explained(action: str, uri: str) -> Iterator[None]:
    """Turn what the system says into a UserError with the URI and the mend."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"cannot {action} {uri}: it does not exist; check the path") from error
    except PermissionError as error:
        raise UserError(f"cannot {action} {uri}: permission denied; check its owner or your credentials") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"cannot {action} {uri}: no space left on the device; free some, or choose another place. "
                "Nothing was left half-written"
            ) from error
        raise UserError(f"cannot {action} {uri}: {error}") from error
    except Exception as error:
        # Remote file systems raise exceptions of their client libraries, which share no base class.
        if not type(error).__module__.startswith(("botocore", "aiobotocore", "aiohttp", "google", "gcsfs", "azure")):
            raise
        raise UserError(f"cannot {action} {uri}: {error}; check the address and your credentials") from error
