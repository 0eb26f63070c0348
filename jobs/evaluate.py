"""Score a packaged counter: python jobs/evaluate.py --model URI --data URI --split test [--json FILE]."""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT / "platform"))

from crowdray.config import Device
from crowdray.console.arguments import console, parse, run_job, tracking_uri, write_json
from crowdray.console.progress import counting
from crowdray.console.tables import evaluation_table
from crowdray.data.shards import Dataset
from crowdray.evaluation.inference import TILE
from crowdray.evaluation.report import evaluate_images, summarise_images
from crowdray.pipeline.predict import choose_device, tiled
from crowdray.registry.loading import Precision, load_counter


@dataclass(frozen=True)
class EvaluateJob:
    """Count whole photos of a split and compare with their annotation, with and without their ROI."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID/model, or the folder of a packaged counter."""
    data: str
    """Path or URI of the dataset, as jobs/convert.py made it."""
    split: str = "test"
    """The split to count."""
    device: Device = "auto"
    """Where to count: auto takes a GPU where there is one."""
    precision: Precision = "fp32"
    """Arithmetic of the convolutions: bf16 is faster where the device multiplies it natively."""
    tile: int = TILE
    """Larger photos are counted in overlapping tiles of about this many pixels along a side: the same density in less
    memory. 0 takes each photo whole."""
    json: str | None = None
    """File or URI for the result as JSON, image by image."""


def main(arguments: list[str]) -> None:
    job = parse(EvaluateJob, arguments, "jobs/evaluate.py")
    dataset = Dataset.open(job.data)
    rows = dataset.rows(job.split).tolist()
    counter = load_counter(job.model, choose_device(job.device), tracking_uri(ROOT), precision=job.precision)
    screen = console()
    images = []
    with counting("images", len(rows), screen) as advance:
        for image in evaluate_images(tiled(counter, job.tile), dataset, rows, geometry=counter.geometry):
            images.append(image)
            advance(1)
    evaluation = summarise_images(images)
    screen.print(evaluation_table(evaluation, f"{job.model} on {job.split} of {job.data}"))
    about = {"model": job.model, "data": dataset.uri, "digest": dataset.digest, "split": job.split}
    write_json(job.json, evaluation.to_dict(**about))


if __name__ == "__main__":
    run_job(main)
