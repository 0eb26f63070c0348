"""`--check` of a source or a converted dataset: the files it writes, and its exit."""

import io
import json
import uuid
from pathlib import Path

import pytest
from PIL import Image

from crowdray import storage
from crowdray.cluster.check import HISTOGRAMS, SHEET, check
from crowdray.console.commands import convert
from crowdray.datasets.sources import open_source
from crowdray.datasets.validation import REPORT, InvalidDatasetError
from crowdray.errors import DataError, UserError

from ..support.builders import make_shanghaitech


@pytest.fixture
def part(tmp_path: Path) -> Path:
    part = make_shanghaitech(tmp_path / "part_B", count=9)
    return make_shanghaitech(part, "test", 2)


def test_check_writes_its_report_and_nothing_else(part: Path) -> None:
    (part / "test_data" / "images" / "IMG_2.jpg").write_bytes(b"no image")
    source = open_source("shanghaitech", str(part))
    before = sorted(part.rglob("*"))
    report = f"memory://{uuid.uuid4().hex}"
    result = check(source, report)
    assert [uri.rpartition("/")[2] for uri in storage.list_files(report)] == sorted([REPORT, SHEET, HISTOGRAMS])
    assert json.loads(storage.read_bytes(storage.join(report, REPORT))) == json.loads(json.dumps(result.as_dict()))
    for name in (SHEET, HISTOGRAMS):
        Image.open(io.BytesIO(storage.read_bytes(storage.join(report, name)))).load()
    assert sorted(part.rglob("*")) == before
    only = check(source, report, splits=["test"])
    assert list(only.splits) == ["test"] and (only.splits["test"].images, only.splits["test"].unusable) == (1, 1)


def test_check_job_converts_nothing_and_fails_if_strict(
    part: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    dest = tmp_path / "made"
    command = ["shanghaitech", "--source", str(part), "--dest", str(dest), "--check"]
    with pytest.raises(InvalidDatasetError, match="train and test share 2 images"):
        convert.main([*command, "--strict"])
    output = capsys.readouterr().out
    assert "PROBLEM: train and test share 2 images, " in output and "  train/IMG_2 = test/IMG_2\n" in output
    assert not dest.exists()
    report = tmp_path / "outputs" / "check" / "shanghaitech-b"
    assert sorted(path.name for path in report.iterdir()) == sorted([REPORT, SHEET, HISTOGRAMS])
    with pytest.raises(UserError, match=r"--dest is missing.*--check"):
        convert.main(command[:3])
    convert.main([*command[:-1], "--split", "train"])
    assert f" convert crowdray --source {dest} --check" in capsys.readouterr().out
    convert.main(["crowdray", "--source", str(dest), "--check", "--strict", "--report", str(tmp_path / "elsewhere")])
    assert "valid: " in capsys.readouterr().out and (tmp_path / "elsewhere" / SHEET).exists()


def test_check_of_no_items_raises(tmp_path: Path) -> None:
    (tmp_path / "train.txt").touch()
    with pytest.raises(DataError, match="nothing to check; check --source and --split"):
        check(open_source("nwpu", str(tmp_path)), "memory://nowhere")
