"""An evaluation as one HTML file that needs nothing else: no script, no font, no image from elsewhere."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files

import jinja2

from crowdray.data.shards import Dataset
from crowdray.evaluation.levels import count_groups
from crowdray.evaluation.report import EvaluatedDataset, EvaluationReport, ModelResult
from crowdray.pipeline.evaluate import LoadedModel
from crowdray.pipeline.predict import tiled
from crowdray.pipeline.report_photos import ReportPhoto, choose_rows, group_photos, render_photo
from crowdray.pipeline.report_tables import Table, level_table, measure_table, scene_table
from crowdray.plots import evaluation as charts
from crowdray.plots.svg import THEME, inline_svg

MAX_FAILED = 50
"""Images without an evaluation that are listed."""


@dataclass(frozen=True)
class Chart:
    """A chart with its caption."""

    title: str
    svg: str
    text: str
    """What it shows, also for readers who do not see it."""
    counter: int | None = None
    """Index of the counter that it belongs to; None if it shows all."""


@dataclass(frozen=True)
class Decile:
    """A group of images with similar numbers of heads."""

    heads: str
    images: int
    truth: float
    predicted: list[float]
    """Mean of each counter."""


@dataclass(frozen=True)
class DatasetPage:
    """Everything about one dataset."""

    dataset: EvaluatedDataset
    results: list[ModelResult]
    """One of each counter."""
    sentences: list[str]
    """The result in words."""
    tables: list[Table]
    charts: list[Chart]
    deciles: list[Decile]
    photos: dict[str, list[ReportPhoto]]
    failed: list[tuple[str, str, str]] = field(default_factory=list)
    """Counter, name and reason of images that could not be evaluated."""

    @property
    def evaluated(self) -> int:
        """Images that all counters have counted, at most."""
        return min(len(result.evaluation.images) for result in self.results)


def make_html_report(report: EvaluationReport, models: Sequence[LoadedModel], datasets: Sequence[Dataset]) -> bytes:
    """Return the report as an HTML file.

    Args:
        report: The evaluation.
        models: Its counters, which count the photos of the report again.
        datasets: Its datasets.
    """
    photos = group_photos(len(datasets), len(models))
    densities = [tiled(model.counter, report.tile) for model in models]
    pages = []
    for number, (described, dataset) in enumerate(zip(report.datasets, datasets, strict=True)):
        results = [report.result(model, described) for model in report.models]
        evaluations = [result.evaluation for result in results]
        pages.append(
            DatasetPage(
                dataset=described,
                results=results,
                sentences=list(_sentences(results)),
                tables=[
                    table for table in (measure_table(results), level_table(results), scene_table(results)) if table
                ],
                charts=list(_charts(results, number)),
                deciles=_deciles(results),
                photos={
                    title: [render_photo(dataset, row, evaluations, densities) for row in rows]
                    for title, rows in choose_rows(evaluations, photos).items()
                },
                failed=[
                    (result.model.label, image.name, image.error)
                    for result in results
                    for image in result.evaluation.failed
                ],
            )
        )
    html = _template().render(
        report=report,
        pages=pages,
        matrix=_matrix(report) if len(datasets) > 1 else None,
        colours=[f"var({THEME[charts.COLOURS[n % len(charts.COLOURS)]]})" for n in range(len(models))],
        max_failed=MAX_FAILED,
    )
    return html.encode(errors="backslashreplace")  # file names may have bytes that are not UTF-8


def _template() -> jinja2.Template:
    source = files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)


def _sentences(results: Sequence[ModelResult]) -> Iterator[str]:
    """Say in words how large the errors are, and which counter is better."""
    for result in results:
        overall, errors = result.evaluation.overall, result.evaluation.errors
        if overall is None or errors is None:
            yield f"{result.model.label} could not count any image."
            continue
        interval, mean = errors.mae_interval, overall.heads / overall.images
        yield (
            f"{result.model.label} miscounts by {overall.mae:.2f} heads per image on average (95% interval "
            f"{interval.low:.2f} to {interval.high:.2f}); an image has {mean:.1f} annotated heads."
        )
    for result in results[1:]:
        yield _comparison(result, results[0])


def _comparison(result: ModelResult, reference: ModelResult) -> str:
    name, first, comparison = result.model.label, reference.model.label, result.comparison
    if comparison is None:
        return f"{name} and {first} have no images in common, so they cannot be compared."
    low, high, gain = comparison.interval.low, comparison.interval.high, comparison.gain
    if low <= 0 <= high:
        return (
            f"No difference is shown between {name} and {first}: the error of {name} is {abs(gain):.2f} heads per "
            f"image {'lower' if gain > 0 else 'higher'}, and the 95% interval, {-high:+.2f} to {-low:+.2f}, contains 0."
        )
    verdict, change = ("better", "lower") if gain > 0 else ("worse", "higher")
    ends = sorted((abs(low), abs(high)))
    return (
        f"{name} is {verdict} than {first}: on the same images its error is {abs(gain):.2f} heads per image {change} "
        f"(95% interval {ends[0]:.2f} to {ends[1]:.2f})."
    )


def _charts(results: Sequence[ModelResult], number: int) -> Iterator[Chart]:
    """Yield the charts of a dataset, whose number makes their identifiers unique in the page."""
    counted = [(index, r.evaluation) for index, r in enumerate(results) if r.evaluation.images]
    if not counted:
        return
    all_counts = [evaluation.counts() for _, evaluation in counted]
    figure = charts.draw_deciles(all_counts)
    text = "Bars: mean annotated heads of ten groups of images, ordered by count. Dots: mean predicted heads."
    yield Chart("Mean count by group", inline_svg(figure, f"d{number}"), text)
    limits = charts.error_limits(all_counts)
    for (index, evaluation), counts in zip(counted, all_counts, strict=True):
        colour = charts.COLOURS[index % len(charts.COLOURS)]
        figure = charts.draw_errors(counts, colour, limits)
        text = "Each point is an image: above the line too many heads are predicted, below it too few."
        yield Chart("Error against count", inline_svg(figure, f"e{number}-{index}"), text, index)
        calibration = evaluation.calibration
        figure = charts.draw_calibration(counts, calibration, colour)
        text = "Solid: predicted equals annotated."
        if calibration is not None and calibration.slope == calibration.slope:
            text += f" Dashed: least squares, {calibration.slope:.3f} x annotated {calibration.intercept:+.2f}."
        if calibration is not None and calibration.intervals:
            text += (
                f" {calibration.coverage:.1%} of {calibration.intervals:,} true counts lie in the stated 95% interval."
            )
        yield Chart("Calibration", inline_svg(figure, f"c{number}-{index}"), text, index)


def _deciles(results: Sequence[ModelResult]) -> list[Decile]:
    counts = [result.evaluation.counts() for result in results]
    predicted = [{count.row: count.predicted for count in counter} for counter in counts]
    common = set.intersection(*map(set, predicted))
    groups = count_groups([count for count in counts[0] if count.row in common], charts.GROUPS)
    return [
        Decile(
            heads=charts.head_range(group),
            images=len(group),
            truth=sum(count.truth for count in group) / len(group),
            predicted=[sum(counter[count.row] for count in group) / len(group) for counter in predicted],
        )
        for group in groups
    ]


def _matrix(report: EvaluationReport) -> str:
    return inline_svg(charts.draw_matrix(report), "matrix")
