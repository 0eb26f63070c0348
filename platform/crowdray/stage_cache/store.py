"""The stage store: training states under their stage keys, so that runs with an equal prefix train it once.

    states/<key>/<epoch>/manifest.json     written last: the folder, and size and sha256 of each of its files
    states/<key>/<epoch>/<folder>/         a checkpoint, in a folder whose name is unique to its publisher
    used/<key>-<epoch>                     empty; its modification time is that of the state's last use

Readers see whole states only: a local state appears and disappears by one rename; on an object store the manifest is
written last and removed first, and no two publishers write to the same file.
"""

import contextlib
import json
import logging
import re
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crowdray import storage
from crowdray.config import ConfigError
from crowdray.documents import parse_json
from crowdray.errors import DataError, UserError
from crowdray.stage_cache.keys import StageKey
from crowdray.storage.paths import translated_errors
from crowdray.training.checkpoint import Checkpoint, disk_full_as_user_error, load_checkpoint

MANIFEST = "manifest.json"

IDLE_S = 3600.0
"""Seconds without use after which a state may be evicted."""

LEFTOVER_S = 3600.0
"""Age in seconds at which the remains of a killed publisher are removed."""

_FIX = "or set TMPDIR to another folder"
_MANIFEST_PATH = re.compile(r"(\d{5})/" + re.escape(MANIFEST))
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Entry:
    """A folder in the store, as listed."""

    key: str
    folder: str
    """The epoch in five digits; any other name is an unfinished publication or removal."""
    size: int
    used: float
    """Time of the last load or write."""
    is_whole: bool


class StageStore:
    """Training states at a URI; beyond `limit_bytes`, the least recently used idle ones are evicted."""

    def __init__(self, uri: str, limit_bytes: int) -> None:
        self.uri = storage.resolve(uri)
        self.limit_bytes = limit_bytes
        self._states, self._used = storage.join(self.uri, "states"), storage.join(self.uri, "used")

    def find(
        self, keys: Sequence[StageKey], stored: Mapping[str, Sequence[int]] | None = None
    ) -> tuple[StageKey, int] | None:
        """Find the latest usable state of a run: its latest stage that has one, and the last epoch of it.

        Args:
            keys: The stage keys of the run, in order.
            stored: A recent result of `stored`, to save one listing per key.
        """
        for key in reversed(keys):
            epochs = self.epochs(key) if stored is None else stored.get(key.key, ())
            if usable := [epoch for epoch in epochs if epoch <= key.epochs]:
                return key, max(usable)
        return None

    def stored(self) -> Mapping[str, Sequence[int]]:
        """The epochs of all stored states, by stage key."""
        found: defaultdict[str, list[int]] = defaultdict(list)
        for file in storage.find_files(self._states):
            key, _, path = file.name.partition("/")
            if match := _MANIFEST_PATH.fullmatch(path):
                found[key].append(int(match[1]))
        return found

    def epochs(self, key: StageKey) -> list[int]:
        """The epochs of a stage whose states are stored, ascending."""
        found = storage.find_files(storage.join(self._states, key.key))
        return sorted(int(match[1]) for file in found if (match := _MANIFEST_PATH.fullmatch(file.name)))

    def load(self, key: StageKey, epoch: int) -> Checkpoint | None:
        """Load the state after an epoch of a stage, each file checked against its hash; None if it does not exist.

        A damaged state, or one with unknown configuration fields, is removed with a warning.
        """
        uri = self._uri(key.key, _folder(epoch))
        manifest = storage.read_bytes_or_none(storage.join(uri, MANIFEST))
        if manifest is None:
            return None
        self.touch(key, epoch)  # first, so that no eviction removes it while it is read
        try:
            with _verified_files(uri, manifest) as folder:
                return load_checkpoint(folder)
        except UserError as error:
            if not isinstance(error, DataError | ConfigError) and not isinstance(error.__cause__, FileNotFoundError):
                raise  # a fault of the network or of permissions, not of the state
            # A state that was removed, or removed and published again, while it was read is not damaged.
            if storage.read_bytes_or_none(storage.join(uri, MANIFEST)) == manifest:
                _log.warning("%s cannot be used and will be trained again: %s", uri, error)
                self._remove(key.key, _folder(epoch))
            return None

    def publish(self, key: StageKey, epoch: int, save: Callable[[Path], None]) -> None:
        """Store the state after an epoch of a stage, unless it is stored already, and evict others if need be.

        Args:
            key: The stage.
            epoch: Epochs done in the stage, from 1 to 99999.
            save: Writes the checkpoint into an empty folder.

        Raises:
            UserError: The disk is full; nothing is left behind.
        """
        assert 1 <= epoch < 10**5, f"epoch is {epoch}, not from 1 to 99999"
        uri = self._uri(key.key, _folder(epoch))
        if storage.exists(storage.join(uri, MANIFEST)):
            return
        with (
            storage.scratch_folder("state") as scratch,
            disk_full_as_user_error(f"the state {uri}", _FIX),
        ):
            files = scratch / uuid.uuid4().hex
            files.mkdir()
            save(files)
            (scratch / MANIFEST).write_text(_manifest_of(files))
            _publish(scratch, uri)
        self._evict(key.key, _folder(epoch))

    def touch(self, key: StageKey, epoch: int) -> None:
        """Mark a state as used now, which protects it from eviction for IDLE_S."""
        storage.write_bytes(self._mark(key.key, _folder(epoch)), b"")

    def size(self) -> int:
        """Bytes of all states, whole or not."""
        return sum(file.size for file in storage.find_files(self._states))

    def _uri(self, key: str, folder: str) -> str:
        return storage.join(self._states, key, folder)

    def _mark(self, key: str, folder: str) -> str:
        return storage.join(self._used, f"{key}-{folder}")

    def _remove(self, key: str, folder: str) -> None:
        storage.unpublish_directory(self._uri(key, folder), MANIFEST)
        storage.remove(self._mark(key, folder))

    def _evict(self, key: str, folder: str) -> None:
        """Remove old remains, and the least recently used idle states beyond the limit, except the one given."""
        entries, now = self._entries(), time.time()
        total = sum(entry.size for entry in entries)
        for entry in sorted(entries, key=lambda entry: entry.used):
            is_idle = entry.used < now - (IDLE_S if entry.is_whole else LEFTOVER_S)
            is_needed = entry.is_whole and (total <= self.limit_bytes or (entry.key, entry.folder) == (key, folder))
            if is_idle and not is_needed:
                self._remove(entry.key, entry.folder)
                total -= entry.size
        if total > self.limit_bytes:
            _log.warning(
                "the stage cache %s has %d bytes, more than its limit of %d: all its states were used in the last hour",
                self.uri,
                total,
                self.limit_bytes,
            )

    def _entries(self) -> list[_Entry]:
        used = {file.name: file.modified for file in storage.find_files(self._used)}
        folders: defaultdict[tuple[str, str], list[storage.FileInfo]] = defaultdict(list)
        for file in storage.find_files(self._states):
            key, folder, path = (*file.name.split("/", 2), "", "")[:3]
            if path:  # files at other levels are not part of the store
                folders[key, folder].append(file)
        return [
            _Entry(
                key,
                folder,
                sum(file.size for file in files),
                max(used.get(f"{key}-{folder}", 0.0), *(file.modified for file in files)),
                any(_MANIFEST_PATH.fullmatch(file.name.removeprefix(f"{key}/")) for file in files),
            )
            for (key, folder), files in folders.items()
        ]


