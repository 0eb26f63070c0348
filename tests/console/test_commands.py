"""Commands: usage errors, and results that agree with the functions they call."""

import csv
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crowdray.console.commands import convert, evaluate, predict, promote, train
from crowdray.console.main import run_job
from crowdray.data.decoding import decode_image
from crowdray.data.shards import Dataset
from crowdray.datasets.sources import SOURCES
from crowdray.errors import UserError
from crowdray.evaluation.images import evaluate_images
from crowdray.evaluation.summary import summarise_images
from crowdray.models.export import ExportedCounter
from crowdray.registry.packaging import package_counter

from ..support.builders import samples, write_dataset
from ..support.counters import exported_counter, photo

ROOT = Path(__file__).resolve().parents[2]


def test_train_script_with_an_unknown_preset_prints_one_line_and_exits_with_2(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--preset", "dem", "--data", "x"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: unknown preset 'dem'; choose one of demo, ")
    assert len(result.stderr.splitlines()) == 1 and result.stdout == ""


def test_train_with_an_unreachable_server_fails_before_ray_starts(
    discs: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=uri):
        train.main(["--preset", "debug", "--data", discs.uri, "--storage", str(tmp_path)])
    assert "Ray" not in capsys.readouterr().out


def test_train_without_a_dataset_names_the_convert_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"jobs/convert\.py"):
        train.main(["--preset", "debug", "--data", str(tmp_path)])


@pytest.mark.parametrize("workers", ["9", "1:9"])
def test_train_with_more_workers_than_windows_fails_and_writes_nothing(
    discs: Dataset, tmp_path: Path, workers: str
) -> None:
    arguments = ["--preset", "debug", "--data", discs.uri, "--workers", workers, "--storage", str(tmp_path)]
    with pytest.raises(UserError, match="a batch of 4 windows is too small for 9 workers"):
        train.main(arguments)
    assert not list(tmp_path.iterdir())


def test_convert_accepts_the_options_of_its_source_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere"):
        convert.main(["--fold", "3", "--dest", "mall", "ucf-cc-50", "--source", source])
    with pytest.raises(SystemExit, match="2"):
        convert.main(["mall", "--source", source, "--dest", "d", "--fold", "3"])
    assert "Unrecognized options: --fold" in capsys.readouterr().err
    with pytest.raises(UserError, match="'mal'; choose one of synthetic, mall, "):
        convert.main(["mal", "--dest", "d"])


@pytest.mark.parametrize("arguments", [["--help"], ["ucf-cc-50", "--help"]])
def test_convert_help_lists_every_source_and_the_options_of_one(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        convert.main(arguments)
    text = capsys.readouterr().out
    words = " ".join(text.split())
    assert all(f"{name} {source.summary}" in words for name, source in SOURCES.items())
    assert ("--fold" in text) is ("ucf-cc-50" in arguments)


def test_convert_on_a_full_disk_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shutil.move", full)
    dest = tmp_path / "data"
    with pytest.raises(UserError, match="no space left"):
        convert.main(["synthetic", "--dest", str(dest), "--train", "2", "--test", "0", "--width", "96"])
    assert list(dest.iterdir()) == []


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportedCounter, str]:
    """A counter with downsampling 2, and the folder of its package."""
    counter = exported_counter(downsample=2)
    folder = tmp_path_factory.mktemp("package") / "model"
    package_counter(counter, photo(1, 64, 96), folder, config={}, metrics={}, tags={})
    return counter, str(folder)


def status(main: Callable[[list[str]], None], arguments: list[str]) -> int:
    """Exit status of a job."""
    try:
        run_job(main, arguments)
    except SystemExit as exit_:
        assert isinstance(exit_.code, int)
        return exit_.code
    return 0


