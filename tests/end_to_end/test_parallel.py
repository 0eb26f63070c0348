"""Parallel conversion and validation equal a single process."""

import os
import signal
import threading
from pathlib import Path

import pytest

from crowdray import storage
from crowdray.cluster import parallel
from crowdray.cluster.check import check
from crowdray.cluster.convert import convert
from crowdray.console.progress import image_progress
from crowdray.datasets import conversion
from crowdray.datasets.sources import open_source

from ..support.processes import descendants, named

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(400)]


@pytest.fixture(autouse=True)
def always_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "MIN_RAY_S", 0.0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def files(dest: Path) -> dict[str, bytes]:
    return {file.name: (dest / file.name).read_bytes() for file in storage.find_files(str(dest))}


def test_convert_after_killed_worker_equals_single_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(conversion, "ROWS_PER_SHARD", 10)
    source = open_source("synthetic", train=70, test=0, width=320, height=240)
    killed: list[int] = []
    stop = threading.Event()

    def kill_one() -> None:
        while not stop.wait(0.02):
            if workers := named(descendants(os.getpid()), "ray::slice"):
                os.kill(workers[0], signal.SIGKILL)
                killed.append(workers[0])
                return

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        index = convert(source, str(tmp_path / "cluster"), progress=image_progress)
    finally:
        stop.set()
        killer.join()
    assert len(killed) == 1 and "70/70 images" in capsys.readouterr().out
    assert conversion.convert(source, str(tmp_path / "single")) == index
    assert files(tmp_path / "cluster") == files(tmp_path / "single")


def test_check_parallel_equals_single_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source("synthetic", train=130, test=2, width=96, height=64)
    parallel_report = check(source, str(tmp_path / "parallel")).as_dict()
    monkeypatch.setattr(parallel, "MIN_RAY_S", float("inf"))
    assert check(source, str(tmp_path / "single")).as_dict() == parallel_report
