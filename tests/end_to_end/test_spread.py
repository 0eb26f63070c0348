"""A conversion and a check give the same on a cluster's CPUs as in this process."""

from pathlib import Path

import pytest

from crowdray.cluster import spread
from crowdray.cluster.check import check
from crowdray.cluster.convert import convert
from crowdray.data.sources import open_source

pytestmark = pytest.mark.end_to_end


def test_a_cluster_gives_what_this_process_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source("synthetic", train=130, test=2, width=96, height=64)
    monkeypatch.setattr(spread, "WORTH_RAY_S", float("inf"))
    here, looked = convert(source, str(tmp_path / "here")), check(source, str(tmp_path / "looked")).content()
    monkeypatch.setattr(spread, "WORTH_RAY_S", 0.0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert convert(source, str(tmp_path / "there")) == here
    assert check(source, str(tmp_path / "looked-there")).content() == looked
