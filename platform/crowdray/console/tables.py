"""Tables at the end of a job: the results, and where they are stored."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from crowdray import storage
from crowdray.cluster.runtime import deletion_warning
from crowdray.console.arguments import program
from crowdray.console.columns import Column, fitting_table
from crowdray.console.study_display import trial_table
from crowdray.console.terminal import one_line, print_message
from crowdray.console.ui import command as ui_command
from crowdray.datasets.statistics import MAX_LISTED
from crowdray.datasets.validation import QUARANTINE, REPORT, read_quarantine
from crowdray.presets import training_options
from crowdray.registry.pages import is_server

if TYPE_CHECKING:  # a command imports only the packages that it uses: tune, training and matplotlib take seconds
    from collections.abc import Callable, Sequence

    from crowdray.data.shards import Index
    from crowdray.datasets.validation import Distribution, SplitStats, ValidationReport
    from crowdray.evaluation.metrics import Metrics
    from crowdray.pipeline.outcome import Outcome
    from crowdray.pipeline.predict import Prediction
    from crowdray.training.result import TrainingResult
    from crowdray.tune.record import StudyOutcome


def show_dataset(index: Index, dest: str, console: Console) -> None:
    """Print the splits of a converted dataset, notes on its conversion, and the items left out."""
    table = Table(title=one_line(f"{index.name}, depth: {index.depth_teacher}"), title_justify="left")
    table.add_column("split")
    for name in ("images", "heads", "heads per image"):
        table.add_column(name, justify="right")
    for split, total in index.splits.items():
        rows, heads = total["rows"], total["heads"]
        table.add_row(one_line(split), f"{rows:,}", f"{heads:,}", f"{heads / rows:.1f}")
    console.print(table)
    for note in index.notes:
        print_message(console, f"note: {note}")
    left_out = read_quarantine(dest, index.digest)
    for item in left_out[:MAX_LISTED]:
        print_message(console, f"left out: {item}")
    if more := len(left_out[MAX_LISTED:]):
        print_message(console, f"left out: {more} more, see {storage.join(dest, QUARANTINE)}")
    options = training_options(index.name, index.splits.get("train", {"rows": 0})["rows"])
    _print_fields(
        console,
        {
            "dataset": dest,
            "digest": index.digest[:12],
            "check it": f"{program('convert')} crowdray --source {shlex.quote(dest)} --check",
            "train on it": f"{program('train')} {options} --data {shlex.quote(dest)}",
        },
    )


def show_check(report: ValidationReport, folder: str, console: Console, *, strict: bool = False) -> None:
    """Print the statistics and problems of a checked source, and the paths of its figures.

    Raises:
        InvalidDatasetError: `strict` is set and there are problems.
    """
    console.print(validation_table(report))
    for note in report.notes:
        print_message(console, f"note: {note}")
    for problem in report.problems:
        print_message(console, f"PROBLEM: {problem}", "bold red")
    if not report.problems:
        print_message(console, "valid: every image is usable, no two splits share one", "green")
    from crowdray.cluster.check import HISTOGRAMS, SHEET

    names = {"images": SHEET, "histograms": HISTOGRAMS, "statistics": REPORT}
    _print_fields(console, {what: storage.join(storage.resolve(folder), name) for what, name in names.items()})
    if strict:
        report.raise_for_problems()


def validation_table(report: ValidationReport) -> Table:
    """Return a column per split and a row per statistic."""
    title = f"{report.source}, depth: {report.depth_teacher}"
    table = _report_table(title, "Three numbers are minimum / median / maximum.")
    table.add_column("")
    for split in report.splits:
        table.add_column(one_line(split), justify="right", no_wrap=True)
    rows: dict[str, Callable[[SplitStats], str]] = {
        "images": lambda stats: f"{stats.images:,}",
        "unusable": lambda stats: f"{stats.unusable:,}",
        "without heads": lambda stats: f"{stats.empty:,}",
        "grey / CMYK": lambda stats: f"{stats.colours.get('grey', 0):,} / {stats.colours.get('CMYK', 0):,}",
        "height": lambda stats: _min_median_max(stats.heights),
        "width": lambda stats: _min_median_max(stats.widths),
        "heads": lambda stats: f"{stats.heads:,}",
        "per image": lambda stats: _min_median_max(stats.counts),
        "per image, mean": lambda stats: f"{stats.counts.mean:,.1f}" if stats.counts else "-",
        "outside the image": lambda stats: f"{stats.outside:,}",
        "on the same pixel": lambda stats: f"{stats.overlapping:,}",
        "pixels to the nearest, median": lambda stats: f"{stats.spacing.median:.1f}" if stats.spacing else "-",
        "images with region of interest": lambda stats: f"{stats.with_roi:,}",
        "fraction of the pixels": lambda stats: f"{stats.roi:.1%}" if stats.roi is not None else "-",
        "heads outside it": lambda stats: f"{stats.outside_roi:,}",
        "images with depth": lambda stats: f"{stats.with_depth:,}",
        "range": lambda stats: f"{stats.depth[0]:.2f} to {stats.depth[1]:.2f}" if stats.depth else "-",
    }
    for name, cell in rows.items():
        group = name in ("images", "heads", "images with region of interest", "images with depth")
        ends = name in ("width", "pixels to the nearest, median", "heads outside it")
        label = Text(name if group else f"  {name}", style="bold" if group else "")
        table.add_row(label, *(cell(stats) for stats in report.splits.values()), end_section=ends)
    return table


def show_outcome(outcome: Outcome, data: str, console: Console) -> None:
    """Print the stages of a training run on `data`, the registered version, all paths, and how to use the counter."""
    result = outcome.result
    rows = [_stage_row(result, name) for name in dict.fromkeys(str(row["stage"]) for row in result.history)]
    if result.mean_predictor is not None:
        errors = ["", "", *_mae_rmse(result.mean_predictor)]
        rows.append([f"always {result.mean_count:.1f}", "", "the mean of the training images", *errors])
    headers = {"stage": 0, "epochs": 2, "last losses": 3, "val MAE": 0, "val RMSE": 1, "test MAE": 0, "test RMSE": 1}
    columns = [
        Column(header, cells, drop, "left" if header in ("stage", "last losses") else "right")
        for (header, drop), cells in zip(headers.items(), zip(*rows, strict=True), strict=True)
    ]
    title = one_line(f"{outcome.run.rpartition('/')[2]} (* exported)")
    console.print(fitting_table(columns, console, title=title, title_justify="left"))
    version = (outcome.registered or "not registered") + (f" ({outcome.alias})" if outcome.alias else "")
    uri = shlex.quote(outcome.model_uri)
    score = f"{program('evaluate')} --model {uri} --data {shlex.quote(data)} --split test"
    _print_fields(
        console,
        {
            "registered": version,
            **(
                {"candidate": outcome.decision.replace("jobs/promote.py", program("promote"))}
                if outcome.decision
                else {}
            ),
            "overview": outcome.figure,
            "model": outcome.model,
            "run": outcome.run,
        },
    )
    if warning := deletion_warning(outcome.run):  # nothing of it can be used later
        print_message(console, f"note: {warning}")
        return
    _print_fields(
        console,
        {
            **_tracking_fields(outcome),
            **({"score it": score} if result.stages[result.best_stage].test else {}),
            "use it": f"{program('predict')} --model {uri} --input PHOTO --output predictions",
        },
    )


def show_pages(pages: Sequence[str], tracking_uri: str, console: Console) -> None:
    """Print the web pages of runs, and how to serve them if no server does."""
    if len(pages) == 1:
        _print_fields(console, _page_fields(tracking_uri, {"its page": pages[0]}))
    elif pages:
        numbered = {f"page {number}": page for number, page in enumerate(pages, 1)}
        _print_fields(console, _page_fields(tracking_uri, numbered))


def _tracking_fields(outcome: Outcome) -> dict[str, str]:
    """Return where MLflow shows a run, and all others on its dataset."""
    if outcome.tracking_uri is None:
        return {"tracked": "not tracked"}
    if outcome.run_url is None:
        return {"tracked": f"run {outcome.run_id} in {outcome.tracking_uri}"}
    pages = {"its page": outcome.run_url, "all runs": outcome.runs_url or outcome.run_url}
    return _page_fields(outcome.tracking_uri, pages)


def _page_fields(tracking_uri: str, pages: dict[str, str]) -> dict[str, str]:
    return ({} if is_server(tracking_uri) else {"see it": ui_command()}) | pages


def _stage_row(result: TrainingResult, name: str) -> list[str]:
    epochs = [row for row in result.history if row["stage"] == name]
    losses = [
        f"{key.removeprefix('loss/')} {value:.4g}" for key, value in epochs[-1].items() if key.startswith("loss/")
    ]
    stage = result.stages.get(name)
    errors = [*_mae_rmse(stage.validation), *_mae_rmse(stage.test)] if stage else [""] * 4
    mark = "*" if name == result.best_stage else ""
    return [f"{name}{mark}", str(len(epochs)), "\n".join(losses), *errors]


def show_study(outcome: StudyOutcome, data: str, console: Console) -> None:
    """Print the trials of a study on `data`, what prefix caching saved, its figures, and its exported best trial."""
    record = outcome.record
    console.print(trial_table(record, f"{record.name} (* exported)", console))
    _print_fields(
        console,
        {
            "stage cache": f"{record.spent:.0f} worker-seconds spent, {record.saved:.0f} saved: {record.speedup:.2f} "
            "times faster than without it",
            "study": outcome.study,
            "its figures": ", ".join(figure.rpartition("/")[2] for figure in outcome.figures),
            **({"its page": outcome.run_url} if outcome.run_url else {}),
        },
    )
    show_outcome(outcome.outcome, data, console)


def show_prediction(prediction: Prediction, console: Console) -> None:
    """Print the first counts, the totals, what the counter was trained on, and the paths of the results."""
    table = Table(title="heads", title_justify="left")
    table.add_column("image")
    with_interval = any(photo.count_low is not None for photo in prediction.first)
    for name in ("size", "count", *(["95% interval"] * with_interval)):
        table.add_column(name, justify="right")
    for photo in prediction.first:
        ends = "" if photo.count_low is None else f"{photo.count_low:.1f} to {photo.count_high:.1f}"
        cells = [f"{photo.width}x{photo.height}", f"{photo.count:.2f}", *([ends] * with_interval)]
        table.add_row(one_line(photo.image), *cells)
    if (more := prediction.photos - len(prediction.first)) > 0:
        table.add_row(f"and {more:,} more")
    console.print(table)
    if prediction.rendered:
        print_message(
            console, "note: this counter was trained on rendered scenes; do not rely on it for photos", "yellow"
        )
    if example := prediction.unlike_example:
        many = f"photos unlike the training data: {prediction.unlike:,} of {prediction.photos:,}"
        print_message(console, f"warning: {many}: {example.image}: {'; '.join(example.warnings)}", "yellow")
    fields = {
        "total": f"{prediction.heads:,.1f} heads; photos: {prediction.photos:,} counted, {prediction.failed:,} failed",
        "trained on": prediction.trained_on,
        "counts": prediction.table,
        "sheet": prediction.sheet or "",
    }
    _print_fields(console, {name: value for name, value in fields.items() if value})


def _report_table(title: str, caption: str, **options: Any) -> Table:
    style: dict[str, Any] = {"box": box.SIMPLE_HEAVY, "pad_edge": False, "title_justify": "left"} | options
    return Table(title=one_line(title), caption=caption, caption_justify="left", **style)


def _mae_rmse(metrics: Metrics | None) -> list[str]:
    return ["", ""] if metrics is None else [f"{metrics.mae:.2f}", f"{metrics.rmse:.2f}"]


def _min_median_max(values: Distribution | None) -> str:
    if values is None:
        return "-"
    return " / ".join(f"{value:,.10g}" for value in (values.min, values.median, values.max))


def _print_fields(console: Console, values: dict[str, str]) -> None:
    for name, value in values.items():
        print_message(console, f"{name + ':':<13}{value}")
