"""`crowdray evaluate`: score packaged counters on a split of datasets, side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from crowdray import storage
from crowdray.cluster.ray_job import check_shared, in_ray_job
from crowdray.config import Device
from crowdray.console.arguments import console, parse, tracking_uri, write_json
from crowdray.console.commands.predict import CountingOptions
from crowdray.errors import JobFailed, UserError

if TYPE_CHECKING:
    from crowdray.data.shards import Dataset
    from crowdray.evaluation.report import EvaluationReport
    from crowdray.pipeline.evaluate import LoadedModel

EXAMPLES = (
    "--model models:/crowdray-mall@candidate --data data/mall --split test --json errors.json",
    "--model models:/crowdray-mall/1 models:/crowdray-mall/2 --data data/mall --report report.html",
)


@dataclass(frozen=True, kw_only=True)
class EvaluateJob(CountingOptions):
    """Count whole images of a split and compare with the annotations, inside and without the ROI.

    Several counters are shown side by side; the others are compared with the first on the same images. Images that
    cannot be evaluated are listed and do not stop the others; the exit status is then 1. No number depends on the
    number of workers. docs/evaluation.md defines the measures.
    """

    model: Annotated[tuple[str, ...], tyro.conf.arg(metavar="URI [URI ...]")]
    """models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID/model, or the folder of a packaged counter."""
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="URI [URI ...]")]
    """Path or URI of a dataset written by jobs/convert.py."""
    split: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = ("test",)
    """Split to evaluate: one for all datasets, or one for each."""
    workers: int | None = None
    """Processes on Ray that share the images; without it, this process, or all of the cluster at RAY_ADDRESS."""
    block: int | None = None
    """Consecutive images that the intervals resample together, as frames of a video resemble each other. By default
    50 for Mall, else 1."""
    report: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Path or URI for the report: one HTML file with tables, charts and photos, also attached to the runs in MLflow."""
    matrix: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Path or URI for a picture (PNG) of the errors of all counters on all datasets."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Path or URI for everything as JSON."""
    csv: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Path or URI for a table with a row for each image and counter."""

    def local_device(self) -> Device:
        """The device of this process; the GPUs may be on other nodes."""
        on_cluster = self.workers is not None or bool(os.environ.get("RAY_ADDRESS"))
        return "auto" if on_cluster and self.device == "gpu" else self.device

    def splits(self) -> tuple[str, ...]:
        """The split of each dataset."""
        if len(self.split) not in (1, len(self.data)):
            raise UserError(
                f"--split has {len(self.split)} names for {len(self.data)} datasets; give one for all, or one for each"
            )
        return self.split if len(self.split) == len(self.data) else self.split * len(self.data)


def parse_arguments(arguments: list[str]) -> EvaluateJob:
    """Parse the arguments of the command."""
    return parse(EvaluateJob, arguments, "evaluate", examples=EXAMPLES)


def main(arguments: list[str]) -> None:
    """Run the command with its arguments."""
    job = parse_arguments(arguments)
    if in_ray_job():
        outputs = {f"--{name}": getattr(job, name) or "" for name in ("report", "matrix", "json", "csv")}
        paths = {**outputs, **{f"--data {uri}": uri for uri in job.data}}
        check_shared(paths, tracked=any(uri.startswith(("models:", "runs:")) for uri in job.model), fix="")

    # Imported late: help and usage errors do not wait for torch and MLflow.
    from crowdray.cluster.evaluate import evaluate
    from crowdray.console.evaluation_tables import show_evaluation
    from crowdray.console.progress import image_progress
    from crowdray.console.tables import show_pages
    from crowdray.data.shards import Dataset
    from crowdray.pipeline.evaluate import load_models
    from crowdray.pipeline.evaluation_run import track_evaluation

    screen, splits = console(), job.splits()
    datasets = [Dataset.open(uri) for uri in job.data]
    models = load_models(job.model, job.local_device(), tracking_uri(), job.precision)
    report = evaluate(
        models,
        datasets,
        splits,
        workers=job.workers,
        block=job.block,
        tile=job.tile,
        device=job.device,
        tracking_uri=tracking_uri(),
        progress=partial(image_progress, console=screen),
    )
    show_evaluation(report, screen)
    with storage.scratch_folder("report") as folder:
        files = _write_results(job, report, models, datasets, folder)
        show_pages(track_evaluation(report, tracking_uri(), files), tracking_uri(), screen)
    if failed := sum(len(result.evaluation.failed) for result in report.results):
        total = sum(result.dataset.images for result in report.results)
        raise JobFailed(f"{failed:,} of {total:,} images could not be evaluated; all numbers are without them")


def _write_results(
    job: EvaluateJob,
    report: EvaluationReport,
    models: Sequence[LoadedModel],
    datasets: Sequence[Dataset],
    folder: Path,
) -> list[Path]:
    """Write what the job asks for; returns the files in a local folder to attach to the runs."""
    from crowdray.pipeline.image_table import image_table

    write_json(job.json, report.to_dict())
    if job.csv is not None:
        storage.write_bytes(job.csv, image_table(report.results))
    if job.matrix is not None:
        from crowdray.plots.evaluation import save_matrix

        save_matrix(report, job.matrix)
    if job.report is None:
        return []
    from crowdray.pipeline.html_report import make_html_report

    html = make_html_report(report, models, datasets)
    storage.write_bytes(job.report, html)
    attached = folder / "report.html"
    attached.write_bytes(html)
    return [attached]
