"""Measured batch sizes are part of the run."""

from dataclasses import replace
from pathlib import Path

import pytest

from crowdray.cluster import batch_size
from crowdray.cluster.batch_size import find_batch_size
from crowdray.console.arguments import load_preset
from crowdray.data.shards import Dataset
from crowdray.errors import UserError
from crowdray.pipeline.run import Run, plan_run
from crowdray.presets import preset


def test_find_batch_size_measures_once_per_run(discs: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def planned() -> Run:
        return plan_run(preset("debug"), discs.uri, 2, str(tmp_path), None, "debug", auto_batch=True)

    measured = iter([12])
    monkeypatch.setattr(batch_size, "measure_on_cluster", lambda run, device, on_status: next(measured))
    messages: list[str] = []
    first = find_batch_size(planned(), messages.append)
    first.create_or_verify()
    again = find_batch_size(planned(), messages.append)
    again.create_or_verify()
    assert again == first and first.identity.config.sampling.batch == 12
    assert load_preset(f"{first.uri}/config.json") == first.identity.config
    assert plan_run(preset("debug"), discs.uri, 2, str(tmp_path), None, "debug").uri != first.uri


def test_find_batch_size_of_an_elastic_run_raises(run: Run) -> None:
    with pytest.raises(UserError, match="--workers is 1:2: give one number"):
        find_batch_size(replace(run, identity=replace(run.identity, workers=(1, 2))), print)
