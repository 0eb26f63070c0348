"""A check of a source, or of what was converted from it: what it leaves, where, and with which status."""

import io
import json
import uuid
from pathlib import Path

import pytest
from PIL import Image

from crowdray import storage
from crowdray.cluster.check import HISTOGRAMS, REPORT, SHEET, check
from crowdray.console.commands import convert
from crowdray.datasets.sources import open_source
from crowdray.datasets.validation import InvalidDatasetError
from crowdray.errors import DataError, UserError

from ..support.builders import make_shanghaitech


@pytest.fixture
def part(tmp_path: Path) -> Path:
    part = make_shanghaitech(tmp_path / "part_B", count=9)
    return make_shanghaitech(part, "test", 2)


def test_a_check_leaves_figures_and_pictures_and_nothing_else(part: Path) -> None:
    (part / "test_data" / "images" / "IMG_2.jpg").write_bytes(b"no image")
    source = open_source("shanghaitech", str(part))
    before = sorted(part.rglob("*"))
    report = f"memory://{uuid.uuid4().hex}"
    sound = check(source, report)
    assert [uri.rpartition("/")[2] for uri in storage.list_files(report)] == sorted([REPORT, SHEET, HISTOGRAMS])
    assert json.loads(storage.read_bytes(storage.join(report, REPORT))) == json.loads(json.dumps(sound.content()))
    for name in (SHEET, HISTOGRAMS):
        Image.open(io.BytesIO(storage.read_bytes(storage.join(report, name)))).load()
    assert sorted(part.rglob("*")) == before
    only = check(source, report, splits=["test"])
    assert list(only.splits) == ["test"] and (only.splits["test"].images, only.splits["test"].unusable) == (1, 1)


def test_the_job_looks_without_converting_and_is_strict_when_asked(
    part: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    dest = tmp_path / "made"
    command = ["shanghaitech", "--source", str(part), "--dest", str(dest), "--check"]
    with pytest.raises(InvalidDatasetError, match="train and test share 2 images"):
        convert.main([*command, "--strict"])
    told = capsys.readouterr().out
    assert "PROBLEM: train and test share 2 images, " in told and "  train/IMG_2 = test/IMG_2\n" in told
    assert not dest.exists()
    report = tmp_path / "outputs" / "check" / "shanghaitech-b"
    assert sorted(path.name for path in report.iterdir()) == sorted([REPORT, SHEET, HISTOGRAMS])
    with pytest.raises(UserError, match=r"--dest is missing.*--check"):
        convert.main(command[:3])
    convert.main([*command[:-1], "--split", "train"])
    assert f"jobs/convert.py crowdray --source {dest} --check" in capsys.readouterr().out
    convert.main(["crowdray", "--source", str(dest), "--check", "--strict", "--report", str(tmp_path / "elsewhere")])
    assert "valid: " in capsys.readouterr().out and (tmp_path / "elsewhere" / SHEET).exists()


def test_nothing_to_check_is_said(part: Path) -> None:
    for path in [*(part / "train_data").rglob("*.*"), *(part / "test_data").rglob("*.*")]:
        path.unlink()
    with pytest.raises(DataError, match="nothing to check; check --source and --split"):
        check(open_source("shanghaitech", str(part)), "memory://nowhere")