def _folder(epoch: int) -> str:
    return f"{epoch:05d}"


def _publish(local: Path, uri: str) -> None:
    try:
        storage.publish_directory(local, uri, last=MANIFEST)
    except UserError:
        if storage.exists(storage.join(uri, MANIFEST)):
            return  # another publisher was faster
        if not (storage.is_local(uri) and storage.exists(uri)):
            raise
        # No rename can replace a folder, such as one that lost its manifest.
        storage.unpublish_directory(uri, MANIFEST)
        _publish(local, uri)


def _manifest_of(files: Path) -> str:
    listed = {
        file.name: {"bytes": file.stat().st_size, "sha256": storage.hash_file(file)} for file in sorted(files.iterdir())
    }
    return json.dumps({"folder": files.name, "files": listed}, indent=1) + "\n"


@contextlib.contextmanager
def _verified_files(uri: str, manifest: bytes) -> Iterator[Path]:
    """Yield a local folder with a state's files; raise DataError unless each is as the manifest says."""
    try:
        content = parse_json(manifest)
        listed = {name: (int(file["bytes"]), str(file["sha256"])) for name, file in content["files"].items()}
        # Names become paths: a manifest must not reach other folders.
        if not all(re.fullmatch(r"[\w-][\w.-]*", name) for name in (content["folder"], *listed)):
            raise ValueError(f"names {content['folder']!r}, {list(listed)}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"its {MANIFEST} is damaged ({type(error).__name__}: {error})") from error
    with storage.local_copy(storage.join(uri, content["folder"])) as folder:
        for name, expected in listed.items():
            with translated_errors("read", str(folder / name)):
                found = (folder / name).stat().st_size, storage.hash_file(folder / name)
            if found != expected:
                raise DataError(f"{name} has {found[0]} bytes and sha256 {found[1]}; its manifest says {expected}")
        yield folder
