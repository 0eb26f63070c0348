"""`crowdray predict`: count the people in photos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from crowdray.config import Device, Precision
from crowdray.console.arguments import console, parse, tracking_uri

if TYPE_CHECKING:
    from crowdray.registry.loading import LoadedCounter

EXAMPLES = ("--model models:/crowdray-mall@candidate --input photos/ --output counted/",)


@dataclass(frozen=True, kw_only=True)
class CounterOptions:
    """Options of jobs that count with a packaged counter."""

    model: Annotated[str, tyro.conf.arg(metavar="URI")]
    """models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID/model, or the folder of a packaged counter."""
    device: Device = "auto"
    """Device: auto uses a GPU if there is one."""
    precision: Precision = "fp32"
    """Arithmetic of the convolutions; bf16 is faster on devices with native support."""
    tile: int = 2048
    """Side in pixels of the overlapping tiles in which larger images are counted: the same density with less memory. 0
    counts each image whole."""

    def load(self) -> LoadedCounter:
        """Load the counter."""
        from crowdray.pipeline.predict import choose_device
        from crowdray.registry.loading import load_counter

        return load_counter(self.model, choose_device(self.device), tracking_uri(), precision=self.precision)


@dataclass(frozen=True, kw_only=True)
class PredictJob(CounterOptions):
    """Count the people in photos; writes an overlay and a density map of each photo, and counts.csv.

    Unreadable photos are listed at the end and do not stop the others; the exit status is then 1.
    """

    input: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """An image, a folder of images, or a quoted pattern such as 'photos/*.jpg'; a path or a URI."""
    output: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """Folder or URI for the results."""


def parse_arguments(arguments: list[str]) -> PredictJob:
    """Parse the arguments of the command."""
    return parse(PredictJob, arguments, "predict", examples=EXAMPLES)


def main(arguments: list[str]) -> None:
    """Run the command with its arguments."""
    job = parse_arguments(arguments)

    # Imported late: help and usage errors do not wait for torch and MLflow.
    from crowdray.console.progress import image_progress
    from crowdray.console.tables import show_prediction
    from crowdray.pipeline.predict import find_images, predict_images, tiled

    images = find_images(job.input, job.output)
    counter = job.load()
    screen = console()
    with image_progress(len(images), console=screen) as advance:
        prediction = predict_images(tiled(counter, job.tile), images, job.output, advance)
    show_prediction(prediction, screen)
    prediction.check()
