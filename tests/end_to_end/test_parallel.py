"""What is spread over the CPUs of a cluster is what one process that nobody disturbed does."""

import os
import signal
import threading
from pathlib import Path

import pytest

from crowdray import storage
from crowdray.cluster import parallel
from crowdray.cluster.check import check
from crowdray.cluster.convert import convert
from crowdray.datasets import conversion
from crowdray.datasets.sources import open_source

from ..support.processes import descendants, named

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(400)]


@pytest.fixture(autouse=True)
def spreading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "WORTH_RAY_S", 0.0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def files(dest: Path) -> dict[str, bytes]:
    return {file.name: (dest / file.name).read_bytes() for file in storage.find_files(str(dest))}


def test_a_killed_worker_costs_a_conversion_time_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(conversion, "ROWS_PER_SHARD", 10)
    source = open_source("synthetic", train=70, test=0, width=320, height=240)
    killed: list[int] = []
    ended = threading.Event()

    def kill_one() -> None:
        while not ended.wait(0.02):
            if workers := named(descendants(os.getpid()), "ray::slice"):
                os.kill(workers[0], signal.SIGKILL)
                killed.append(workers[0])
                return

    hunter = threading.Thread(target=kill_one)
    hunter.start()
    try:
        index = convert(source, str(tmp_path / "cluster"))
    finally:
        ended.set()
        hunter.join()
    assert len(killed) == 1 and "70/70 images" in capsys.readouterr().out
    assert conversion.convert(source, str(tmp_path / "alone")) == index
    assert files(tmp_path / "cluster") == files(tmp_path / "alone")


def test_a_check_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source("synthetic", train=130, test=2, width=96, height=64)
    there = check(source, str(tmp_path / "there")).content()
    monkeypatch.setattr(parallel, "WORTH_RAY_S", float("inf"))
    assert check(source, str(tmp_path / "here")).content() == there
