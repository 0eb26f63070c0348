"""`crowdray evaluate`: score packaged counters on a split of datasets, side by side."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import tyro

from crowdray import storage
from crowdray.cluster.ray_job import check_shared, in_ray_job
from crowdray.console.arguments import console, parse, tracking_uri, write_json
from crowdray.console.commands.predict import CountingOptions
from crowdray.errors import JobFailed

EXAMPLES = (
    "--model models:/crowdray-mall@candidate --data data/mall --split test --json errors.json",
    "--model models:/crowdray-mall/1 models:/crowdray-mall/2 --data data/mall --csv images.csv",
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
    split: Annotated[str, tyro.conf.arg(metavar="NAME")] = "test"
    """Split to evaluate."""
    workers: int | None = None
    """Processes on Ray that share the images; without it, this process, or all of the cluster at RAY_ADDRESS."""
    block: int | None = None
    """Consecutive images that the intervals resample together, as frames of a video resemble each other. By default
    50 for Mall, else 1."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Path or URI for everything as JSON."""
    csv: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Path or URI for a table with a row for each image and counter."""


def parse_arguments(arguments: list[str]) -> EvaluateJob:
    """Parse the arguments of the command."""
    return parse(EvaluateJob, arguments, "evaluate", examples=EXAMPLES)


def main(arguments: list[str]) -> None:
    """Run the command with its arguments."""
    job = parse_arguments(arguments)
    if in_ray_job():
        paths = {"--json": job.json or "", "--csv": job.csv or "", **{f"--data {uri}": uri for uri in job.data}}
        check_shared(paths, tracked=any(uri.startswith(("models:", "runs:")) for uri in job.model), fix="")

    # Imported late: help and usage errors do not wait for torch and MLflow.
    from crowdray.cluster.evaluate import evaluate
    from crowdray.console.evaluation_tables import show_evaluation
    from crowdray.console.progress import image_progress
    from crowdray.console.tables import show_pages
    from crowdray.data.shards import Dataset
    from crowdray.pipeline.evaluate import load_models
    from crowdray.pipeline.evaluation_run import track_evaluation
    from crowdray.pipeline.image_table import image_table

    screen = console()
    datasets = [Dataset.open(uri) for uri in job.data]
    report = evaluate(
        load_models(job.model, job.device, tracking_uri(), job.precision),
        datasets,
        job.split,
        workers=job.workers,
        block=job.block,
        tile=job.tile,
        device=job.device,
        tracking_uri=tracking_uri(),
        progress=partial(image_progress, console=screen),
    )
    show_evaluation(report, screen)
    write_json(job.json, report.to_dict())
    if job.csv is not None:
        storage.write_bytes(job.csv, image_table(report.results))
    show_pages(track_evaluation(report, tracking_uri()), tracking_uri(), screen)
    if failed := sum(len(result.evaluation.failed) for result in report.results):
        total = sum(result.dataset.images for result in report.results)
        raise JobFailed(f"{failed:,} of {total:,} images could not be evaluated; all numbers are without them")
