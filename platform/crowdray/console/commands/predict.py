"""`crowdray predict`: count the people in photos."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import tyro

from crowdray.cluster.ray_job import check_shared, in_ray_job
from crowdray.config import Device, Precision
from crowdray.console.arguments import console, parse, shared_paths, tracking_uri

EXAMPLES = (
    "--model models:/crowdray-mall@candidate --input photos/ --output counted/",
    "--model models:/crowdray-mall@candidate --input photos/ --output counted/ --save overlays --format parquet",
)


@dataclass(frozen=True, kw_only=True)
class CountingOptions:
    """Options of jobs that count with packaged counters."""

    device: Device = "auto"
    """Device: auto uses a GPU if there is one."""
    precision: Precision = "fp32"
    """Arithmetic of the convolutions; bf16 is faster on devices with native support."""
    tile: int = 2048
    """Side in pixels of the overlapping tiles in which larger images are counted: the same density with less memory. 0
    counts each image whole."""


@dataclass(frozen=True, kw_only=True)
class PredictJob(CountingOptions):
    """Count the people in photos; writes counts.csv and a contact sheet. The same command resumes an interrupted one.

    Photos that cannot be counted are listed at the end and do not stop the others; the exit status is then 1. Uses Ray
    if RAY_ADDRESS is set, or for more than 1,000 photos.
    """

    model: Annotated[str, tyro.conf.arg(metavar="URI")]
    """models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID/model, or the folder of a packaged counter."""
    input: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """An image, a folder of images, or a quoted pattern such as 'photos/*.jpg'; a path or a URI."""
    output: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """Folder or URI for the results."""
    save: Annotated[tuple[str, ...], tyro.conf.arg(metavar="WHAT")] = ("counts",)
    """What to write for each photo besides the table: densities (.npy), overlays (.png), points (likely positions,
    .csv); several of them after spaces or commas."""
    format: Literal["csv", "jsonl", "parquet"] = "csv"
    """Format of the table of counts."""
    zones: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """GeoJSON file of polygons in pixels, to count in each of them; with a homography also people per square metre
    (docs/predict.md)."""


def parse_arguments(arguments: list[str]) -> PredictJob:
    """Parse the arguments of the command."""
    return parse(PredictJob, arguments, "predict", examples=EXAMPLES)


def main(arguments: list[str]) -> None:
    """Run the command with its arguments."""
    job = parse_arguments(arguments)
    if in_ray_job():
        check_shared(shared_paths(job), tracked=job.model.startswith(("models:", "runs:")), fix="")

    # Imported late: help and usage errors do not wait for torch and MLflow.
    from crowdray.cluster.predict import predict
    from crowdray.console.progress import image_progress
    from crowdray.console.tables import show_prediction

    screen = console()
    prediction = predict(
        job.model,
        job.input,
        job.output,
        save=[name for words in job.save for name in words.split(",") if name],
        table_format=job.format,
        zones=job.zones,
        tile=job.tile,
        device=job.device,
        precision=job.precision,
        tracking_uri=tracking_uri(),
        progress=partial(image_progress, console=screen),
    )
    show_prediction(prediction, screen)
    prediction.check()
