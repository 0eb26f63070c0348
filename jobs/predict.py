"""Count the people in photos: python jobs/predict.py --model URI --input PATH|URI --output URI."""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT / "platform"))

from crowdray.config import Device
from crowdray.console.arguments import console, parse, run_job, tracking_uri
from crowdray.console.progress import counting
from crowdray.evaluation.inference import TILE
from crowdray.pipeline.predict import choose_device, find_images, predict_images, show_prediction, tiled
from crowdray.registry.loading import Precision, load_counter


@dataclass(frozen=True)
class PredictJob:
    """Count the people in photos: writes an overlay and the density of each, and counts.csv.

    A photo that cannot be read is named at the end, the others are done; the status is 1 then.
    """

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID/model, or the folder of a packaged counter."""
    input: str
    """An image, a folder of images, or a quoted pattern such as 'photos/*.jpg'; a path or a URI."""
    output: str
    """Folder or URI for what comes out."""
    device: Device = "auto"
    """Where to count: auto takes a GPU where there is one."""
    precision: Precision = "fp32"
    """Arithmetic of the convolutions: bf16 is faster where the device multiplies it natively."""
    tile: int = TILE
    """Larger photos are counted in overlapping tiles of about this many pixels along a side: the same density in less
    memory. 0 takes each photo whole."""


def main(arguments: list[str]) -> None:
    job = parse(PredictJob, arguments, "jobs/predict.py")
    images = find_images(job.input, job.output)
    counter = load_counter(job.model, choose_device(job.device), tracking_uri(ROOT), precision=job.precision)
    screen = console()
    with counting("images", len(images), screen) as advance:
        prediction = predict_images(tiled(counter, job.tile), images, job.output, advance)
    show_prediction(prediction, screen)
    prediction.check()


if __name__ == "__main__":
    run_job(main)
