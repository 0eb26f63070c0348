"""Display of a training run: warnings, time left and numbers of workers."""

import io

import pytest
from rich.console import Console

from crowdray.console.columns import Column, fitting_table
from crowdray.console.progress import TrainingDisplay
from crowdray.presets import preset
from crowdray.training.checkpoint import EpochMetrics
from crowdray.training.stages import build_stages
from crowdray.training.state import StepProgress


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


def on_terminal(width: int) -> tuple[TrainingDisplay, Console, io.StringIO]:
    """A display inside a terminal, whose live region is drawn only on request."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=width, height=20, color_system=None)
    return TrainingDisplay(build_stages(preset("debug")), console), console, output


def drawn(display: TrainingDisplay, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(display)
    return console.export_text()


EPOCH: EpochMetrics = {
    "epoch": 1,
    "stage": "baseline",
    "images_per_s": 12.3,
    "seconds": 10.0,
    "loss/density": 0.1968,
    "loss/segmentation": 0.4062,
    "loss/depth": 0.0412,
    "loss/count": 2.2448,
    "val/mae": 8.5,
    "val/rmse": 9.5,
}


@pytest.mark.parametrize("width", [40, 80, 140])
def test_terminal_keeps_a_line_per_epoch_of_whole_columns(width: int) -> None:
    display, _, output = on_terminal(width)
    with pytest.raises(KeyboardInterrupt), display:
        display.on_status("starting Ray")
        display.on_history([EPOCH])
        display.on_history([EPOCH, {**EPOCH, "epoch": 2, "val/mae": 7.5}])
        display.on_step(StepProgress("training", "decoders", 1, 3, 4))
        raise KeyboardInterrupt
    lines = [line.rstrip() for line in output.getvalue().splitlines()]
    assert max(map(len, lines)) <= width + 20  # control sequences of the redrawn line
    for text in ("starting Ray", "stage      epoch  val MAE", "baseline     1/2     8.50", "baseline     2/2     7.50"):
        assert any(line.endswith(text) or f"{text} " in line for line in lines), text
    assert ("density 0.1968 segmentation 0.4062 depth 0.0412 count 2.2448" in output.getvalue()) == (width == 140)
    assert "decoders 1/1" in output.getvalue().rpartition("baseline     2/2")[2]  # left there by the interruption


def test_terminal_shows_step_elapsed_and_remaining_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    display, _, _ = on_terminal(80)
    display.on_status("starting 2 workers")
    clock[0] = 62.0
    assert "starting 2 workers  0:01:02, elapsed 0:01:02" in drawn(display, 80)
    display.on_history([EPOCH])  # 5 epochs of 10 s in all
    clock[0] = 66.0
    display.on_step(StepProgress("training", "baseline", 2, 3, 7))
    line = drawn(display, 80)
    assert "baseline 2/2 " in line and "3/7  elapsed 0:01:06, 0:00:36 left" in line
    display.on_step(StepProgress("validation", "baseline", 2, 3, 4))
    assert "baseline 2/2 validating" in drawn(display, 80)
    display.on_step(StepProgress("evaluation", "joint", 2, 3, 40))
    assert "scoring joint" in drawn(display, 80) and "left" not in drawn(display, 80)


def test_time_left_in_the_first_epoch_leaves_out_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    display, _, _ = on_terminal(80)
    for clock[0], done in ((100.0, 2), (104.0, 4)):  # 2 s for each of 10 steps in 5 epochs
        display.on_step(StepProgress("training", "baseline", 1, done, 10))
    assert "4/10  elapsed 0:01:44, about 0:01:32 left" in drawn(display, 80)


def test_log_of_steps_is_bounded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    display = TrainingDisplay(build_stages(preset("debug")), Console(file=io.StringIO()))
    for second in range(150):
        clock[0] = second
        display.on_step(StepProgress("training", "baseline", 1, second, 200))
    assert capsys.readouterr().out.splitlines() == ["step 60/200 of baseline 1/2", "step 120/200 of baseline 1/2"]
    for done in (1, 2):
        display.on_step(StepProgress("evaluation", "joint", 2, done, 2))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["scoring"]


def test_fitting_table_leaves_out_columns_instead_of_cutting_cells() -> None:
    columns = [Column("name", ["x" * 20]), Column("often", ["y" * 20], 1), Column("rarely", ["z" * 20], 2)]
    for width, kept in ((80, "xyz"), (60, "xy"), (30, "x")):
        console = Console(file=io.StringIO(), width=width, record=True)
        console.print(fitting_table(columns, console, title="a title that is longer than thirty characters"))
        text = console.export_text()
        assert {letter for letter in "xyz" if letter * 20 in text} == set(kept) and "…" not in text
