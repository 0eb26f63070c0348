"""Leases: small files that say who works on what, which end by themselves when their holder does.

Expiries are wall-clock times of the machines, whose clocks must agree within a fraction of LEASE_S. A lease guards
against work done twice, not against wrong results: whoever loses one unawares does harmless work.
"""

import json
import logging
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Self

from crowdray import storage
from crowdray.errors import UserError

LEASE_S = 30.0
"""Seconds that a lease lasts after its last renewal."""

RENEWALS = 4
"""Renewals in that time: this many minus one may fail."""

FORGOTTEN = 10
"""Lengths of a lease after whose silence its file is swept away."""

_NAME = re.compile(r"(?P<name>[\w-]+)\.(?P<number>\d{6})\.json")
_log = logging.getLogger(__name__)


class Lease:
    """The right to something with a name, until it is released or not renewed for LEASE_S."""

    def __init__(self, folder: str, name: str, number: int, owner: str) -> None:
        self.folder = folder
        self.name = name
        self.number = number
        self.owner = owner
        self.token = uuid.uuid4().hex
        self.ended = False
        self._lock = Lock()

    @property
    def uri(self) -> str:
        """Its file."""
        return storage.join(self.folder, f"{self.name}.{self.number:06d}.json")

    def renew(self) -> bool:
        """Make it last LEASE_S from now; False when it was lost or released, and then it has ended."""
        with self._lock:
            if not self.ended and self._is_ours():
                storage.write_bytes(self.uri, self.content())
                # A taker who came between the look and the write has a higher number, and stays.
                if all(note.number <= self.number for note in _notes(self.folder, self.name)):
                    return True
                storage.remove(self.uri)
            self.ended = True
            return False

    def release(self) -> None:
        """Give it back; one that cannot be given back expires."""
        with self._lock:
            ended, self.ended = self.ended, True
            try:
                if not ended and self._is_ours():
                    storage.remove(self.uri)
            except UserError as error:
                _log.warning("%s stays until it expires: %s", self.uri, error)

    def content(self) -> bytes:
        """What its file says when it is renewed now."""
        said = {"owner": self.owner, "token": self.token, "expires": time.time() + LEASE_S}
        return json.dumps(said).encode()

    def _is_ours(self) -> bool:
        content = storage.read_bytes_or_none(self.uri)
        return content is not None and _parsed(content, 0.0)[0] == self.token

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release()


def take(folder: str, name: str, owner: str) -> Lease | None:
    """A lease that only one has at a time: the first to ask, and after its expiry the first to take it over.

    A file cannot be replaced on condition that it is still the stale one that was read: of two takers, the slower
    would throw out the faster. So each taker creates, exclusively, the file with the next number, which exists
    once; the highest number stands, and the lower ones are removed after that. Files that vanish start the numbers
    anew, so whoever created one looks again, and yields to another that is alive.
    """
    notes = list(_notes(folder, name))
    if any(note.alive for note in notes):
        return None
    lease = Lease(folder, name, 1 + max((note.number for note in notes), default=0), owner)
    if not storage.create_bytes(lease.uri, lease.content()):
        return None
    others = [note for note in _notes(folder, name) if note.number != lease.number]
    if any(note.alive for note in others):
        lease.release()
        return None
    for note in others:
        storage.remove(note.uri)
    return lease


def share(folder: str, name: str, owner: str) -> Lease:
    """A lease that many may have at a time, each under a name that starts with `name` and a dash."""
    lease = Lease(folder, f"{name}-{uuid.uuid4().hex}", 1, owner)
    storage.write_bytes(lease.uri, lease.content())
    return lease


def living(folder: str, name: str = "") -> set[str]:
    """Names of the leases that are alive: all, or the one with this name."""
    return {note.name for note in _notes(folder, name) if note.alive}


def holder(folder: str, name: str) -> tuple[str, float] | None:
    """Owner and expiry, in seconds since 1970, of the living lease with this name; None when nobody has it."""
    return next(((note.owner, note.expires) for note in _notes(folder, name) if note.alive), None)


def sweep(folder: str) -> None:
    """Remove the files of leases that nobody renewed for long."""
    for file in storage.find_files(folder):
        if file.modified < time.time() - FORGOTTEN * LEASE_S:
            storage.remove(storage.join(folder, file.name))


class Keeper:
    """Renews leases in one daemon thread while their holder trains; at its end it releases those it still has."""

    def __init__(self) -> None:
        self._leases: set[Lease] = set()
        self._lock = Lock()
        self._stop = Event()
        self._thread = Thread(target=self._run, name="crowdray-leases", daemon=True)

    def add(self, lease: Lease) -> None:
        """Renew this lease from now on."""
        with self._lock:
            self._leases.add(lease)

    def discard(self, lease: Lease) -> None:
        """Renew it no more; it stays until it is released or expires."""
        with self._lock:
            self._leases.discard(lease)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        for lease in self._leases:
            lease.release()
        self._leases.clear()

    def _run(self) -> None:
        while not self._stop.wait(LEASE_S / RENEWALS):
            with self._lock:
                kept = list(self._leases)
            for lease in kept:
                self._renew(lease)

    def _renew(self, lease: Lease) -> None:
        try:
            if not lease.renew():
                self.discard(lease)
                _log.info("%s was lost to another, or released", lease.uri)
        except Exception as error:  # the next round tries again, and without one the lease expires
            _log.warning("%s was not renewed: %s", lease.uri, error)


@dataclass(frozen=True)
class _Note:
    """A lease as its file tells of it."""

    uri: str
    name: str
    number: int
    owner: str
    expires: float

    @property
    def alive(self) -> bool:
        return time.time() < self.expires


def _notes(folder: str, name: str = "") -> Iterator[_Note]:
    for file in storage.find_files(folder):
        match = _NAME.fullmatch(file.name)
        if match is None or name not in ("", match["name"]):
            continue
        uri = storage.join(folder, file.name)
        if (content := storage.read_bytes_or_none(uri)) is not None:
            _, owner, expires = _parsed(content, file.modified)
            yield _Note(uri, match["name"], int(match["number"]), owner, expires)


def _parsed(content: bytes, modified: float) -> tuple[str, str, float]:
    """Token, owner and expiry. A file without content is being written, or its writer was killed: it counts from its
    time."""
    try:
        said = json.loads(content)
        return str(said["token"]), str(said["owner"]), float(said["expires"])
    except (ValueError, KeyError, TypeError):
        return "", "", modified + LEASE_S
