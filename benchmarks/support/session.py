"""Entries of a list as processes, several at a time, until a deadline; how each ends is a line of a results file."""

import json
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

RESULTS_FILE, LOGS = "results.jsonl", "logs"
RESULT_LINE = "result: "
"""Start of the line with an entry's result as JSON; an entry without one has its output as result."""
POLL_S = 0.1
TERMINATION_S = 5.0
"""Seconds between SIGTERM and SIGKILL."""

Status = Literal["done", "failed", "interrupted"]


@dataclass(frozen=True)
class Entry:
    """Something to run in a process of its own."""

    name: str
    kind: str
    """Entries of a kind take about as long."""
    key: str
    """Changes with everything that decides the result."""
    guess_s: float
    """Expected seconds, until one of its kind has finished."""
    command: tuple[str, ...]
    exclusive: bool = False
    """Runs alone, since it measures speed or memory."""


@dataclass(frozen=True)
class Record:
    """How an entry ended: a line of the results file."""

    entry: str
    kind: str
    key: str
    status: Status
    seconds: float
    processes: int
    """Maximum number of entries at the same time."""
    revision: str
    """Git revision of the code."""
    message: str
    """Exit status and last line of output unless it is done: the error, or the progress of a training run."""
    result: dict[str, Any]
    """Empty unless it is done."""


def read_records(path: Path) -> list[Record]:
    """Read a results file; a line that a crash has cut short is skipped."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(Record(**json.loads(line)))
        except json.JSONDecodeError:
            continue
    return records


def append_record(path: Path, record: Record) -> None:
    """Append a line to a results file in one write, and wait until it is on the disk."""
    line = json.dumps(asdict(record)).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        cut_short = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, b"\n" + line if cut_short else line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def end_with_session() -> None:
    """Let an entry's process and its children end with the session that started it, even if that is killed."""

    def wait() -> None:
        os.read(0, 1)  # the session writes nothing: it returns at the end of the pipe
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


class Session:
    """Runs entries until a deadline, except those that already have a result.

    Args:
        entries: What to run, the most important first.
        folder: Folder of the results file and of the entries' logs.
        processes: Maximum number of entries at the same time.
        threads: CPU threads of each of them.
        deadline: When to end, by time.monotonic().
        revision: Git revision of the code.
    """

    def __init__(
        self, entries: Sequence[Entry], folder: Path, *, processes: int, threads: int, deadline: float, revision: str
    ) -> None:
        self.folder, self.processes, self.threads = folder, processes, threads
        self.deadline, self.revision = deadline, revision
        self.waiting = list(entries)
        self.records: list[Record] = []
        self.running: dict[Entry, tuple[subprocess.Popen[bytes], float]] = {}
        """Process of each running entry, and when it was started."""

    def run(self) -> None:
        """Run all entries that fit into the time left; interrupts those that have not ended by the deadline.

        Raises:
            filelock.Timeout: Another session writes to the same folder.
        """
        (self.folder / LOGS).mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock", timeout=0):
            self.records = read_records(self.folder / RESULTS_FILE)
            finished = {record.key for record in self.records if record.status == "done"}
            by_key = {entry.key: entry for entry in reversed(self.waiting)}  # the first of equal ones
            self.waiting = [one for one in self.waiting if by_key[one.key] is one and one.key not in finished]
            try:
                while (self.waiting or self.running) and time.monotonic() < self.deadline:
                    self._start()
                    time.sleep(POLL_S)
                    self._collect()
            finally:
                self._interrupt()
        for entry in self.waiting:
            print(f"left out {entry.name}: the session has ended", flush=True)

    def stop(self) -> None:
        """Let `run` interrupt what is running and return; a signal handler may call it."""
        self.deadline = -math.inf

    def expected_s(self, entry: Entry) -> float:
        """Longest time that an entry of the kind has taken next to as many others, else the guess."""
        alike = [record for record in self.records if record.kind == entry.kind and record.status == "done"]
        return max((one.seconds for one in alike if one.processes == self.processes), default=entry.guess_s)

    def _start(self) -> None:
        while self.waiting and self._can_start(self.waiting[0]):
            entry = self.waiting.pop(0)
            expected_s, left_s = self.expected_s(entry), self.deadline - time.monotonic()
            if expected_s > left_s:
                print(f"left out {entry.name}: it takes about {expected_s:.0f} s, {left_s:.0f} s are left", flush=True)
                continue
            threads = os.cpu_count() if entry.exclusive else self.threads
            with self._log(entry).open("wb") as log:
                process = subprocess.Popen(
                    entry.command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                    start_new_session=True,
                )
            self.running[entry] = process, time.monotonic()

    def _can_start(self, entry: Entry) -> bool:
        exclusive = entry.exclusive or any(other.exclusive for other in self.running)
        return len(self.running) < (1 if exclusive else self.processes)

    def _collect(self) -> None:
        for entry, (process, _) in list(self.running.items()):
            if (exit_status := process.poll()) is not None:
                self._record(entry, "failed" if exit_status else "done")

    def _interrupt(self) -> None:
        self._collect()
        for process, _ in self.running.values():
            os.killpg(process.pid, signal.SIGTERM)
        for entry, (process, _) in list(self.running.items()):
            try:
                process.wait(TERMINATION_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            self._record(entry, "interrupted")

    def _record(self, entry: Entry, status: Status) -> None:
        process, started = self.running.pop(entry)
        assert process.stdin is not None
        process.stdin.close()
        output = self._log(entry).read_text(errors="replace").strip()
        lines = output.splitlines()
        found = [line.removeprefix(RESULT_LINE) for line in lines if line.startswith(RESULT_LINE)]
        result: dict[str, Any] = json.loads(found[-1]) if found else {"output": output}
        last_line = f"exit status {process.returncode}: {lines[-1] if lines else ''}"
        record = Record(
            entry=entry.name,
            kind=entry.kind,
            key=entry.key,
            status=status,
            seconds=time.monotonic() - started,
            processes=self.processes,
            revision=self.revision,
            message="" if status == "done" else last_line,
            result=result if status == "done" else {},
        )
        append_record(self.folder / RESULTS_FILE, record)
        self.records.append(record)
        print(f"{status} {entry.name} after {record.seconds:.0f} s {record.message}".rstrip(), flush=True)

    def _log(self, entry: Entry) -> Path:
        return self.folder / LOGS / f"{entry.name}.log"
