"""An ablation through Ray: killed and resumed, each baseline trained once, the test split read once."""

import json
from pathlib import Path

import pytest

from ..support.processes import Job
from .conftest import Workspace

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(400)]


def ablate(workspace: Workspace) -> Job:
    return workspace.start("ablate.py", [*workspace.arguments("ablation"), "--arms", "none,all", "--seeds", "1,2"])


def test_ablation_after_kill_trains_each_baseline_once_and_reads_test_once(workspace: Workspace) -> None:
    job = ablate(workspace)
    job.wait_for("none_cfcn_1_seed1: trained")
    cells = workspace.folder / "runs" / "ablation" / "cells"
    before = (cells / "none_cfcn_1_seed1" / "cell.json").stat().st_mtime_ns
    job.kill()
    assert not (cells.parent / "test-read.json").exists()
    resumed = ablate(workspace)
    assert resumed.end() == 0, resumed.output
    assert (cells / "none_cfcn_1_seed1" / "cell.json").stat().st_mtime_ns == before
    for seed in (1, 2):
        seconds = {baseline_seconds(cells / f"{arm}_cfcn_1_seed{seed}") for arm in ("none", "all")}
        assert len(seconds) == 1, "arms of a seed trained a baseline each"
    (read,) = json.loads((cells.parent / "test-read.json").read_text())["reads"]
    assert sorted(read["cells"]) == sorted(path.name for path in cells.iterdir())


def baseline_seconds(cell: Path) -> tuple[float, ...]:
    """Measured times of the baseline's epochs, which no two training runs have in common."""
    history = json.loads((cell / "state.json").read_text())["history"]
    return tuple(epoch["seconds"] for epoch in history if epoch["stage"] == "baseline")
