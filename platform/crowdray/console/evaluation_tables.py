"""Tables of `crowdray evaluate`: errors of each counter, further measures side by side, and comparisons in words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from crowdray.console.columns import Column, fitting_table
from crowdray.console.terminal import one_line, print_message
from crowdray.datasets.statistics import MAX_LISTED
from crowdray.evaluation.metrics import GAME_LEVELS

if TYPE_CHECKING:  # scipy takes a second to import
    from collections.abc import Iterator, Sequence

    from crowdray.evaluation.intervals import Interval
    from crowdray.evaluation.metrics import GridMetrics
    from crowdray.evaluation.report import EvaluatedDataset, EvaluationReport, ModelResult
    from crowdray.evaluation.summary import Evaluation

_STYLE: dict[str, Any] = {
    "box": box.SIMPLE_HEAVY,
    "pad_edge": False,
    "title_justify": "left",
    "caption_justify": "left",
}


def show_evaluation(report: EvaluationReport, console: Console) -> None:
    """Print all counters on each dataset, and the images that could not be evaluated."""
    for dataset in report.datasets:
        results = [result for result in report.results if result.dataset is dataset]
        console.print(errors_table(results, dataset, console))
        measures = measures_table(results, console)
        console.print(measures)
        if hidden := 1 + len(results) - len(measures.columns):
            print_message(console, f"note: {hidden} counters more do not fit into the terminal; see --report or --json")
        for result in results[1:]:
            print_message(console, comparison_sentence(result, results[0]))
        for result in results:
            _show_failures(result, console)
    if len(report.datasets) > 1:
        console.print(matrix_table(report, console))


def matrix_table(report: EvaluationReport, console: Console) -> Table:
    """Return the MAE of each counter on each dataset, and relative to a constant answer."""
    columns = [Column("counter", [one_line(model.label) for model in report.models], 0, "left")]
    for number, dataset in enumerate(report.datasets):
        cells = [_matrix_cell(report.result(model, dataset)) for model in report.models]
        columns.append(Column(one_line(f"{dataset.name} {dataset.split}"), cells, number))
    caption = "MAE, in brackets relative to always answering the mean count of the split. *: trained on this dataset."
    return fitting_table(columns, console, title="all counters on all datasets", caption=caption, **_STYLE)


def _matrix_cell(result: ModelResult) -> str:
    overall, ratio = result.evaluation.overall, result.relative_mae
    if overall is None:
        return "-"
    relative = "" if ratio is None else f" ({ratio:.2f})"
    return f"{overall.mae:.2f}{relative}{'*' if result.trained_here else ' '}"


def errors_table(results: Sequence[ModelResult], dataset: EvaluatedDataset, console: Console) -> Table:
    """Return the errors of each counter: inside the ROI, on whole images, and scene by scene."""
    rows: list[list[Any]] = []
    styles: list[str] = []
    for result in results:
        name = one_line(result.model.label)
        lines = list(_error_rows(result.evaluation))
        rows += [[name if number == 0 else "", *line] for number, line in enumerate(lines)]
        styles += ["bold" if number == 0 else "" for number in range(len(lines))]
    columns = {"counter": 0, "where": 0, "images": 4, "heads": 5, "MAE": 0, "95%": 3, "no ROI": 1, "RMSE": 0, "bias": 2}
    columns |= {"NAE": 4} | {f"GAME{level}": 9 - level for level in GAME_LEVELS if level}
    cells = list(zip(*rows, strict=True))
    if not any(result.evaluation.without_roi for result in results):
        del cells[list(columns).index("no ROI")], columns["no ROI"]
    title = f"{dataset.split} of {dataset.uri}: {dataset.images:,} images, {dataset.heads:,} heads"
    if len(results) == 1:
        del cells[0], columns["counter"]
        title = f"{results[0].model.label} on {title}"
    return fitting_table(
        [
            Column(name, list(values), drop, "left" if name in ("counter", "where") else "right")
            for (name, drop), values in zip(columns.items(), cells, strict=True)
        ],
        console,
        styles=styles,
        title=one_line(title),
        caption="Heads per image, inside the ROI if there is one. RMSE is what crowd-counting tables print as MSE.",
        **_STYLE,
    )


def measures_table(results: Sequence[ModelResult], console: Console) -> Table:
    """Return everything but the errors of counts, a column for each counter."""
    measures = [dict(_measures(result.evaluation)) for result in results]
    names = list(dict.fromkeys(name for column in measures for name in column))
    columns = [Column("measure", names, 0, "left")]
    for number, (result, column) in enumerate(zip(results, measures, strict=True)):
        columns.append(Column(one_line(result.model.label), [column.get(name, "-") for name in names], number))
    return fitting_table(columns, console, **_STYLE)


def comparison_sentence(result: ModelResult, reference: ModelResult) -> str:
    """Say whether a counter is better than the first one."""
    name, first, comparison = result.model.label, reference.model.label, result.comparison
    if comparison is None:
        return f"{name} and {first} have no images in common"
    low, high = comparison.interval.low, comparison.interval.high
    verdict = "better than" if low > 0 else "worse than" if high < 0 else "not distinguishable from"
    blocks = f"; blocks of {result.evaluation.block} images" if result.evaluation.block > 1 else ""
    difference = f"its MAE differs by {-comparison.gain:+.3f} heads (95% {-high:+.3f} to {-low:+.3f}{blocks})"
    return f"{name} is {verdict} {first}: {difference}"


def _error_rows(evaluation: Evaluation) -> Iterator[list[Any]]:
    """Yield the rows of a counter."""
    overall, whole = evaluation.overall, evaluation.without_roi
    empty = [""] * (2 + len(GAME_LEVELS))
    if overall is None:
        yield ["no image could be evaluated", *empty, *[""] * 5]
        return
    interval = evaluation.errors.mae_interval if evaluation.errors else None
    yield ["ROI" if whole else "all", *_metric_cells(overall, whole, interval)]
    if whole is not None:
        yield ["whole images", *_metric_cells(whole)]
    for scene, metrics in evaluation.scenes.items():
        yield [one_line(scene), *_metric_cells(metrics, evaluation.scenes_without_roi.get(scene))]
    if evaluation.scene_mae is not None:
        means = [_mae(evaluation.scene_mae), "", _mae(evaluation.scene_mae_without_roi)]
        yield ["mean of scenes", "", "", *means, *empty]


def _metric_cells(
    metrics: GridMetrics, whole: GridMetrics | None = None, interval: Interval | None = None
) -> list[str]:
    ends = f"{interval.low:.2f} to {interval.high:.2f}" if interval else ""
    mae = [_mae(metrics.mae), ends, _mae(whole.mae if whole else None)]
    errors = [*mae, f"{metrics.rmse:.2f}", f"{metrics.bias:+.2f}", _number(metrics.nae, ".1%")]
    games = [f"{value:.2f}" for level, value in zip(GAME_LEVELS, metrics.game, strict=True) if level]
    return [f"{metrics.images:,}", f"{metrics.heads:,}", *errors, *games]


def _mae(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _measures(evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    """Yield the name and value of each further measure."""
    for level in evaluation.levels:
        low, high = level.heads
        name = f"{level.level}, {low:,} to {high:,} heads: MAE (bias)"
        yield name, f"{level.metrics.mae:.2f} ({level.metrics.bias:+.2f})"
    for scores in evaluation.localisation:
        values = [_number(value, ".1%") for value in (scores.f1, scores.precision, scores.recall)]
        yield f"heads within {scores.radius:g} px: F1 (P, R)", f"{values[0]} ({values[1]}, {values[2]})"
    if quality := evaluation.quality:
        yield "density maps: PSNR, SSIM", f"{quality.psnr:.2f} dB, {quality.ssim:.3f}"
    if calibration := evaluation.calibration:
        line = f"{_number(calibration.slope, '.3f')}, {_number(calibration.intercept, '+.2f')}"
        yield "count on truth: slope, intercept", line
        if calibration.intervals:
            stated = f"{calibration.coverage:.1%} of {calibration.intervals:,}"
            yield "95% intervals with the truth inside", stated
    empty = evaluation.empty
    if empty.images:
        yield f"{empty.images:,} empty images: mean (max)", f"{empty.mean:.2f} ({empty.max:.2f})"


def _number(value: float, form: str) -> str:
    return f"{value:{form}}" if math.isfinite(value) else "-"


def _show_failures(result: ModelResult, console: Console) -> None:
    failed = result.evaluation.failed
    for image in failed[:MAX_LISTED]:
        print_message(console, f"not evaluated by {result.model.label}: {image.name}: {image.error}", "bold red")
    if more := len(failed[MAX_LISTED:]):
        print_message(console, f"not evaluated by {result.model.label}: {more:,} more, see --json or --csv", "bold red")
