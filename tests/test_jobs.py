"""The jobs' command lines, the folder of a run, and what is told of mistakes and faults; none of it starts Ray."""

import errno
import importlib
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import torch
from rich.console import Console
from torch._dynamo.exc import BackendCompilerFailed

from crowdray import storage
from crowdray.cluster import batch_size
from crowdray.cluster.batch_size import find_batch_size
from crowdray.cluster.convert import convert
from crowdray.cluster.failures import TrainingStopped, is_worker_loss, translated_error
from crowdray.cluster.runtime import Resources, choose_gpu
from crowdray.cluster.train import run_training
from crowdray.cluster.worker import upload
from crowdray.config import Config, ConfigError, Device, NumericsConfig, to_json
from crowdray.console.arguments import load_preset, parse_with_config
from crowdray.console.commands.train import TrainJob
from crowdray.console.progress import TrainingDisplay
from crowdray.datasets.sources import SOURCES, open_source
from crowdray.errors import InfeasibleConfigError, UserError
from crowdray.pipeline.identity import Workers, default_name, open_verified, parse_workers
from crowdray.pipeline.run import RAY_CHECKPOINT_LIST, RESUME_HINT, Run, plan_run
from crowdray.presets import preset
from crowdray.stage_cache.session import StageCacheConfig
from crowdray.training.checkpoint import Checkpoint, Progress, disk_full_as_user_error, save_checkpoint
from crowdray.training.errors import DivergedError

ROOT = Path(__file__).resolve().parents[1]


def job(name: str) -> Callable[[list[str]], None]:
    """The main function of a command."""
    main: Callable[[list[str]], None] = importlib.import_module(f"crowdray.console.commands.{name}").main
    return main


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    dest = str(tmp_path_factory.mktemp("jobs") / "data")
    convert(open_source("synthetic", None, train=6, test=2, width=96, height=64), dest)
    return dest


@pytest.fixture
def run(data: str, tmp_path: Path) -> Run:
    return plan_run(preset("debug"), data, 2, str(tmp_path / "runs"), "run", "debug")


def test_all_problems_of_a_command_are_told_at_once() -> None:
    mistaken = ["--loss.depth", "much", "--stages.joint.epochs=few", "--seed", "-3", "--optimizer.name", "adam"]
    with pytest.raises(ConfigError) as caught:
        job("train")(["--preset", "debug", "--data", "x", *mistaken, "--los.count", "1"])
    told = "\n".join(caught.value.problems)
    for part in ("loss.depth", "'much'", "stages.joint.epochs", "'few'", "seed is -3", "'adam'", "use --loss.count"):
        assert part in told
    assert len(caught.value.problems) == 5


@pytest.mark.parametrize(
    ("name", "arguments", "option"),
    [
        ("tune", ["--preset", "debug", "--data", "d", "--trials", "2", "--vary", "a=[1]", "--vary=b=[2]"], "--vary"),
        ("train", ["--preset", "debug", "--data", "d", "--preset", "demo"], "--preset"),
        ("train", ["--preset", "debug", "--data", "d", "--loss.depth_", "1", "--loss.depth-=2"], "--loss.depth-"),
        ("convert", ["csv", "--source", "x", "--dest", "y", "--label", "a", "--label", "b"], "--label"),
    ],
)
def test_an_option_that_is_given_twice_is_refused_and_none_of_its_values_dropped(
    name: str, arguments: list[str], option: str
) -> None:
    with pytest.raises(UserError, match=rf"^{option} is given twice; give it once, followed by all its values"):
        job(name)(arguments)


def test_a_mistake_is_one_message_and_status_2(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--preset", "dem", "--data", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown preset 'dem'; choose one of demo, ")
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""


def test_a_saved_config_is_a_preset(tmp_path: Path) -> None:
    config = replace(preset("debug"), seed=7)
    place = tmp_path / "config.json"
    place.write_text(to_json(config))
    assert load_preset(str(place)) == config


def test_an_unreachable_server_ends_a_training_before_ray_starts(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=uri):
        job("train")(["--preset", "debug", "--data", data, "--storage", str(tmp_path)])
    assert "Ray" not in capsys.readouterr().out


def test_data_that_is_none_names_the_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"jobs/convert\.py"):
        job("train")(["--preset", "debug", "--data", str(tmp_path)])


def test_options_of_another_source_are_refused(tmp_path: Path) -> None:
    dest = str(tmp_path / "d")
    with pytest.raises(UserError, match="unknown option for mall: --seed, --train; remove it"):
        job("convert")(["mall", "--source", "x", "--dest", dest, "--train", "3", "--seed", "1"])
    with pytest.raises(UserError, match="unknown option for ucf-qnrf: --fold; remove it; its options are --longest"):
        job("convert")(["--fold=3", "--dest", "mall", "ucf-qnrf", "--source", "x"])
    with pytest.raises(UserError, match="'mal'; choose one of synthetic, mall, "):
        job("convert")(["mal", "--dest", dest])


