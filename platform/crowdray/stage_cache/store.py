"""The stage store: states of trainings under the keys of their beginnings, so that a search trains each shared
beginning once.

    states/<chain>/<epoch>/manifest.json     written last: the folder and the bytes and sha256 of each of its files
    states/<chain>/<epoch>/<folder>/         a checkpoint; the folder's name is its publisher's own
    used/<chain>-<epoch>                     empty; its time is that of the state's last load
    leases/                                  claims on chains, holds on states

Whoever reads sees whole states or none: a local one appears and goes by one rename, elsewhere the manifest comes
last and goes first, and no two publishers ever write to one file.
"""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crowdray import storage
from crowdray.config import ConfigError
from crowdray.errors import DataError, UserError
from crowdray.stage_cache.keys import StageKey
from crowdray.storage import lease as leases
from crowdray.storage.lease import Keeper, Lease
from crowdray.training.checkpoint import Checkpoint, disk_full_as_user_error, load_checkpoint

MANIFEST = "manifest.json"

LEFTOVER_S = 3600.0
"""Seconds after which what a killed publisher left is removed."""

_ELSEWHERE = "or set TMPDIR to another folder"
_WHOLE = re.compile(r"(\d{5})/" + re.escape(MANIFEST))
_PLAIN = re.compile(r"[\w-][\w.-]*")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StateId:
    """The name of a stored state."""

    chain: str
    """Key of its chain."""
    stage: str
    """The chain's stage."""
    epoch: int
    """Epochs done in that stage."""


@dataclass(frozen=True)
class _Stored:
    """A folder in the store, as a listing shows it."""

    chain: str
    folder: str
    """The epoch in five digits; another name is a publisher's work, under way or left behind."""
    bytes: int
    used: float
    """When it was last loaded or written."""
    whole: bool


