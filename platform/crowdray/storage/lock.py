"""An exclusive lock for processes on any machines, on a folder or an object store, taken over when its holder dies.

    <uri>.000001.json      owner, token, process and number of heartbeats; rewritten at each heartbeat
    <uri>.000002.json      the next generation, created by a process that found the first one dead

A holder is dead if its process has ended on this machine, or if its file has not changed for TIMEOUT_S by the clock of
the observer: clocks of different machines are never compared. The lock protects from duplicate work, not from wrong
results: a holder that was suspended for longer than the timeout notices the loss at its next heartbeat.
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
from crowdray.storage.process import machine_id, process_id

TIMEOUT_S = 30.0
"""Seconds without a heartbeat after which a holder is dead."""

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
        self._process = process_id(os.getpid())
        self._generation = self._heartbeats = 0
        self._changed: dict[str, tuple[bytes, float]] = {}
        """Content of each lock file, and when this process first saw it, by its monotonic clock."""
        self._mutex, self._stop = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def uri(self) -> str:
        """The lock file of this holder."""
        return storage.join(self._folder, f"{self._name}.{self._generation:06d}.json")

    def __enter__(self) -> Self:
        """Acquire the lock, after the timeout of a dead holder; raise UserError when a running process has it."""
        first: _LockFile | None = None
        while not self.try_acquire():
            holder = next((file for file in self._files() if not self._is_dead(file)), None)
            if holder is not None and (holder.ended is False or (first and holder.content != first.content)):
                raise UserError(f"{self._resource} is in use by {holder.owner}; {self._fix}")
            if first is None and holder is not None:
                self._on_status(f"waiting up to {TIMEOUT_S:.0f} s: {holder.owner} may still be using {self._resource}")
                first = holder
            time.sleep(TIMEOUT_S / HEARTBEATS / 4)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release()

    def try_acquire(self) -> bool:
        """Acquire the lock if no running process has it, and start its heartbeat.

        A dead holder's file cannot be replaced atomically: of two processes that try, the slower would overwrite the
        faster. So each creates, exclusively, the file of the next generation; the highest generation is valid and
        removes the lower ones. When all files vanish, generations restart at 1, so the creator of a file looks again
        and yields to any other live one.
        """
        files = self._files()
        if not all(map(self._is_dead, files)):
            return False
        self._generation = 1 + max((file.generation for file in files), default=0)
        if not self._create():
            return False
        others = [file for file in self._files() if file.generation != self._generation]
        if not all(map(self._is_dead, others)):
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
        """Make a heartbeat now; False once the lock is lost or released."""
        with self._mutex:
            if self.held and self._is_ours():
                self._heartbeats += 1
                storage.write_bytes(self.uri, self._content())
                # A process that took over between the check and the write has a higher generation, and keeps the lock.
                if all(file.generation <= self._generation for file in self._files()):
                    return True
                storage.remove(self.uri)
            self.held = False
            return False

    def release(self) -> None:
        """Stop the heartbeat and remove the lock file; one that cannot be removed looks like a dead holder's."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        held, self.held = self.held, False
        try:
            if held and self._is_ours():
                storage.remove(self.uri)
        except UserError as error:
            _log.warning("%s was not removed: %s", self.uri, error)

    def _heartbeat(self) -> None:
        while not self._stop.wait(TIMEOUT_S / HEARTBEATS):
            try:
                if not self.renew():
                    _log.warning("the lock %s was lost to another process", self.uri)
                    return
            except Exception as error:  # retried at the next heartbeat
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
        content = {"owner": self.owner, "token": self._token, "process": self._process, "heartbeats": self._heartbeats}
        return json.dumps(content).encode()

    def _is_dead(self, file: "_LockFile") -> bool:
        now = time.monotonic()
        content, since = self._changed.get(file.uri, (b"", now))
        if content != file.content:
            since = now
        self._changed[file.uri] = file.content, since
        return file.ended or now - since >= TIMEOUT_S

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
                files.append(_LockFile.parse(uri, content, int(generation)))
        return files


@dataclass(frozen=True)
class _LockFile:
    """The content of a lock file."""

    uri: str
    generation: int
    content: bytes
    owner: str
    process: str

    @property
    def ended(self) -> bool | None:
        """Whether the holder's process has ended; None for one that this machine does not know."""
        machine, _, pid = self.process.rpartition(" ")[0].rpartition(" ")
        if not pid.isdecimal() or machine != machine_id():
            return None
        return process_id(int(pid)) != self.process

    @classmethod
    def parse(cls, uri: str, content: bytes, generation: int) -> Self:
        """Parse a lock file; a file without content is being written, or its writer died."""
        try:
            fields = parse_json(content)
            return cls(uri, generation, content, str(fields["owner"]), str(fields.get("process", "")))
        except (ValueError, KeyError, TypeError):
            return cls(uri, generation, content, "a process that is starting", "")
