"""Progress messages of a conversion, and workers that cannot reach its files; no test starts Ray."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from crowdray.cluster.convert import check_reachable, convert
from crowdray.console.progress import image_progress
from crowdray.console.tables import show_dataset
from crowdray.datasets import conversion
from crowdray.datasets.resume import SliceResult
from crowdray.datasets.sources import open_source
from crowdray.datasets.statistics import DatasetStats
from crowdray.errors import UserError

from ..support.builders import jpeg, make_shanghaitech


def test_convert_interrupted_reports_how_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(conversion, "ROWS_PER_SHARD", 2)
    part, dest = make_shanghaitech(tmp_path / "part_B", count=8), str(tmp_path / "made")
    (part / "train_data" / "images" / "IMG_2.jpg").write_bytes(jpeg(2)[:200])
    source = open_source("shanghaitech", str(part))
    add = conversion.Conversion.add

    def interrupt(self: Any, result: SliceResult) -> None:
        add(self, result)
        if result.number == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion.Conversion, "add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(source, dest)
    output = capsys.readouterr().out
    assert f"2 of 4 slices are finished and kept in {dest}; run the same command again to resume" in output

    index = convert(source, dest, progress=image_progress)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "resuming after 2 of 4 slices"
    assert lines[-1].startswith("8/8 images, ") and lines[-1].endswith(" per second")

    shown = io.StringIO()
    show_dataset(index, dest, Console(file=shown, width=140))
    assert "note: 1 item left out as unusable, see quarantine.json" in shown.getvalue()
    assert "left out: train/IMG_2: " in shown.getvalue()


def test_check_reachable_file_missing_for_a_worker_only_raises(tmp_path: Path) -> None:
    path = tmp_path / "IMG_1.jpg"
    check_reachable(SliceResult(0, stats=DatasetStats(missing=[str(path)])))
    path.write_bytes(b"")
    with pytest.raises(
        UserError, match=rf"a worker cannot find {path}, which exists for this process: with several nodes"
    ):
        check_reachable(SliceResult(0, stats=DatasetStats(missing=[str(path)])))