class StageStore:
    """States of trainings at a URI, the least recently used removed beyond a number of bytes."""

    def __init__(self, uri: str, limit_bytes: int) -> None:
        self.uri = storage.resolve(uri)
        self.limit_bytes = limit_bytes
        self._states, self._used, self._leases = (storage.join(self.uri, n) for n in ("states", "used", "leases"))

    def find(self, chains: Sequence[StageKey], stored: Mapping[str, Sequence[int]] | None = None) -> StateId | None:
        """The longest stored beginning of a training: of its latest chain that has one, the latest state.

        stored: what `stored` gave a moment ago, for whoever asks for many trainings.
        """
        for chain in reversed(chains):
            there = self.epochs(chain) if stored is None else stored.get(chain.key, ())
            if epochs := [epoch for epoch in there if epoch <= chain.epochs]:
                return StateId(chain.key, chain.stage, max(epochs))
        return None

    def stored(self) -> Mapping[str, Sequence[int]]:
        """Epochs of all states that are stored, by the keys of their chains."""
        found: defaultdict[str, list[int]] = defaultdict(list)
        for file in storage.find_files(self._states):
            chain, _, inside = file.name.partition("/")
            if match := _WHOLE.fullmatch(inside):
                found[chain].append(int(match[1]))
        return found

    def epochs(self, chain: StageKey) -> list[int]:
        """The epochs of a chain whose states are stored, ascending."""
        found = storage.find_files(storage.join(self._states, chain.key))
        return sorted(int(match[1]) for file in found if (match := _WHOLE.fullmatch(file.name)))

    def load(self, state: StateId) -> Checkpoint | None:
        """A state, each file checked against its hash; None when it is gone.

        A damaged one, or one that this version cannot read, is removed with a warning, and will be trained again.
        """
        with self.hold(state) as lease, Keeper() as keeper:
            keeper.add(lease)
            place = self._place(state.chain, state.epoch)
            content = storage.read_bytes_or_none(storage.join(place, MANIFEST))
            if content is None:
                return None
            try:
                with _checked(place, content) as folder:
                    checkpoint = load_checkpoint(folder)
            except (DataError, ConfigError) as error:  # a state may be of a time when there were other fields
                # One that was removed meanwhile, or removed and published again, looks the same from here.
                if storage.read_bytes_or_none(storage.join(place, MANIFEST)) == content:
                    _log.warning("%s cannot be used and will be trained again: %s", place, error)
                    self._remove(state.chain, state.epoch)
                return None
            self.touch(state)
            return checkpoint

    def touch(self, state: StateId) -> None:
        """Mark a state as used now, which protects it from eviction for an hour."""
        storage.write_bytes(self._mark(state.chain, state.epoch), b"")

    def publish(self, chain: StageKey, epoch: int, save: Callable[[Path], None]) -> None:
        """Store the state after an epoch of a chain, which `save` writes into an empty folder, and make room.

        What is stored already stays, and is not saved again. A full disk is a UserError, and leaves nothing.
        """
        assert 1 <= epoch < 10**5, f"epochs of a chain are counted from 1 to 99999, {epoch} is none"
        place = self._place(chain.key, epoch)
        if storage.exists(storage.join(place, MANIFEST)):
            return
        with (
            tempfile.TemporaryDirectory(prefix="crowdray-state-") as scratch,
            disk_full_as_user_error(f"the state {place}", _ELSEWHERE),
        ):
            files = Path(scratch, uuid.uuid4().hex)
            files.mkdir()
            save(files)
            Path(scratch, MANIFEST).write_text(_manifest_of(files))
            _publish(Path(scratch), place)
        self._evict(chain.key, epoch)

    def hold(self, state: StateId) -> Lease:
        """Keep a state from eviction, until the lease is released or expires; one that is gone stays gone."""
        return leases.share(self._leases, f"hold-{state.chain}-{state.epoch:05d}", _here())

    def claim(self, chain: StageKey, owner: str) -> Lease | None:
        """The exclusive right to extend a chain; None when somebody alive has it."""
        return leases.take(self._leases, f"claim-{chain.key}", owner)

    def claimed(self, chain: StageKey) -> bool:
        """Whether somebody alive has the right to extend a chain."""
        return bool(leases.living(self._leases, f"claim-{chain.key}"))

    def claims(self) -> set[str]:
        """Keys of all chains that somebody alive has the right to extend."""
        return {name.removeprefix("claim-") for name in leases.living(self._leases) if name.startswith("claim-")}

    def size(self) -> int:
        """Bytes of all states, whole or not."""
        return sum(file.size for file in storage.find_files(self._states))

    def _place(self, chain: str, epoch: int) -> str:
        return storage.join(self._states, chain, f"{epoch:05d}")

    def _mark(self, chain: str, epoch: int) -> str:
        return storage.join(self._used, f"{chain}-{epoch:05d}")

    def _remove(self, chain: str, epoch: int) -> None:
        storage.unpublish_directory(self._place(chain, epoch), MANIFEST)
        storage.remove(self._mark(chain, epoch))

    def _evict(self, chain: str, epoch: int) -> None:
        """Remove the least recently used states beyond the limit, never one in use nor the one just published.

        Whoever takes a hold in the instant of the removal finds the state gone, and trains it again.
        """
        stored = self._swept(self._listed())
        total = sum(entry.bytes for entry in stored)
        newest = {entry.chain: int(entry.folder) for entry in sorted(stored, key=lambda e: e.folder) if entry.whole}
        for entry in sorted(stored, key=lambda entry: entry.used):
            if total <= self.limit_bytes:
                return
            if entry.whole and (entry.chain, int(entry.folder)) not in {(chain, epoch), *self._in_use(newest)}:
                self._remove(entry.chain, int(entry.folder))
                total -= entry.bytes
        if total > self.limit_bytes:
            _log.warning(
                "the stage store %s holds %d bytes, more than its limit of %d, and all of it is in use or new",
                self.uri,
                total,
                self.limit_bytes,
            )

    def _in_use(self, newest: dict[str, int]) -> Iterator[tuple[str, int]]:
        """Chain and epoch of states that are held, and of the one that each claimed chain goes on from."""
        for name in leases.living(self._leases):
            kind, chain, epoch = (*name.split("-"), "", "")[:3]
            if kind == "hold" and epoch.isdecimal():
                yield chain, int(epoch)
            elif kind == "claim" and chain in newest:
                yield chain, newest[chain]

    def _listed(self) -> list[_Stored]:
        used = {file.name: file.modified for file in storage.find_files(self._used)}
        folders: defaultdict[tuple[str, str], list[storage.FileInfo]] = defaultdict(list)
        for file in storage.find_files(self._states):
            chain, folder, inside = (*file.name.split("/", 2), "", "")[:3]
            if inside:  # a file anywhere else is none of ours
                folders[chain, folder].append(file)
        return [
            _Stored(
                chain,
                folder,
                sum(file.size for file in files),
                max(used.get(f"{chain}-{folder}", 0.0), *(file.modified for file in files)),
                any(_WHOLE.fullmatch(file.name.removeprefix(f"{chain}/")) for file in files),
            )
            for (chain, folder), files in folders.items()
        ]

    def _swept(self, stored: Sequence[_Stored]) -> list[_Stored]:
        """What is left when all that killed processes left behind is removed: folders, marks and leases."""
        old = time.time() - LEFTOVER_S
        left = []
        for entry in stored:
            if entry.whole or entry.used > old:
                left.append(entry)
            else:
                storage.unpublish_directory(storage.join(self._states, entry.chain, entry.folder), MANIFEST)
        known = {f"{entry.chain}-{entry.folder}" for entry in left}
        for mark in storage.find_files(self._used):
            if mark.name not in known and mark.modified < old:
                storage.remove(storage.join(self._used, mark.name))
        leases.sweep(self._leases)
        return left


