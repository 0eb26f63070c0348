"""Training on Ray without starting it: requested resources, failures, upload of checkpoints."""

import errno
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import torch
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from torch._dynamo.exc import BackendCompilerFailed

from crowdray import storage
from crowdray.cluster.failures import TrainingStopped, is_worker_loss, translated_error
from crowdray.cluster.runtime import Resources
from crowdray.cluster.train import run_training, train
from crowdray.cluster.worker import upload
from crowdray.config import NumericsConfig
from crowdray.errors import RESUME_HINT, InfeasibleConfigError, UserError
from crowdray.pipeline.run import Run
from crowdray.stage_cache.session import StageCacheConfig
from crowdray.storage.lock import Lock
from crowdray.training.checkpoint import Checkpoint, Progress, save_checkpoint
from crowdray.training.errors import DivergedError


def test_run_training_with_too_few_cpus_raises(run: Run) -> None:
    with pytest.raises(UserError, match="3 workers need a CPU each, the Ray cluster has 2 CPUs"):
        elastic = replace(run, identity=replace(run.identity, workers=(3, 8)))
        run_training(elastic, Resources(2, 0, False), stage_cache=StageCacheConfig("memory://stages", 0))


def test_train_of_a_run_that_another_process_trains_raises(run: Run) -> None:
    callback = SimpleNamespace(on_status=print, on_history=print)
    with Lock(storage.join(run.uri, "driver"), "", ""), pytest.raises(UserError, match=f"run {run.uri} is in use by"):
        train(run, callback, tracking_uri=None, stage_cache=StageCacheConfig("memory://stages", 0))


def test_run_training_of_a_trial_reserves_a_cpu_per_thread(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Requested(Exception):
        """Raised instead of starting workers."""

    def trainer(*_: object, scaling_config: Any, **__: object) -> None:
        raise Requested(scaling_config.num_cpus_per_worker)

    monkeypatch.setattr("ray.train.torch.TorchTrainer", trainer)
    monkeypatch.setattr("ray.util.queue.Queue", lambda **_: None)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "0" * 56))
    four = run.with_config(replace(run.identity.config, numerics=NumericsConfig(threads=4)))
    stage_cache, resources = StageCacheConfig(str(tmp_path), 0), Resources(8, 0, True)
    with pytest.raises(Requested, match=r"^4"):
        run_training(replace(four, study_file="study.json"), resources, stage_cache=stage_cache)
    with pytest.raises(Requested, match=r"^1"):
        run_training(four, resources, stage_cache=stage_cache)


def test_translated_error_of_workers_that_never_start_says_what_is_missing(run: Run) -> None:
    error = translated_error(ControllerError(WorkerGroupStartupTimeoutError(2)), run)
    assert isinstance(error, TrainingStopped) and "\n" not in str(error) and "add nodes or give fewer" in str(error)


def test_translated_error_of_out_of_memory_is_infeasible_config(run: Run) -> None:
    error = translated_error(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 3 GiB"), run)
    assert isinstance(error, InfeasibleConfigError)
    assert str(error).startswith(f"the run {run.uri} does not fit into memory (CUDA out of memory.); lower")


def test_is_worker_loss_excludes_user_errors_bugs_and_out_of_memory() -> None:
    assert all(map(is_worker_loss, (RuntimeError("connection closed by peer"), ConnectionError(), OSError())))
    assert not any(map(is_worker_loss, (DivergedError("nan"), UserError("bad"), PermissionError(), TypeError())))
    memory = (
        torch.OutOfMemoryError("x"),
        RuntimeError("CUDA error: out of memory"),
        BackendCompilerFailed(len, OSError(), None),
    )
    assert not any(map(is_worker_loss, memory))


def test_translated_error_unwraps_what_ray_wraps(run: Run) -> None:
    diverged = DivergedError("joint stage, epoch 3: density nan")
    assert translated_error(ControllerError(diverged), run) is diverged
    assert translated_error(WorkerGroupError("", {0: RuntimeError("closed"), 1: diverged}), run) is diverged
    lost = translated_error(WorkerGroupError("", {0: RuntimeError("first line\nclosed by peer")}), run)
    assert isinstance(lost, TrainingStopped)
    assert f"(closed by peer); {RESUME_HINT}" in str(lost)
    denied = translated_error(ControllerError(PermissionError("The token has expired.")), run)
    assert isinstance(denied, UserError)
    assert f"{run.uri}: The token has expired.; renew your credentials, then {RESUME_HINT}" in str(denied)
    bug = PermissionError(errno.EACCES, "Permission denied", "/.triton")
    assert translated_error(ControllerError(bug), run) is bug


@pytest.mark.parametrize(
    ("fault", "raised", "message"),
    [
        (OSError(errno.EIO, "input/output error"), OSError, "input/output error"),
        (PermissionError("The token has expired."), UserError, "expired.*credentials; then run the same command"),
        (OSError(errno.ENOSPC, "no space"), UserError, "no space left.*; then run the same command again"),
    ],
)
def test_upload_failure_is_a_user_error_or_worth_a_retry(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: OSError, raised: type[Exception], message: str
) -> None:
    def copytree(*_: object) -> None:
        raise fault

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_checkpoint(
        Checkpoint(run.identity.config, Progress(1.0, 1.0, run.identity.data_digest, 2), {"a": torch.zeros(8)}), folder
    )
    monkeypatch.setattr("shutil.copytree", copytree)
    with pytest.raises(raised, match=message):
        upload(run.uri, ray.train.Checkpoint(str(folder)), "checkpoint-00001")
    assert not list(Path(run.uri).glob("*checkpoint*"))
