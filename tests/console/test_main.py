"""The crowdray command, and the exit status and message of a job by the kind of its error."""

import signal
import sys
from pathlib import Path

import pytest
import torch

from crowdray import __version__
from crowdray.cluster.failures import TrainingStopped
from crowdray.cluster.parallel import WorkStopped
from crowdray.console.main import COMMANDS, EXIT_FAILED, EXIT_USAGE, main, run_job
from crowdray.datasets.validation import InvalidDatasetError
from crowdray.errors import DataError, JobFailed, UserError
from crowdray.pipeline.predict import PredictionError
from crowdray.training.errors import DivergedError
from crowdray.tune.driver import StudyFailed


def run_raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def job(arguments: list[str]) -> None:
        raise error

    monkeypatch.setattr(sys, "path", [*sys.path])
    run_job(job, [])


@pytest.mark.parametrize(
    "error",
    [RuntimeError("x"), NotImplementedError("x"), RecursionError("x"), torch.OutOfMemoryError("x"), ValueError("x")],
    ids=lambda error: type(error).__name__,
)
def test_run_job_on_an_unexpected_error_keeps_the_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(type(error)) as caught:
        run_raising(error, monkeypatch)
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        *((kind("what happened"), EXIT_USAGE) for kind in (UserError, DataError)),
        *(
            (kind("what happened"), EXIT_FAILED)
            for kind in (
                JobFailed, TrainingStopped, StudyFailed, WorkStopped, DivergedError, PredictionError,
                InvalidDatasetError,
            )
        ),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_run_job_on_an_expected_error_prints_one_line_and_exits(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_raising(error, monkeypatch)
    assert exit_.value.code == status
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_run_job_on_a_signal_cleans_up_and_prints_one_line(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[str] = []

    def job(arguments: list[str]) -> None:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:  # as code that cleans up after Ctrl-C
            signal.raise_signal(number)
            ended.append("cleaned up")
            raise

    monkeypatch.setattr(sys, "path", [*sys.path])
    signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP
    with pytest.raises(SystemExit) as exit_:
        run_job(job, [])
    assert exit_.value.code == 128 + number and ended == ["cleaned up"]
    assert capsys.readouterr().err == f"error: terminated by {number.name}; run the same command again to resume\n"
    assert signal.getsignal(number) is signal.SIG_DFL


@pytest.mark.parametrize("name", COMMANDS)
def test_main_passes_the_arguments_to_each_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[list[str]] = []
    monkeypatch.setattr(f"crowdray.console.commands.{name}.main", received.append)
    monkeypatch.setattr(sys, "path", [*sys.path])
    main([name, "--data", "x"])
    assert received == [["--data", "x"]]
    assert (Path(__file__).parents[2] / "jobs" / f"{name}.py").is_file()


def test_main_without_a_command_prints_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    main(["--version"])
    assert capsys.readouterr().out == f"crowdray {__version__}\n"


def test_main_with_an_unknown_command_suggests_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["trian"])
    assert exit_.value.code == EXIT_USAGE
    assert capsys.readouterr().err == "error: unknown command 'trian'; use train\n"
