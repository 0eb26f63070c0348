"""A Ray cluster of several nodes on this machine, for jobs under test."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .processes import ROOT, Job, alive, descendants

RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster with several nodes on this machine; each node has its own temporary folder."""

    address: str
    """Address that nodes and drivers connect to."""
    jobs: str
    """Address of the job server."""
    environment: Mapping[str, str]
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)

    @property
    def running_nodes(self) -> list[subprocess.Popen[bytes]]:
        """Node processes that run."""
        return [node for node in self.nodes if node.poll() is None]

    def start(self, *role: str) -> None:
        """Start a node of one CPU."""
        self.folders.append(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # socket paths must stay short
        options = [f"--temp-dir={self.folders[-1]}", f"--dashboard-agent-listen-port={free_port()}", "--num-cpus=1"]
        command = [RAY, "start", "--block", "--node-ip-address=127.0.0.1", *(role or [f"--address={self.address}"])]
        silent = subprocess.DEVNULL
        self.nodes.append(subprocess.Popen([*command, *options], env=self.environment, stdout=silent, stderr=silent))

    def submit(self, script: str, arguments: Sequence[str], tracking_uri: str) -> Job:
        """Submit a script of jobs/ from the working tree."""
        runtime_env = json.dumps({"env_vars": {"MLFLOW_TRACKING_URI": tracking_uri}})
        submit = [RAY, "job", "submit", "--address", self.jobs, "--working-dir", "."]
        submit += ["--runtime-env-json", runtime_env, "--", "python", f"jobs/{script}", *arguments]
        return Job(submit, self.environment, ROOT)

    def listed(self, what: str, *filters: str) -> list[dict[str, Any]]:
        """Ray's list of actors or nodes, including dead ones."""
        command = [RAY, "list", what, "--address", self.jobs, "--format", "json", "--detail"]
        for chosen in filters:
            command += ["--filter", chosen]
        listing = subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True, timeout=60)
        content: list[dict[str, Any]] = json.loads(listing.stdout)
        return content

    def check_drivers(self) -> None:
        """The driver's queues live on the head node, so that losing another node costs the driver nothing."""
        (head,) = self.listed("nodes", "is_head_node=True")
        queues = self.listed("actors", "class_name=_QueueActor")
        assert queues
        assert {queue["node_id"] for queue in queues} == {head["node_id"]}


def kill(node: subprocess.Popen[bytes]) -> None:
    """SIGKILL all processes of a node; a dead node is skipped, because its process id may be reused."""
    if node.poll() is not None:
        return
    for pid in filter(alive, [*descendants(node.pid), node.pid]):
        os.kill(pid, signal.SIGKILL)
    node.wait(timeout=30)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
