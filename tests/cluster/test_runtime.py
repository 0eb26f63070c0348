"""Start of a local Ray, and what a job does with the resources of a cluster."""

import importlib
import os
import shlex
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from crowdray.cluster import runtime
from crowdray.cluster.runtime import Resources, choose_gpu, connect, wait_for_workers
from crowdray.config import Device
from crowdray.errors import JobFailed, UserError

from ..conftest import ODD_FOLDER
from ..support.processes import ROOT


@pytest.mark.parametrize(
    ("resources", "workers", "device", "gpu"),
    [
        (Resources(4, 0, True), 2, "auto", False),
        (Resources(4, 2, True), 2, "auto", True),
        (Resources(4, 2, True), 4, "cpu", False),
        (Resources(4, 1, False), 1, "gpu", True),
    ],
)
def test_choose_gpu_uses_gpus_if_there_are_enough(
    resources: Resources, workers: int, device: Device, gpu: bool
) -> None:
    assert choose_gpu(resources, workers, device) is gpu


@pytest.mark.parametrize(
    ("resources", "workers", "device", "fix"),
    [
        (Resources(2, 0, True), 3, "auto", "this machine has 2 CPUs and 0 GPUs: give --workers 2"),
        (Resources(2, 0, False), 3, "auto", "the Ray cluster has 2 CPUs and 0 GPUs: give --workers 2, or add nodes"),
        (Resources(8, 1, True), 2, "auto", "give --workers 1, or --device cpu"),
        (Resources(8, 0, True), 1, "gpu", "give --device cpu"),
        (Resources(8, 0, True), 0, "auto", "give at least 1"),
    ],
)
def test_choose_gpu_with_too_many_workers_raises_with_the_fix(
    resources: Resources, workers: int, device: Device, fix: str
) -> None:
    with pytest.raises(UserError, match=fix):
        choose_gpu(resources, workers, device)


@pytest.mark.parametrize("folder", ["/usr/bin", f"/home/{ODD_FOLDER}/bin"])
def test_connect_to_a_local_ray_is_private_and_quotes_the_interpreter(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: dict[str, Any] = {}
    monkeypatch.setattr(os, "environ", {key: value for key, value in os.environ.items() if "RAY_" not in key})
    monkeypatch.setattr(sys, "executable", f"{folder}/python")
    monkeypatch.setattr("ray.init", lambda address, **options: started.update(options))
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr("ray.nodes", list)
    monkeypatch.setattr(runtime, "shut_down", lambda: None)
    with connect():
        ray_folder = Path(started["_temp_dir"])
        assert ray_folder.is_dir() and ray_folder.parent.stat().st_mode & 0o077 == 0
        assert len(str(ray_folder)) < 45, "the paths of Ray's sockets may have 107 bytes"
        assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0", "it would listen on all interfaces"
    assert not ray_folder.exists()
    command = started["runtime_env"].get("py_executable", sys.executable)
    assert shlex.split(command) == [f"{folder}/python"]


def test_a_local_ray_that_does_not_start_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_out(address: str, **options: Any) -> None:
        raise Exception("The current node timed out during startup.")  # the class that Ray raises

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", time_out)
    with pytest.raises(
        UserError, match=r"cannot start Ray on this machine: The current node timed out.*run the command"
    ):
        connect().__enter__()


def test_wait_for_workers_says_what_it_waits_for_and_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[object] = []
    group = SimpleNamespace(ready=lambda: "ready")
    module = importlib.import_module("ray.util.placement_group")  # hidden by the function of the same name
    monkeypatch.setattr(module, "placement_group", lambda bundles: group)
    monkeypatch.setattr(module, "remove_placement_group", removed.append)
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr("ray.get", lambda ready: None)
    clock = iter(range(0, 9000, 1800))
    monkeypatch.setattr(runtime, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr("ray.wait", lambda refs, timeout: ([], refs))
    messages: list[str] = []
    needs = "2 workers with 1 CPU and 1 GPU each"
    state = "the cluster has 8 CPU and 2 GPU, free are 1 CPU and 0 GPU"
    with pytest.raises(JobFailed, match=f"{needs} did not start within 60 min: {state}; free some, add nodes"):
        wait_for_workers(Resources(8, 2, False), 2, {"CPU": 1, "GPU": 1}, messages.append)
    assert messages == [f"waiting 1800 s for {needs}: {state}; giving up after 60 min"] and removed == [group]
    monkeypatch.setattr("ray.wait", lambda refs, timeout: (refs, []))
    wait_for_workers(Resources(8, 2, False), 2, {"CPU": 1, "GPU": 0}, messages.append)
    assert len(messages) == 1 and removed == [group, group]


@pytest.mark.slow
def test_working_directory_of_a_submitted_job_contains_no_secrets(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    folder, archive = tmp_path / "checkout", tmp_path / "sent.zip"
    secrets = (".git/config", ".env", "a/prod.env", "a/.env", ".netrc", ".aws/credentials", ".ssh/id_rsa", "key.pem")
    for name in (*secrets, "jobs/train.py", "a/environment.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    shutil.copy(ROOT / ".rayignore", folder)
    create_package(str(folder), archive, include_gitignore=True)
    with zipfile.ZipFile(archive) as sent:
        files = {name for name in sent.namelist() if not name.endswith("/")}
    assert files == {"jobs/train.py", "a/environment.py", ".rayignore"}
