"""Tables show every figure, and fit a terminal."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from crowdray.console.study_display import StudyDisplay, trial_table
from crowdray.console.tables import evaluation_table, validation_table
from crowdray.datasets.statistics import DatasetStats, image_stats
from crowdray.datasets.validation import validate
from crowdray.evaluation.report import EvaluatedImage, RegionCount, summarise_images
from crowdray.training.state import StepProgress
from crowdray.tune.record import StageCost, StudyRecord, TrialRecord

from ..support.builders import samples


def text_of(table: Table, width: int = 80) -> str:
    screen = Console(width=width, record=True, file=io.StringIO())
    screen.print(table)
    return screen.export_text()


def image(row: int, scene: str, error: float, error_without_roi: float) -> EvaluatedImage:
    inside, whole = (RegionCount(10, 10 + e, (e,) * 4) for e in (error, error_without_roi))
    return EvaluatedImage(row, str(row), scene, 1, inside, whole, True)


def test_evaluation_table_with_roi_and_scenes_shows_all_and_fits_80_columns() -> None:
    # Scene east has a MAE of 2 inside the ROI and 6 without, scene west of 6 and 7.
    images = [image(0, "west", 6.0, 7.0), *(image(n, "east", float(n), n + 4.0) for n in (1, 2, 3))]
    table = evaluation_table(summarise_images(images), "a [bold]model[/] on test")
    narrow, text = text_of(table), text_of(table, width=100)
    assert "a [bold]model[/] on test" in narrow and "…" not in narrow
    lines = [line.split() for line in text.splitlines()]
    for name, mae in (("ROI", "3.00"), ("images", "6.25"), ("east", "2.00"), ("west", "6.00")):
        assert any(line[:1] == [name] and line[3] == mae for line in lines), name
    assert ["mean", "of", "scenes,", "ROI", "4.00"] in lines and ["mean", "of", "scenes,", "images", "6.50"] in lines


def test_validation_table_shows_minimum_median_and_maximum() -> None:
    stats = [image_stats(sample) for sample in samples(5)]
    text = text_of(validation_table(validate("made", "none", DatasetStats(stats))))
    assert ["per", "image", "0", "/", "2", "/", "4"] in [line.split() for line in text.splitlines()]


@pytest.mark.parametrize(("width", "missing"), [(80, {"reused", "saved s", "spent s"}), (140, set())])
def test_trial_table_leaves_out_columns_instead_of_cutting_cells(width: int, missing: set[str]) -> None:
    names = ("loss.segmentation", "loss.depth", "loss.count", "stages.baseline.epochs", "stages.decoders.epochs")
    costs = (StageCost("k", "baseline", 40, 30, 1234.5, 5432.1),)
    trials = (
        TrialRecord(10, "complete", dict.fromkeys(names, 0.123), 17.29, 21.22, {}, costs),
        TrialRecord(11, "running", dict.fromkeys(names, 0.456), None, None, {}, costs),
    )
    screen = Console(width=width, record=True, file=io.StringIO())
    screen.print(trial_table(StudyRecord("study", trials), "study", screen))
    text = screen.export_text()
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    assert all(part in text for part in ("10*", "complete", "17.29", "baseline 40", "best: trial 10"))
    assert {name for name in ("reused", "saved s", "spent s") if name not in text} == missing


def test_study_display_keeps_finished_trials_and_shows_running_ones() -> None:
    output = io.StringIO()
    screen = Console(width=80, force_terminal=True, file=output, color_system=None)
    finished = TrialRecord(0, "complete", {"loss.depth": 0.6}, 17.29, 21.22, {}, ())
    running = TrialRecord(1, "running", {"loss.depth": 0.3}, None, None, {}, (StageCost("k", "joint", 2, 0, 1.0, 0.0),))
    with StudyDisplay(screen) as display:
        display.on_status("searching")
        for _ in range(2):
            display.on_record(StudyRecord("study", (finished, running)))
        drawn = Console(width=80, record=True, file=io.StringIO())
        drawn.print(display)
        display.on_status("evaluating")
        display.on_step(StepProgress("evaluation", "joint", 2, 3, 40))
        assert "joint 2" in drawn.export_text()
    assert output.getvalue().count("trial 0: complete") == 1 and "trial 1:" not in output.getvalue()
