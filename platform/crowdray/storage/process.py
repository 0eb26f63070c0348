"""Identity of processes among all machines and times."""

import os
import socket
from pathlib import Path


def process_id(pid: int) -> str:
    """Identify a running process among those of all machines and times; empty if it has ended, or without /proc."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    started = fields[18]
    return "" if state in "ZX" or not machine_id() else f"{machine_id()} {pid} {started}"


def machine_id() -> str:
    """Identify this start of this machine, and this container's view of its processes; empty without /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
