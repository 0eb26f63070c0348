"""Tables of an evaluation report: a row for each measure, density level or scene, and a column for each counter."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from crowdray.evaluation.intervals import Interval
from crowdray.evaluation.metrics import GAME_LEVELS, Metrics
from crowdray.evaluation.report import ModelResult
from crowdray.evaluation.summary import Evaluation


@dataclass(frozen=True)
class Cell:
    """A value of one counter."""

    text: str
    note: str = ""
    """Its interval, or a second value."""
    best: bool = False
    """Whether it is the best of several counters."""


@dataclass(frozen=True)
class Row:
    """A row with a cell of each counter."""

    name: str
    note: str
    """Explanation of the name."""
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    """Rows in groups with titles."""

    title: str
    corner: str
    """Title of the column of names."""
    groups: dict[str, list[Row]]
    note: str = ""


@dataclass(frozen=True)
class _Value:
    """A number of an evaluation, its form and what is best."""

    value: float
    form: str = ".2f"
    note: str = ""
    cost: Callable[[float], float] | None = abs
    """Lowest for the best counter; None where counters are not ranked."""


_Measures = Iterator[tuple[str, str, str, _Value]]
"""Group, name, explanation and value of each measure."""


def measure_table(results: Sequence[ModelResult]) -> Table | None:
    """Return all measures of whole splits; None if no image was evaluated."""
    columns = [list(_measures(result.evaluation)) for result in results]
    rows = {(group, name): note for column in columns for group, name, note, _ in column}
    values = [{(group, name): value for group, name, _, value in column} for column in columns]
    groups: dict[str, list[Row]] = {}
    for (group, name), note in rows.items():
        cells = _cells([column.get((group, name)) for column in values])
        groups.setdefault(group, []).append(Row(name, note, cells))
    if not groups:
        return None
    blocks = {result.evaluation.block for result in results} - {1}
    note = "Heads per image unless a unit is given. Intervals are 95% bootstrap intervals over images"
    note += f", resampled in blocks of {blocks.pop()} consecutive images." if blocks else "."
    if len(results) > 1:
        note += " A star marks the best value, not a proven difference."
    return Table("Errors", "measure", groups, note)


def level_table(results: Sequence[ModelResult]) -> Table | None:
    """Return the errors by density level; None if no image was evaluated."""
    levels = [{(row.level, row.heads): row.metrics for row in result.evaluation.levels} for result in results]
    rows = []
    for level, (low, high) in dict.fromkeys(key for column in levels for key in column):
        cells = _cells([_mae(column.get((level, (low, high)))) for column in levels])
        rows.append(Row(level, _plural(low, "head") if low == high else f"{low:,} to {high:,} heads", cells))
    note = "MAE, with the bias below it. A level is a third of the images, ordered by their annotated heads."
    return Table("By density level", "level", {"": rows}, note) if rows else None


def scene_table(results: Sequence[ModelResult]) -> Table | None:
    """Return the errors by scene; None if there are no scenes."""
    scenes = [result.evaluation.scenes for result in results]
    rows = []
    for name in dict.fromkeys(scene for column in scenes for scene in column):
        images = next(column[name].images for column in scenes if name in column)
        cells = _cells([_mae(column.get(name)) for column in scenes])
        rows.append(Row(name, _plural(images, "image"), cells))
    if not rows:
        return None
    means = [result.evaluation.scene_mae for result in results]
    rows.append(Row("mean of scenes", "unweighted", _cells([None if m is None else _Value(m) for m in means])))
    return Table("By scene", "scene", {"": rows}, "MAE, with the bias below it.")


def _measures(evaluation: Evaluation) -> _Measures:
    overall, errors = evaluation.overall, evaluation.errors
    if overall is None or errors is None:
        return
    group = "Counts" if evaluation.without_roi is None else "Counts in the region of interest"
    yield group, "images", "evaluated", _Value(overall.images, ",", cost=None)
    yield group, "heads", "annotated", _Value(overall.heads, ",", cost=None)
    yield group, "MAE", "mean absolute error", _Value(overall.mae, note=_ends(errors.mae_interval))
    yield (
        group,
        "RMSE",
        "root of the mean squared error; tables in papers print it as MSE",
        _Value(overall.rmse, note=_ends(errors.rmse_interval)),
    )
    yield (
        group,
        "bias",
        "mean of predicted minus annotated",
        _Value(overall.bias, "+.2f", note=_ends(errors.bias_interval, "+.2f")),
    )
    yield group, "NAE", "absolute error over annotated heads, images with heads", _Value(overall.nae, ".1%")
    for level, value in zip(GAME_LEVELS, overall.game, strict=True):
        if level:
            yield group, f"GAME({level})", f"error summed over {4**level} parts of the image", _Value(value)
    if evaluation.without_roi is not None:
        yield "Counts in whole images", "MAE", "mean absolute error", _Value(evaluation.without_roi.mae)
        yield "Counts in whole images", "bias", "predicted minus annotated", _Value(evaluation.without_roi.bias, "+.2f")
    if evaluation.empty.images:
        note = f"mean count on {_plural(evaluation.empty.images, 'image')} without heads"
        largest = f"at most {evaluation.empty.max:.2f}"
        yield group, "false count", note, _Value(evaluation.empty.mean, note=largest)
    for scores in evaluation.localisation:
        title, note = "Located heads", f"within {scores.radius:g} pixels of an annotated head, one to one"
        parts = f"precision {_percent(scores.precision)}, recall {_percent(scores.recall)}"
        yield title, f"F1, {scores.radius:g} px", note, _Value(scores.f1, ".1%", parts, cost=_negative)
    if quality := evaluation.quality:
        title = "Density maps"
        yield title, "PSNR", "peak signal-to-noise ratio, dB", _Value(quality.psnr, cost=_negative)
        yield title, "SSIM", "structural similarity, at most 1", _Value(quality.ssim, ".3f", cost=_negative)
    if calibration := evaluation.calibration:
        yield (
            "Calibration",
            "slope",
            "of predicted on annotated heads; 1 is ideal",
            _Value(calibration.slope, ".3f", cost=lambda slope: abs(slope - 1)),
        )
        yield (
            "Calibration",
            "intercept",
            "predicted heads where none are; 0 is ideal",
            _Value(calibration.intercept, "+.2f"),
        )
        if calibration.intervals:
            note = "images whose annotated count lies in the counter's 95% interval"
            stated = f"of {calibration.intervals:,}"
            yield (
                "Calibration",
                "coverage",
                note,
                _Value(calibration.coverage, ".1%", stated, cost=lambda coverage: abs(coverage - 0.95)),
            )


def _plural(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"


def _percent(value: float) -> str:
    return f"{value:.1%}" if math.isfinite(value) else "-"


def _negative(value: float) -> float:
    return -value


def _mae(metrics: Metrics | None) -> _Value | None:
    return None if metrics is None else _Value(metrics.mae, note=f"bias {metrics.bias:+.2f}")


def _ends(interval: Interval, form: str = ".2f") -> str:
    return f"{interval.low:{form}} to {interval.high:{form}}"


def _cells(values: Sequence[_Value | None]) -> list[Cell]:
    """Return a cell of each counter; the best is marked if several have a value and these differ."""
    known = [value for value in values if value is not None and math.isfinite(value.value) and value.cost]
    costs = [value.cost(value.value) for value in known if value.cost]
    best = min(costs) if len(set(costs)) > 1 else None
    cells = []
    for value in values:
        if value is None or not math.isfinite(value.value):
            cells.append(Cell("-"))
        else:
            is_best = best is not None and value.cost is not None and value.cost(value.value) == best
            cells.append(Cell(f"{value.value:{value.form}}", value.note, is_best))
    return cells
