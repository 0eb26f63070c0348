"""`crowdray predict`: count the people in photos."""

from dataclasses import dataclass

from crowdray.config import Device
from crowdray.console.arguments import console, parse, tracking_uri
from crowdray.console.progress import image_progress
from crowdray.console.tables import show_prediction
from crowdray.evaluation.inference import TILE
from crowdray.pipeline.predict import choose_device, find_images, predict_images, tiled
from crowdray.registry.loading import LoadedCounter, Precision, load_counter


@dataclass(frozen=True, kw_only=True)
class CounterOptions:
    """Options of jobs that count with a packaged counter."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID/model, or the folder of a packaged counter."""
    device: Device = "auto"
    """Device: auto uses a GPU if there is one."""
    precision: Precision = "fp32"
    """Arithmetic of the convolutions; bf16 is faster on devices with native support."""
    tile: int = TILE
    """Side in pixels of the overlapping tiles in which larger images are counted: the same density with less memory. 0
    counts each image whole."""

    def load(self) -> LoadedCounter:
        """Load the counter."""
        return load_counter(self.model, choose_device(self.device), tracking_uri(), precision=self.precision)


@dataclass(frozen=True, kw_only=True)
class PredictJob(CounterOptions):
    """Count the people in photos; writes an overlay and a density map of each photo, and counts.csv.

    Unreadable photos are listed at the end and do not stop the others; the exit status is then 1.
    """

    input: str
    """An image, a folder of images, or a quoted pattern such as 'photos/*.jpg'; a path or a URI."""
    output: str
    """Folder or URI for the results."""


def main(arguments: list[str]) -> None:
    """Run the command with its arguments."""
    job = parse(PredictJob, arguments, "predict")
    images = find_images(job.input, job.output)
    counter = job.load()
    screen = console()
    with image_progress(len(images), console=screen) as advance:
        prediction = predict_images(tiled(counter, job.tile), images, job.output, advance)
    show_prediction(prediction, screen)
    prediction.check()
