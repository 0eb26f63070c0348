"""The batch size that a worker process measures."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from crowdray.cluster.batch_size import find_batch_size
from crowdray.console.progress import TrainingDisplay
from crowdray.datasets import conversion
from crowdray.datasets.sources import open_source
from crowdray.pipeline.run import plan_run
from crowdray.presets import preset

pytestmark = pytest.mark.end_to_end


def test_batch_size_auto_divides_by_workers_within_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    source = open_source("synthetic", train=12, test=2, width=96, height=96)
    data, config = str(tmp_path / "data"), preset("debug")
    conversion.convert(source, data)
    run = plan_run(config, data, 2, str(tmp_path / "runs"), None, "debug", auto_batch=True)
    with TrainingDisplay((), Console(file=io.StringIO())) as display:
        batch = find_batch_size(run, display.on_status).identity.config.sampling.batch
    assert batch % 2 == 0 and 2 <= batch <= 12 * config.sampling.crops_per_image