def test_the_help_lists_every_source_and_the_options_of_the_one_named(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["ucf-cc-50", "--help"]):
        with pytest.raises(SystemExit):
            job("convert")(arguments)
        told = capsys.readouterr().out
        assert all(name in told and known.summary in told for name, known in SOURCES.items())
        assert ("--fold" in told) is ("ucf-cc-50" in arguments)


def test_a_full_disk_leaves_nothing_of_a_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shutil.move", full)
    dest = tmp_path / "data"
    with pytest.raises(UserError, match="no space left"):
        job("convert")(["synthetic", "--dest", str(dest), "--train", "2", "--test", "0", "--width", "96"])
    assert list(dest.iterdir()) == []


def test_a_full_disk_under_a_checkpoint_is_the_users_to_mend() -> None:
    with (
        pytest.raises(UserError, match=r"no space left for s3://b/run, or in .*; free some, try again"),
        disk_full_as_user_error("s3://b/run", "try again"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match="refused"), disk_full_as_user_error("s3://b/run", "try again"):
        raise OSError(errno.ECONNREFUSED, "refused")


def test_a_run_belongs_to_what_it_was_started_with(run: Run) -> None:
    run.create_or_verify()
    run.create_or_verify()
    for workers in (1, (1, 4)):
        replace(run, identity=replace(run.identity, workers=workers)).create_or_verify()
    memory = replace(run.identity.config.sampling, cache_gib=0, gpu_cache_gib=1.0)
    run.with_config(replace(run.identity.config, sampling=memory)).create_or_verify()
    written = json.loads(storage.read_bytes(f"{run.uri}/run.json"))
    del written["config"]["optimizer"]["grad_accumulation_steps"]  # as by a version that had no such field
    storage.write_bytes(f"{run.uri}/run.json", json.dumps(written).encode())
    run.create_or_verify()
    accumulating = replace(run.identity.config.optimizer, grad_accumulation_steps=2)
    with pytest.raises(UserError, match=r"optimizer\.grad_accumulation_steps: recorded 1, given 2"):
        run.with_config(replace(run.identity.config, optimizer=accumulating)).create_or_verify()
    other = replace(run.identity.config, seed=5)
    with pytest.raises(UserError, match=r"another --name.*\n  seed: recorded 0, given 5"):
        run.with_config(other).create_or_verify()
    with pytest.raises(UserError, match=r"digest: recorded \w+, given abc"):
        replace(run, identity=replace(run.identity, data_digest="abc")).create_or_verify()
    assert load_preset(f"{run.uri}/config.json") == run.identity.config


def test_a_measured_batch_is_that_of_the_run_ever_after(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned() -> Run:
        return plan_run(preset("debug"), data, 2, str(tmp_path), None, "debug", auto_batch=True)

    measured = iter([12])
    monkeypatch.setattr(batch_size, "measure_on_cluster", lambda run, device: next(measured))
    with TrainingDisplay((), Console(file=io.StringIO())) as display:
        first = find_batch_size(planned(), display.on_status)
        first.create_or_verify()
        again = find_batch_size(planned(), display.on_status)
    again.create_or_verify()
    assert again == first and first.identity.config.sampling.batch == 12
    assert load_preset(f"{first.uri}/config.json") == first.identity.config
    assert plan_run(preset("debug"), data, 2, str(tmp_path), None, "debug").uri != first.uri


def test_a_batch_is_measured_for_one_number_of_workers(run: Run) -> None:
    with TrainingDisplay((), Console()) as display, pytest.raises(UserError, match="--workers is 1:2: give one number"):
        find_batch_size(replace(run, identity=replace(run.identity, workers=(1, 2))), display.on_status)


def test_a_name_is_a_function_of_all_that_is_computed() -> None:
    one, other = to_json(Config()), to_json(Config(seed=1))
    name = default_name("demo", one, "d", 2)
    assert name == default_name("demo", one, "d", 2) and name.startswith("demo-")
    others = [default_name("demo", other, "d", 2), default_name("demo", one, "e", 2), default_name("demo", one, "d", 1)]
    assert len({name, *others, default_name("demo", one, "d", (1, 2))}) == 5
    assert default_name("runs/a/config.json", one, "d", 2).startswith("config-")


@pytest.mark.parametrize("cut", ["", '{"checkpoint_results": [{"chec'])
def test_a_list_of_checkpoints_that_a_kill_cut_off_is_mended(run: Run, cut: str) -> None:
    for epoch in (1, 2, 3):
        folder = Path(run.uri, f"checkpoint-{epoch:05d}")
        folder.mkdir(parents=True)
        progress = Progress(1.0, 1.0, run.identity.data_digest, 2, epochs=epoch)
        save_checkpoint(Checkpoint(run.identity.config, progress, {"a": torch.zeros(8)}), folder)
    torn = Path(run.uri, "checkpoint-00003", "weights.safetensors")
    torn.write_bytes(torn.read_bytes()[:-4])
    listed = Path(run.uri, RAY_CHECKPOINT_LIST)
    listed.write_text(cut)
    half = Path(run.uri, f"{storage.PARTIAL}0-checkpoint-00004", "deep")
    half.mkdir(parents=True)

    assert run.repair() == f"{run.uri}/checkpoint-00002"
    assert not listed.exists() and not half.parent.exists()
    listed.write_text(json.dumps({}))
    assert run.repair() is None and listed.exists()


@pytest.mark.parametrize(
    ("there", "workers", "device", "gpu"),
    [
        (Resources(4, 0, True), 2, "auto", False),
        (Resources(4, 2, True), 2, "auto", True),
        (Resources(4, 2, True), 4, "cpu", False),
        (Resources(4, 1, False), 1, "gpu", True),
    ],
)
def test_workers_take_gpus_where_there_are_enough(there: Resources, workers: int, device: Device, gpu: bool) -> None:
    assert choose_gpu(there, workers, device) is gpu


@pytest.mark.parametrize(
    ("there", "workers", "device", "mend"),
    [
        (Resources(2, 0, True), 3, "auto", "this machine has 2 CPUs and 0 GPUs: give --workers 2"),
        (Resources(2, 0, False), 3, "auto", "the Ray cluster has 2 CPUs and 0 GPUs: give --workers 2, or add nodes"),
        (Resources(8, 1, True), 2, "auto", "give --workers 1, or --device cpu"),
        (Resources(8, 0, True), 1, "gpu", "give --device cpu"),
        (Resources(8, 0, True), 0, "auto", "give at least 1"),
    ],
)
def test_more_workers_than_there_is_room_for(there: Resources, workers: int, device: Device, mend: str) -> None:
    with pytest.raises(UserError, match=mend):
        choose_gpu(there, workers, device)


@pytest.mark.parametrize(("said", "workers"), [(2, 2), ("1:4", (1, 4)), ("3:3", 3)])
def test_workers_are_a_number_or_between_two(said: int | str, workers: Workers) -> None:
    assert parse_workers(said) == workers


@pytest.mark.parametrize("said", ["0:2", "4:1", "a:b", "1:", ":2", "1:2:3", "-1:2", "1 : 2", "two"])
def test_other_numbers_of_workers_are_refused(said: str) -> None:
    with pytest.raises(UserError, match=f"--workers is '{said}'; give a number, or a minimum of at least 1 and a"):
        parse_workers(said)


@pytest.mark.parametrize("workers", ["9", "1:9"])
def test_a_batch_has_a_window_for_each_worker_that_may_come(data: str, tmp_path: Path, workers: str) -> None:
    told = ["--preset", "debug", "--data", data, "--workers", workers, "--storage", str(tmp_path)]
    with pytest.raises(UserError, match="a batch of 4 windows is too small for 9 workers"):
        job("train")(told)
    assert not list(tmp_path.iterdir())


def test_a_cluster_needs_room_for_the_fewest_workers(run: Run) -> None:
    with pytest.raises(UserError, match="3 workers need a CPU each, the Ray cluster has 2 CPUs"):
        elastic = replace(run, identity=replace(run.identity, workers=(3, 8)))
        run_training(elastic, Resources(2, 0, False), stage_cache=StageCacheConfig("memory://stages", 0))


def test_a_memory_that_is_too_small_is_the_users_to_mend(run: Run) -> None:
    told = translated_error(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 3 GiB"), run)
    assert isinstance(told, InfeasibleConfigError)
    assert str(told).startswith(f"the run {run.uri} does not fit into memory (CUDA out of memory.); lower")


def test_workers_of_a_trial_reserve_the_cpus_that_its_place_was_counted_with(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception):
        """Ray has been asked for workers."""

    def trainer(*_: object, scaling_config: Any, **__: object) -> None:
        raise Asked(scaling_config.num_cpus_per_worker)

    monkeypatch.setattr("ray.train.torch.TorchTrainer", trainer)
    monkeypatch.setattr("ray.util.queue.Queue", lambda **_: None)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "0" * 56))
    four = run.with_config(replace(run.identity.config, numerics=NumericsConfig(threads=4)))
    stage_cache, there = StageCacheConfig(str(tmp_path), 0), Resources(8, 0, True)
    with pytest.raises(Asked, match=r"^4"):
        run_training(replace(four, study_file="study.json"), there, stage_cache=stage_cache)
    with pytest.raises(Asked, match=r"^1"):
        run_training(four, there, stage_cache=stage_cache)


def test_only_losses_are_worth_another_start() -> None:
    assert all(map(is_worker_loss, (RuntimeError("connection closed by peer"), ConnectionError(), OSError())))
    assert not any(map(is_worker_loss, (DivergedError("nan"), UserError("bad"), PermissionError(), TypeError())))
    memory = (
        torch.OutOfMemoryError("x"),
        RuntimeError("CUDA error: out of memory"),
        BackendCompilerFailed(len, OSError(), None),
    )
    assert not any(map(is_worker_loss, memory))


def test_what_ray_wraps_reaches_the_user_as_it_was(run: Run) -> None:
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    diverged = DivergedError("joint stage, epoch 3: density nan")
    assert translated_error(ControllerError(diverged), run) is diverged
    assert translated_error(WorkerGroupError("", {0: RuntimeError("closed"), 1: diverged}), run) is diverged
    lost = translated_error(WorkerGroupError("", {0: RuntimeError("first line\nclosed by peer")}), run)
    assert isinstance(lost, TrainingStopped)
    assert f"(closed by peer); {RESUME_HINT}" in str(lost)
    refused = translated_error(ControllerError(PermissionError("The token has expired.")), run)
    assert isinstance(refused, UserError)
    assert f"{run.uri}: The token has expired.; renew your credentials, then {RESUME_HINT}" in str(refused)
    ours = PermissionError(errno.EACCES, "Permission denied", "/.triton")
    assert translated_error(ControllerError(ours), run) is ours


@pytest.mark.parametrize(
    ("fault", "raised", "message"),
    [
        (OSError(errno.EIO, "input/output error"), OSError, "input/output error"),
        (
            PermissionError("The token has expired."),
            UserError,
            "expired.*credentials; then run the same command again",
        ),
        (OSError(errno.ENOSPC, "no space"), UserError, "no space left.*; then run the same command again"),
    ],
)
def test_a_checkpoint_that_is_not_written_is_a_loss_or_the_users_to_mend(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: OSError, raised: type[Exception], message: str
) -> None:
    def copytree(*_: object) -> None:
        raise fault

    made = tmp_path / "made"
    made.mkdir()
    save_checkpoint(
        Checkpoint(run.identity.config, Progress(1.0, 1.0, run.identity.data_digest, 2), {"a": torch.zeros(8)}), made
    )
    monkeypatch.setattr("shutil.copytree", copytree)
    with pytest.raises(raised, match=message):
        upload(run.uri, ray.train.Checkpoint(str(made)), "checkpoint-00001")
    assert not list(Path(run.uri).glob("*checkpoint*"))


def test_a_node_that_sees_another_folder_or_dataset_says_so(run: Run) -> None:
    with pytest.raises(UserError, match=rf"{run.uri} on this node is not the folder.*all nodes share"):
        open_verified(run.identity, run.identity_file)
    run.create_or_verify()
    assert open_verified(run.identity, run.identity_file).digest == run.identity.data_digest
    with pytest.raises(
        UserError, match=rf"{run.identity.data} on this node is {run.identity.data_digest[:12]}, .* with eeeeeeeeeeee; "
    ):
        open_verified(replace(run.identity, data_digest="e" * 64), run.identity_file)


def test_overrides_change_the_preset() -> None:
    given = ["--preset", "debug", "--data", "d", "--sampling.roi", "False", "--optimizer.weight-decay=0"]
    parsed = parse_with_config(TrainJob, given, "train")
    expected = preset("debug")
    assert parsed.config == replace(
        expected,
        sampling=replace(expected.sampling, roi=False),
        optimizer=replace(expected.optimizer, weight_decay=0.0),
    )


def test_options_by_their_previous_names_are_accepted() -> None:
    previous = ["--optimizer.accumulate", "2", "--loss.share=0.5", "--store", "stages", "--store_gib=3"]
    current = ["--optimizer.grad-accumulation-steps", "2", "--loss.gradient-share=0.5"]
    current += ["--stage-cache", "stages", "--stage-cache-gib=3"]
    given = ["--preset", "debug", "--data", "d"]
    assert parse_with_config(TrainJob, given + previous, "train") == parse_with_config(
        TrainJob, given + current, "train"
    )
