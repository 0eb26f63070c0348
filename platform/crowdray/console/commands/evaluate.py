"""`crowdray evaluate`: score a packaged counter on a split."""

from dataclasses import dataclass

from crowdray.config import Device
from crowdray.console.arguments import console, parse, tracking_uri, write_json
from crowdray.console.progress import image_progress
from crowdray.console.tables import evaluation_table
from crowdray.data.shards import Dataset
from crowdray.evaluation.inference import TILE
from crowdray.evaluation.report import evaluate_images, summarise_images
from crowdray.pipeline.predict import choose_device, tiled
from crowdray.registry.loading import Precision, load_counter


@dataclass(frozen=True)
class EvaluateJob:
    """Count whole images of a split and compare with the annotations, inside and without the ROI."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID/model, or the folder of a packaged counter."""
    data: str
    """Path or URI of a dataset written by jobs/convert.py."""
    split: str = "test"
    """Split to evaluate."""
    device: Device = "auto"
    """Device: auto uses a GPU if there is one."""
    precision: Precision = "fp32"
    """Arithmetic of the convolutions; bf16 is faster on devices with native support."""
    tile: int = TILE
    """Side in pixels of the overlapping tiles in which larger images are counted: the same density with less memory. 0
    counts each image whole."""
    json: str | None = None
    """Path or URI for the result of every image as JSON."""


def main(arguments: list[str]) -> None:
    """Run the command with its arguments."""
    job = parse(EvaluateJob, arguments, "evaluate")
    dataset = Dataset.open(job.data)
    rows = dataset.rows(job.split).tolist()
    counter = load_counter(job.model, choose_device(job.device), tracking_uri(), precision=job.precision)
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
