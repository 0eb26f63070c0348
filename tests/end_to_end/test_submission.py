"""`ray job submit --working-dir .` on a cluster with only the dependencies installed, whose nodes join and leave."""

import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from ..support.processes import ROOT, Job, alive, descendants, named, until
from .conftest import Workspace
from .test_training import assert_tracked_once, query

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(400)]

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

    def submit(self, job: Sequence[str], tracking_uri: str) -> subprocess.Popen[str]:
        """Submit a job from the working tree."""
        runtime_env = json.dumps({"env_vars": {"MLFLOW_TRACKING_URI": tracking_uri}})
        submit = [RAY, "job", "submit", "--address", self.jobs, "--working-dir", "."]
        submit += ["--runtime-env-json", runtime_env, "--"]
        return subprocess.Popen(
            [*submit, *job], env=self.environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

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


@pytest.fixture(scope="module")
def cluster(workspace: Workspace) -> Iterator[Cluster]:
    """A head and two worker nodes of one CPU each, with the environment that has their token."""
    assert importlib.util.find_spec("aiohttp_cors"), "job submission needs ray[default]: make setup"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    environment = {**workspace.environment, **access, "PATH": path}
    port, jobs = free_port(), free_port()
    cluster = Cluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{jobs}", environment)
    try:
        cluster.start("--head", f"--port={port}", f"--dashboard-port={jobs}")
        until(lambda: listens(jobs), 60, "the head's job server did not start")
        cluster.start()
        cluster.start()
        yield cluster
    finally:
        for node in reversed(cluster.nodes):
            kill(node)
        for folder in cluster.folders:
            shutil.rmtree(folder, ignore_errors=True)


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


def test_submit_train_sends_own_code(workspace: Workspace, cluster: Cluster, tmp_path: Path) -> None:
    job = ["python", "jobs/train.py", "--preset", "debug", "--data", str(workspace.data), "--workers", "2"]
    job += ["--storage", str(tmp_path / "runs"), "--name", "submitted", "--json", str(tmp_path / "out.json")]
    submitted = cluster.submit(job, workspace.environment["MLFLOW_TRACKING_URI"])
    output, _ = submitted.communicate(timeout=300)

    assert submitted.returncode == 0, output
    outcome = json.loads((tmp_path / "out.json").read_text())
    assert outcome["registered"].startswith("models:/crowdray-synthetic/")
    assert outcome["run"] == str(tmp_path / "runs" / "submitted")
    cluster.check_drivers()


def test_submit_tune_survives_loss_of_node(workspace: Workspace, cluster: Cluster, tmp_path: Path) -> None:
    job = ["python", "jobs/tune.py", "--preset", "debug", "--data", str(workspace.data), "--trials", "6"]
    job += ["--storage", str(tmp_path / "runs"), "--name", "submitted-study", "--json", str(tmp_path / "out.json")]
    job += ["--prune", "False", "--vary", "stages.joint.epochs=[6,8]"]
    submitted = cluster.submit(job, workspace.environment["MLFLOW_TRACKING_URI"])
    last = cluster.nodes[-1]
    until(lambda: bool(named(descendants(last.pid), "ray::ImplicitFunc")), 120, "no trial ran on the last node")
    kill(last)
    output, _ = submitted.communicate(timeout=300)

    assert submitted.returncode == 0, output
    trials = json.loads((tmp_path / "out.json").read_text())["record"]["trials"]
    assert [trial["state"] for trial in trials] == ["complete"] * 6
    runs = query(workspace, "select status from runs where name like 'submitted-study/%'")
    assert runs == [("FINISHED",)] * 6
    cluster.check_drivers()


FAST_MONITOR = """
import os, runpy, sys, threading, time

sys.path.insert(1, sys.argv.pop(1))
from crowdray.cluster import train

train.LOOK_S = 1.0

def poll():
    # Ray Train's coordinator polls the cluster every 20 s; this job polls each second.
    import ray
    seen = 0
    while True:
        time.sleep(1)
        if ray.is_initialized():
            try:
                coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
            except ValueError:
                continue
            ray.get(coordinator.get_reserved_resources.remote("", recompute=True))
            before, seen = seen, sum(node["Alive"] for node in ray.nodes())
            if before != seen:
                print(seen, "nodes", flush=True)

threading.Thread(target=poll, daemon=True).start()
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
"""A job whose cluster monitor polls every second instead of every 20 s or 60 s."""


def test_train_elastic_follows_cluster_size(workspace: Workspace, cluster: Cluster, tmp_path: Path) -> None:
    most = len(cluster.running_nodes)
    until(lambda: len(cluster.listed("nodes", "state=ALIVE")) == most, 60, "not all nodes have joined")
    script = tmp_path / "fast_monitor.py"
    script.write_text(FAST_MONITOR)
    arguments = [str(ROOT / "platform"), str(ROOT / "jobs" / "train.py"), "--preset", "debug", "--name", "elastic"]
    arguments += ["--data", str(workspace.data), "--workers", f"1:{most}", "--json", "elastic.json"]
    arguments += ["--stages.decoders.epochs", "12"]  # half a second each: long enough to see a node join
    joining = {"RAY_ADDRESS": cluster.address, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "2"}
    job = Job(str(script), arguments, {**cluster.environment, **joining}, workspace.folder)
    workspace.started.append(job)

    job.wait_for("baseline 1/")
    kill(cluster.running_nodes[-1])
    job.wait_for("continuing with ")
    workers = [pid for node in cluster.running_nodes for pid in named(descendants(node.pid), "ray::RayTrainWorker")]
    for pid in workers:  # so that the run does not end before the node joins
        os.kill(pid, signal.SIGSTOP)
    cluster.start()
    job.wait_for(f"{most} nodes")
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    job.wait_for("continuing with ")
    assert job.end() == 0, job.output

    history = workspace.outcome("elastic")["result"]["history"]
    groups = [(size, [row["epoch"] for row in rows]) for size, rows in groupby(history, lambda row: row["workers"])]
    (_, first), (_, second), (_, third) = groups
    assert [size for size, _ in groups] == [most, most - 1, most]
    assert first + second + third == list(range(1, 17))
    assert_tracked_once(workspace, "elastic", epochs=16)
    workers_tag = query(
        workspace,
        "select t.value from tags t join runs r using (run_uuid) where r.name = ? and t.key = 'crowdray.workers'",
        "elastic",
    )
    assert workers_tag == [(f"{most}, {most - 1} from epoch {second[0]}, {most} from epoch {third[0]}",)]
