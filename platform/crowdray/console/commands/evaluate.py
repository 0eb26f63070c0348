"""`crowdray evaluate`: score a packaged counter on a split."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from crowdray.console.arguments import console, parse, tracking_uri, write_json
from crowdray.console.commands.predict import CounterOptions

EXAMPLES = ("--model models:/crowdray-mall@candidate --data data/mall --split test --json errors.json",)


@dataclass(frozen=True, kw_only=True)
class EvaluateJob(CounterOptions):
    """Count whole images of a split and compare with the annotations, inside and without the ROI."""

    data: Annotated[str, tyro.conf.arg(metavar="URI")]
    """Path or URI of a dataset written by jobs/convert.py."""
    split: Annotated[str, tyro.conf.arg(metavar="NAME")] = "test"
    """Split to evaluate."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Path or URI for the result of every image as JSON."""


def parse_arguments(arguments: list[str]) -> EvaluateJob:
    """Parse the arguments of the command."""
    return parse(EvaluateJob, arguments, "evaluate", examples=EXAMPLES)


def main(arguments: list[str]) -> None:
    """Run the command with its arguments."""
    job = parse_arguments(arguments)

    # Imported late: help and usage errors do not wait for torch and MLflow.
    from crowdray.console.progress import image_progress
    from crowdray.console.tables import evaluation_table, show_page
    from crowdray.data.shards import Dataset
    from crowdray.evaluation.report import evaluate_images, summarise_images
    from crowdray.pipeline.evaluation_run import track_evaluation
    from crowdray.pipeline.predict import tiled

    dataset = Dataset.open(job.data)
    rows = dataset.rows(job.split).tolist()
    counter = job.load()
    screen = console()
    images = []
    with image_progress(len(rows), console=screen) as advance:
        for image in evaluate_images(tiled(counter, job.tile), dataset, rows, geometry=counter.geometry):
            images.append(image)
            advance(1)
    evaluation = summarise_images(images)
    screen.print(evaluation_table(evaluation, f"{job.model} on {job.split} of {job.data}"))
    source = {"model": job.model, "data": dataset.uri, "digest": dataset.digest, "split": job.split}
    write_json(job.json, evaluation.to_dict(**source))
    page = track_evaluation(
        evaluation, counter, dataset, model=job.model, split=job.split, tile=job.tile, tracking_uri=tracking_uri()
    )
    if page is not None:
        show_page(page, tracking_uri(), screen)
