"""Display of a training run: warnings, time left and numbers of workers."""

import io

import pytest
from rich.console import Console

from crowdray.console.progress import TrainingDisplay
from crowdray.presets import preset
from crowdray.training.checkpoint import EpochMetrics
from crowdray.training.stages import build_stages


@pytest.mark.parametrize(("nae", "bias", "dead"), [(1.0, -8.0, True), (1.0, 8.0, False), (0.9, -8.0, False)])
def test_on_history_with_a_dead_density_map_prints_a_warning(nae: float, bias: float, dead: bool) -> None:
    errors = {"val/mae": 8.0, "val/rmse": 9.0, "val/nae": nae, "val/bias": bias}
    row: EpochMetrics = {"epoch": 1, "stage": "baseline", "images_per_s": 1.0, "seconds": 1.0, **errors}
    output = io.StringIO()
    TrainingDisplay(build_stages(preset("debug")), Console(file=output)).on_history([row])
    assert ("the density map is dead" in output.getvalue()) == dead


def test_on_history_time_left_is_rounded_to_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    stages = build_stages(preset("debug"))
    epoch: EpochMetrics = {"epoch": 1, "stage": "baseline", "images_per_s": 1.0, "loss/density": 1.0, "seconds": 29.95}
    TrainingDisplay(stages, Console(file=io.StringIO())).on_history([epoch])
    assert sum(stage.schedule.epochs for stage in stages) == 5
    assert "0:02:00 left" in capsys.readouterr().out


def test_on_history_reports_each_change_of_workers_once(capsys: pytest.CaptureFixture[str]) -> None:
    row: EpochMetrics = {"stage": "baseline", "images_per_s": 1.0, "loss/density": 1.0, "seconds": 1.0}
    rows: list[EpochMetrics] = [{**row, "epoch": epoch, "workers": n} for epoch, n in enumerate((2, 2, 1, 1, 3), 1)]
    display = TrainingDisplay(build_stages(preset("debug")), Console(file=io.StringIO()))
    for number in range(1, 5):
        display.on_history(rows[:number])
    display.on_history(rows)
    lines = [line.partition("  ")[0] for line in capsys.readouterr().out.splitlines()]
    epochs = [f"baseline {number}/2" for number in range(1, 6)]
    assert lines == [*epochs[:2], "continuing with 1 worker", *epochs[2:4], "continuing with 3 workers", epochs[4]]
