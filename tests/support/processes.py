"""Jobs started as a user starts them, read line by line, and their child processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Job:
    """A job in a process of its own."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        self.lines: list[str] = []
        self._process = subprocess.Popen(
            command,
            env=dict(environment),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, start: str) -> str:
        """Read up to the first line that starts with `start`; fail when the job ends before."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip("\n"))
            if line.startswith(start):
                return line
        raise AssertionError(f"no line started with {start!r}:\n{self.output}")

    def end(self) -> int:
        """Read the rest; returns the exit status."""
        rest, _ = self._process.communicate(timeout=600)
        self.lines += rest.splitlines()
        return self._process.returncode

    def kill(self) -> None:
        """SIGKILL the job's own process and wait until its children are gone; Ray's idle agents are killed too."""
        below = descendants(self.pid)
        agents = named(below, "ray::DashboardAgent") + named(below, "ray::RuntimeEnvAgent")
        os.kill(self.pid, signal.SIGKILL)
        self._process.wait(timeout=60)
        others = [pid for pid in below if pid not in agents]
        until(lambda: not any(alive(pid) for pid in others), 60, f"some of {others} outlive the job")
        for pid in filter(alive, agents):
            os.kill(pid, signal.SIGKILL)
        self.end()


def job_command(script: str, arguments: Sequence[str]) -> list[str]:
    """The command that runs a script of jobs/ with this interpreter."""
    return [sys.executable, str(ROOT / "jobs" / script), *arguments]


def descendants(pid: int) -> list[int]:
    """Ids of all direct and indirect child processes."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (parent := _parent(entry)) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def named(pids: Sequence[int], name: str) -> list[int]:
    """Ids of the processes whose command line starts with a name."""
    return [pid for pid in pids if _command(pid).startswith(name)]


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition: Callable[[], bool], seconds: float, failure: str) -> None:
    """Wait until a condition holds; fail with a message after some seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, failure
        time.sleep(0.1)


def _parent(entry: Path) -> int | None:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