def test_predict_command_prints_and_writes_the_counts_of_the_model(
    package: tuple[ExportedCounter, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.png", "b.png"):
        pixels = photo(1, 40, 56, seed=len(list(photos.iterdir())))[0].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(photos / name)
    counter, model = package
    main, output = predict.main, tmp_path / "out"
    arguments = ["--model", model, "--input", str(photos), "--output", str(output), "--device", "cpu"]
    arguments += ["--save", "densities,points"]
    assert status(main, arguments) == 0
    printed = capsys.readouterr().out
    for stem in ("a", "b"):
        name = f"{stem}.png"
        image = torch.from_numpy(decode_image((photos / name).read_bytes()).copy()).permute(2, 0, 1)[None]
        with torch.inference_mode():
            density = counter(image)[0, 0].numpy()
        np.testing.assert_allclose(np.load(output / f"{stem}.density.npy"), density, rtol=1e-4, atol=1e-7)
        line = next(line for line in printed.splitlines() if name in line)
        assert f"{density.sum():.2f}" in line
    assert str(output / "counts.csv") in printed

    (photos / "cut.png").write_bytes((photos / "b.png").read_bytes()[:400])
    assert status(main, arguments) == 1
    assert "1 of 3 images could not be counted" in capsys.readouterr().err
    shutil.rmtree(photos)
    assert status(main, arguments) == 2
    assert capsys.readouterr().err.startswith("error: cannot list")


def test_predict_in_a_ray_job_refuses_results_that_ray_would_delete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UserError, match="--output counted is relative"):
        predict.main(["--model", "/model", "--input", "s3://bucket/photos", "--output", "counted"])


def test_evaluate_command_writes_the_metrics_of_evaluation(
    package: tuple[ExportedCounter, str],
    discs: Dataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    counter, model = package
    main, result, table = evaluate.main, tmp_path / "result.json", tmp_path / "images.csv"
    arguments = ["--model", model, "--data", discs.uri, "--split", "test", "--device", "cpu"]
    assert status(main, [*arguments, "--json", str(result), "--csv", str(table)]) == 0
    content = json.loads(result.read_text())
    expected = summarise_images(list(evaluate_images(counter, discs, discs.rows("test").tolist())))
    assert expected.overall is not None
    assert content["digest"] == discs.digest
    assert content["overall"]["images"] == 7
    for name in ("mae", "rmse", "bias", "nae", "game"):
        assert content["overall"][name] == pytest.approx(getattr(expected.overall, name), rel=1e-5)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    predicted = [image["inside"]["predicted"] for image in content["images"]]
    assert [float(row["predicted"]) for row in rows] == pytest.approx(predicted, abs=1e-6)
    assert f"{expected.overall.mae:.2f}" in capsys.readouterr().out
    assert status(main, [*arguments[:-3], "holidays"]) == 2
    assert "has no split 'holidays'; it has" in capsys.readouterr().err
    assert status(main, [*arguments[:-2], "train", "--device", "cpu"]) == 2
    assert "--split has 2 names for 1 datasets" in capsys.readouterr().err


def test_evaluate_command_with_a_damaged_image_lists_it_and_exits_with_1(
    package: tuple[ExportedCounter, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, damaged = samples(2, split="test")
    write_dataset(str(tmp_path), [whole, replace(damaged, image=bytes(damaged.image)[:150])])
    table, report, matrix = (tmp_path / name for name in ("images.csv", "report.html", "matrix.png"))
    options = ["--csv", str(table), "--report", str(report), "--matrix", str(matrix)]
    assert status(evaluate.main, ["--model", package[1], "--data", str(tmp_path), *options]) == 1
    printed = capsys.readouterr()
    assert "1 image could not be evaluated" in report.read_text() and matrix.stat().st_size > 1000
    assert "not evaluated by" in printed.out and "001: " in printed.out
    assert "1 of 2 images could not be evaluated" in printed.err
    first, second = csv.DictReader(table.read_text().splitlines())
    assert first["predicted"] and not first["failure"] and not second["predicted"] and second["failure"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--data is missing"),
        (["--history", "--rollback"], "give one of --history, --rollback and --set-candidate"),
        (["--set-candidate"], "--set-candidate needs a version: --candidate models:/m/VERSION"),
        (["--data", "x", "--margin", "-1"], r"--margin is -1.0; give a number of heads"),
        (["--data", "x", "--max-latency-ratio", "nan"], "--max-latency-ratio is nan; give a number above 0"),
    ],
)
def test_promote_with_options_that_do_not_go_together_raises(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        promote.parse_arguments(["--model", "m", *options])
