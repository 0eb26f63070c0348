"""Tables show every figure, and fit a terminal."""

import io

from rich.console import Console
from rich.table import Table

from crowdray.console.tables import evaluation_table, validation_table
from crowdray.datasets.statistics import DatasetStats, image_stats
from crowdray.datasets.validation import validate
from crowdray.evaluation.report import EvaluatedImage, RegionCount, summarise_images

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
