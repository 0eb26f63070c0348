"""An exclusive lock for processes on any machines, on a folder or an object store, that expires when its holder dies.

    <uri>.000001.json      owner, token and expiry; rewritten by the holder's heartbeat
    <uri>.000002.json      the next generation, created by a process that found the first one expired

The lock protects from duplicate work, not from wrong results: a holder that was suspended for longer than the timeout
notices the loss at its next heartbeat. Expiries are wall-clock times, so clocks may differ by up to TIMEOUT_S minus one
heartbeat interval.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from crowdray import storage
from crowdray.documents import parse_json
from crowdray.errors import UserError

TIMEOUT_S = 30.0
"""Seconds after its last heartbeat at which a lock expires."""

HEARTBEATS = 4
"""Heartbeats per timeout: this many minus one may fail in a row."""

_log = logging.getLogger(__name__)


class Lock:
    """The exclusive right to use a resource: a context manager that acquires the lock and keeps it alive.

    Args:
        uri: Path of the lock without the generation suffix; only lock files may start with it.
        resource: What is locked, as used in messages ("the study runs/a").
        fix: What a user may do while another process has the lock ("choose another --name").
        on_status: Receives messages about waiting.
    """

    def __init__(
        self, uri: str, resource: str, fix: str, on_status: Callable[[str], None] = lambda message: None
    ) -> None:
        self.owner = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
        self.held = False
        """Whether this process has the lock, as of the last heartbeat."""
        self._folder, _, self._name = storage.resolve(uri).rpartition("/")
        self._resource, self._fix, self._on_status = resource, fix, on_status
        self._token = uuid.uuid4().hex
        self._generation = 0
        self._mutex, self._stop = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def uri(self) -> str:
        """The lock file of this holder."""
        return storage.join(self._folder, f"{self._name}.{self._generation:06d}.json")

    def __enter__(self) -> Self:
        """Acquire the lock, after the timeout of a dead holder; raise UserError when a running process has it.

        A holder whose expiry advances while this method waits is running.
        """
        first: _LockFile | None = None
        while not self.try_acquire():
            holder = next((file for file in self._files() if file.alive), None)
            if first is None and holder is not None:
                self._on_status(f"waiting up to {TIMEOUT_S:.0f} s: {holder.owner} may still be using {self._resource}")
                first = holder
            elif first is not None and holder is not None and holder != first:
                raise UserError(f"{self._resource} is in use by {holder.owner}; {self._fix}")
            time.sleep(TIMEOUT_S / HEARTBEATS / 4)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release()

    def try_acquire(self) -> bool:
        """Acquire the lock if no running process has it, and start its heartbeat.

        An expired file cannot be replaced atomically: of two processes that try, the slower would overwrite the
        faster. So each creates, exclusively, the file of the next generation; the highest generation is valid and
        removes the lower ones. When all files vanish, generations restart at 1, so the creator of a file looks again
        and yields to any other live one.
        """
        files = self._files()
        if any(file.alive for file in files):
            return False
        self._generation = 1 + max((file.generation for file in files), default=0)
        if not self._create():
            return False
        others = [file for file in self._files() if file.generation != self._generation]
        if any(file.alive for file in others):
            storage.remove(self.uri)
            return False
        for file in others:
            storage.remove(file.uri)
        self.held = True
        self._stop.clear()
        self._thread = threading.Thread(target=self._heartbeat, name="crowdray-lock", daemon=True)
        self._thread.start()
        return True

    def renew(self) -> bool:
        """Extend the lock by TIMEOUT_S now; False once it is lost or released."""
        with self._mutex:
            if self.held and self._is_ours():
                storage.write_bytes(self.uri, self._content())
                # A process that took over between the check and the write has a higher generation, and keeps the lock.
                if all(file.generation <= self._generation for file in self._files()):
                    return True
                storage.remove(self.uri)
            self.held = False
            return False

    def release(self) -> None:
        """Stop the heartbeat and remove the lock file; a file that cannot be removed expires."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        held, self.held = self.held, False
        try:
            if held and self._is_ours():
                storage.remove(self.uri)
        except UserError as error:
            _log.warning("%s stays until it expires: %s", self.uri, error)

    def _heartbeat(self) -> None:
        while not self._stop.wait(TIMEOUT_S / HEARTBEATS):
            try:
                if not self.renew():
                    _log.warning("the lock %s was lost to another process", self.uri)
                    return
            except Exception as error:  # retried at the next heartbeat; without one the lock expires
                _log.warning("%s was not renewed: %s", self.uri, error)

    def _create(self) -> bool:
        try:
            return storage.create_bytes(self.uri, self._content())
        except storage.ExclusiveCreateUnsupportedError as error:
            # The heartbeat still detects that another process has written the same file.
            self._on_status(f"{error}. Until then, do not start a second process on {self._resource}")
            storage.write_bytes(self.uri, self._content())
            return True

    def _content(self) -> bytes:
        content = {"owner": self.owner, "token": self._token, "expires": time.time() + TIMEOUT_S}
        return json.dumps(content).encode()

    def _is_ours(self) -> bool:
        content = storage.read_bytes_or_none(self.uri)
        return content is not None and self._token.encode() in content

    def _files(self) -> list["_LockFile"]:
        """The lock files of all holders, dead ones included."""
        files = []
        for file in storage.find_files(self._folder, depth=1):
            prefix, _, generation = file.name.removesuffix(".json").rpartition(".")
            if prefix != self._name or not generation.isdecimal():
                continue
            uri = storage.join(self._folder, file.name)
            if (content := storage.read_bytes_or_none(uri)) is not None:
                files.append(_LockFile.parse(uri, content, int(generation), file.modified))
        return files


@dataclass(frozen=True)
class _LockFile:
    """The content of a lock file."""

    uri: str
    generation: int
    owner: str
    expires: float

    @property
    def alive(self) -> bool:
        return time.time() < self.expires

    @classmethod
    def parse(cls, uri: str, content: bytes, generation: int, modified: float) -> Self:
        """Parse a lock file; a file without content is being written or its writer died, and expires by its age."""
        try:
            fields = parse_json(content)
            return cls(uri, generation, str(fields["owner"]), float(fields["expires"]))
        except (ValueError, KeyError, TypeError):
            return cls(uri, generation, "a process that is starting", modified + TIMEOUT_S)
