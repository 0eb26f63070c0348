"""A conversion through Ray whose worker is killed: the dataset is that of one process that nobody disturbed."""

import os
import signal
import threading
from pathlib import Path

import pytest

from crowdray import storage
from crowdray.cluster import convert as on_cluster
from crowdray.data import conversion
from crowdray.data.sources import open_source

from .processes import descendants, named

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(400)]


def files(dest: Path) -> dict[str, bytes]:
    return {file.name: (dest / file.name).read_bytes() for file in storage.find_files(str(dest))}


def test_a_killed_worker_costs_time_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(conversion, "ROWS_PER_SHARD", 10)
    monkeypatch.setattr(on_cluster, "WORTH_RAY_S", 0.0)
    source = open_source("synthetic", train=70, test=0, width=320, height=240)
    killed: list[int] = []
    ended = threading.Event()

    def kill_one() -> None:
        while not ended.wait(0.02):
            if workers := named(descendants(os.getpid()), "ray::convert_slice"):
                os.kill(workers[0], signal.SIGKILL)
                killed.append(workers[0])
                return

    hunter = threading.Thread(target=kill_one)
    hunter.start()
    try:
        index = on_cluster.convert(source, str(tmp_path / "cluster"))
    finally:
        ended.set()
        hunter.join()
    assert len(killed) == 1 and "70/70 images" in capsys.readouterr().out
    assert conversion.convert(source, str(tmp_path / "alone")) == index
    assert files(tmp_path / "cluster") == files(tmp_path / "alone")