def _publish(local: Path, place: str, again: bool = True) -> None:
    try:
        storage.publish_directory(local, place, last=MANIFEST)
    except UserError:
        if storage.exists(storage.join(place, MANIFEST)):
            return  # another was first
        if not (again and storage.is_local(place) and storage.exists(place)):
            raise
        # Remains without a manifest, which no rename can replace.
        storage.unpublish_directory(place, MANIFEST)
        _publish(local, place, again=False)


def _manifest_of(files: Path) -> str:
    listed = {
        file.name: {"bytes": file.stat().st_size, "sha256": storage.hash_file(file)} for file in sorted(files.iterdir())
    }
    return json.dumps({"folder": files.name, "files": listed}, indent=1) + "\n"


@contextlib.contextmanager
def _checked(place: str, manifest: bytes) -> Iterator[Path]:
    """A local folder with a state's files, each as the manifest says; raises DataError when one is not."""
    try:
        said = json.loads(manifest)
        listed = {name: (int(file["bytes"]), str(file["sha256"])) for name, file in said["files"].items()}
        # Names are checked because they are joined to the place: no manifest may point elsewhere.
        if not all(_PLAIN.fullmatch(name) for name in (said["folder"], *listed)):
            raise ValueError(f"names {said['folder']!r}, {list(listed)}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"its {MANIFEST} is damaged ({type(error).__name__}: {error})") from error
    source = storage.join(place, said["folder"])
    with tempfile.TemporaryDirectory(prefix="crowdray-state-") as scratch:
        folder = Path(source if storage.is_local(place) else scratch)
        with disk_full_as_user_error(f"the state {place}", _ELSEWHERE):
            for name, (size, sha256) in listed.items():
                if not storage.is_local(place):
                    _copy(storage.join(source, name), folder / name)
                _check(folder / name, size, sha256)
        yield folder


def _copy(uri: str, path: Path) -> None:
    try:
        with storage.open_read(uri) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)
    except UserError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise  # the network's fault, not the state's


def _check(path: Path, size: int, sha256: str) -> None:
    try:
        there, found = path.stat().st_size, storage.hash_file(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EIO):
            raise UserError(f"cannot read {path}: {error.strerror}; check its owner and its permissions") from error
        raise DataError(f"{path.name} cannot be read: {error.strerror}") from error
    if (there, found) != (size, sha256):
        raise DataError(
            f"{path.name} has {there} bytes with the sha256 {found}, its manifest says {size} with {sha256}"
        )


def _here() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"
