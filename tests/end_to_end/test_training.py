"""Training runs through Ray and MLflow: killed processes, lost nodes and new nodes do not change the result."""

import os
import signal
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from crowdray.registry.loading import load_counter
from crowdray.training.checkpoint import MEASURED_METRICS

from ..support.cluster import Cluster, kill
from ..support.processes import ROOT, Job, alive, descendants, named, until
from .conftest import LENGTH, Workspace

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(400)]

EPOCHS = 4 + int(LENGTH[1])


def computed(outcome: dict[str, Any]) -> dict[str, Any]:
    """Return a training result without its timings."""
    result: dict[str, Any] = dict(outcome["result"])
    result["history"] = [{k: v for k, v in row.items() if k not in MEASURED_METRICS} for row in result["history"]]
    return result


def test_train_submitted_registers_loadable_counter(workspace: Workspace, cluster: Cluster, reference_run: Job) -> None:
    outcome = workspace.outcome("reference")
    assert outcome["registered"].startswith("models:/crowdray-synthetic/")
    table = reference_run.output
    for text in ("baseline", "decoders", "joint", "val MAE", "test RMSE", outcome["registered"], "jobs/predict.py"):
        assert text in table
    workspace.assert_tracked_once("reference", EPOCHS)
    cluster.check_drivers()

    registered = load_counter(outcome["registered"], tracking_uri=workspace.tracking_uri)
    image = torch.randint(0, 256, (1, 3, 101, 150), dtype=torch.uint8)
    assert registered(image).shape == (1, 1, 101, 150)
    assert torch.equal(registered(image), load_counter(outcome["model"])(image))
    with Image.open(outcome["figure"]) as figure:
        assert figure.format == "PNG"


def test_train_after_kills_and_a_signal_equals_uninterrupted_run(workspace: Workspace, reference_run: Job) -> None:
    job = workspace.train("interrupted")
    job.wait_for("decoders 2/")
    job.kill()

    resumed = workspace.train("interrupted")
    resumed.wait_for("resuming after epoch ")
    resumed.wait_for("decoders ")
    workers = named(descendants(resumed.pid), "ray::RayTrainWorker")
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    second = workspace.train("interrupted")
    assert second.end() == 2 and f"is in use by process {resumed.pid} " in second.lines[-1], second.output
    below = descendants(resumed.pid)
    os.kill(resumed.pid, signal.SIGTERM)
    assert resumed.end() == 128 + signal.SIGTERM, resumed.output
    assert resumed.lines[-1] == "error: terminated by SIGTERM; run the same command again to resume"
    assert not any(map(alive, below))
    assert workspace.query("select status from runs where name = 'interrupted'") == [("KILLED",)]

    last = workspace.train("interrupted")
    assert last.end() == 0, last.output
    assert computed(workspace.outcome("interrupted")) == computed(workspace.outcome("reference"))
    workspace.assert_tracked_once("interrupted", EPOCHS)


def test_train_finished_run_returns_result_without_ray(workspace: Workspace, reference_run: Job) -> None:
    before = workspace.outcome("reference")
    job = workspace.train("reference")
    assert job.end() == 0, job.output
    assert "is already finished" in job.output and "starting Ray" not in job.output
    assert workspace.outcome("reference") == before | {"alias": None, "decision": None}  # the alias may have moved


def test_train_diverged_fails_once_without_retry(workspace: Workspace) -> None:
    job = workspace.train("diverged", "--loss.gradient_share", "1e300", workers=1)
    assert job.end() == 1
    message = job.lines[-1]
    assert message.startswith("error: joint stage, epoch 4: gradient norm ") and "Lower stages.joint" in message
    assert "Traceback" not in job.output and job.output.count("error:") == 1
    assert workspace.query("select status from runs where name = 'diverged'") == [("FAILED",)]


FAST_MONITOR = """
import os, runpy, sys, threading, time

sys.path.insert(1, sys.argv.pop(1))
from crowdray.cluster import train

train.RESIZE_CHECK_S = 1.0

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
    job = Job([sys.executable, str(script), *arguments], {**cluster.environment, **joining}, workspace.folder)
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
    workspace.assert_tracked_once("elastic", epochs=16)
    workers_tag = workspace.query(
        "select t.value from tags t join runs r using (run_uuid) where r.name = ? and t.key = 'crowdray.workers'",
        "elastic",
    )
    assert workers_tag == [(f"{most}, {most - 1} from epoch {second[0]}, {most} from epoch {third[0]}",)]
