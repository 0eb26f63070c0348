"""Tables show every figure, and fit a terminal."""

import io
from collections.abc import Callable

import pytest
from rich.console import Console
from rich.table import Table

from crowdray.console.evaluation_tables import show_evaluation
from crowdray.console.study_display import StudyDisplay, trial_table
from crowdray.console.tables import validation_table
from crowdray.datasets.statistics import DatasetStats, image_stats
from crowdray.datasets.validation import validate
from crowdray.evaluation.images import FailedImage
from crowdray.evaluation.report import EvaluatedDataset, make_report
from crowdray.training.state import StepProgress
from crowdray.tune.record import StageCost, StudyRecord, TrialRecord

from ..support.builders import samples
from ..support.evaluations import evaluated_image, evaluated_model, evaluation_report


def shown(show: Callable[[Console], object], width: int = 80) -> str:
    screen = Console(width=width, record=True, file=io.StringIO())
    show(screen)
    return screen.export_text()


def text_of(table: Table, width: int = 80) -> str:
    return shown(lambda screen: screen.print(table), width)


def test_evaluation_tables_show_roi_scenes_and_counters_and_fit_80_columns() -> None:
    # Scene east has a MAE of 2 inside the ROI and 6 without, scene west of 6 and 7; the second counter is 1 better.
    errors = {0: ("west", 6.0, 7.0), **{n: ("east", float(n), n + 4.0) for n in (1, 2, 3)}}
    counters = {
        f"models:/crowdray-mall/{version}": [
            evaluated_image(row, 10, 9 + version + inside, scene=scene, whole=9 + version + whole)
            for row, (scene, inside, whole) in errors.items()
        ]
        for version in (1, 0)
    }
    report = evaluation_report(counters, data="[bold]data[/]")
    narrow, text = (shown(lambda screen: show_evaluation(report, screen), width) for width in (80, 140))
    assert "test of [bold]data[/]" in narrow and "…" not in narrow
    assert max(map(len, narrow.split("crowdray-mall/0 is better")[0].splitlines())) <= 80
    lines = [line.split() for line in text.splitlines()]
    for name, mae in (
        ("crowdray-mall/1 ROI", "3.00"),
        ("crowdray-mall/0 ROI", "2.00"),
        ("west", "6.00"),
        ("west", "5.00"),
    ):
        where = name.split()
        assert any(line[: len(where)] == where and line[len(where) + 2] == mae for line in lines), name
    assert ["whole", "images", "4", "40", "6.25"] in [line[:5] for line in lines]
    assert ["mean", "of", "scenes", "4.00", "6.50"] in lines
    assert ["west", "1", "10", "6.00", "7.00"] in [line[:5] for line in lines]
    assert "crowdray-mall/0 is better than crowdray-mall/1: its MAE differs by -1.000 heads" in text
    assert "medium, 10 to 10 heads: MAE (bias)" in narrow


def test_evaluation_tables_without_an_evaluated_image_list_the_failures() -> None:
    report = evaluation_report({"runs/a/model": [FailedImage(n, f"{n}.jpg", "cut off") for n in range(25)]})
    text = shown(lambda screen: show_evaluation(report, screen))
    assert "no image could be evaluated" in text and "not evaluated by a: 0.jpg: cut off" in text
    assert "5 more, see --json or --csv" in text


def test_matrix_table_has_all_counters_on_all_datasets() -> None:
    data = [EvaluatedDataset("/data", name, "e" * 64, "test", 2, 8) for name in ("mall", "demo")]
    near, far = ([evaluated_image(0, 3, 3 + error), evaluated_image(1, 5, 5 + error)] for error in (0.5, 2.0))
    report = make_report([evaluated_model()], data, {(0, 0): near, (1, 0): far})
    lines = [line.split() for line in shown(lambda screen: show_evaluation(report, screen)).splitlines()]
    assert ["counter", "mall", "test", "demo", "test"] in lines
    assert ["crowdray-mall/1", "0.50", "(0.50)*", "2.00", "(2.00)"] in lines


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
