"""The Python interface: the functions that `import crowdray` offers.

`import crowdray` imports nothing else; each function imports what it needs, torch, MLflow or Ray, when it is called.
MLflow is at MLFLOW_TRACKING_URI, else in mlflow.db in the repository or the working directory, as for the jobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from crowdray.config import Config, Device, Precision

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    from crowdray.data.shards import Index
    from crowdray.pipeline.count_table import TableFormat
    from crowdray.pipeline.outcome import Outcome
    from crowdray.pipeline.predict import CountedPhoto, Prediction, Save
    from crowdray.registry.loading import LoadedCounter

_TILE = 2048

__all__ = ["convert", "count", "load", "predict", "train"]


def load(model: str | PathLike[str], *, device: Device = "auto", precision: Precision = "fp32") -> LoadedCounter:
    """Load a packaged counter, without running anything that its package contains.

    Args:
        model: models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID/model, or the folder or URI of a package.
        device: "auto" uses a GPU if there is one.
        precision: Arithmetic of the convolutions.

    Raises:
        UserError: The model does not exist, or is not a packaged counter.
    """
    from crowdray.console.arguments import tracking_uri
    from crowdray.pipeline.predict import choose_device
    from crowdray.registry.loading import load_counter

    return load_counter(fspath(model), choose_device(device), tracking_uri(), precision=precision)


def count(
    image: str | PathLike[str] | Image | NDArray[np.uint8],
    model: LoadedCounter | str | PathLike[str],
    *,
    tile: int = _TILE,
) -> CountedPhoto:
    """Count the people in one photo.

    Args:
        image: Path or URI of a photo, a PIL image, or an array (H, W, 3) of RGB values 0 to 255.
        model: The counter that `load` returned, or what `load` takes.
        tile: Side in pixels of the overlapping tiles in which larger photos are counted; 0 counts each whole.

    Returns:
        Count, density, interval and warnings; float(...) of it is the count.

    Raises:
        UserError: The photo or the model cannot be read.
    """
    import numpy as np
    from PIL import ImageOps
    from PIL.Image import Image as PILImage

    from crowdray import storage
    from crowdray.data.decoding import decode_upright
    from crowdray.errors import UserError
    from crowdray.pipeline.predict import count_photo

    if isinstance(image, PILImage):
        pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    elif isinstance(image, np.ndarray):
        pixels = image
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
            raise UserError(f"the image is {pixels.dtype} of shape {pixels.shape}; pass uint8 RGB values (H, W, 3)")
    else:
        pixels = decode_upright(storage.read_bytes(fspath(image)))
    return count_photo(load(model) if isinstance(model, str | PathLike) else model, pixels, tile)


def predict(
    images: str | PathLike[str],
    output: str | PathLike[str],
    model: str | PathLike[str],
    *,
    save: Sequence[Save] = ("counts",),
    format: TableFormat = "csv",
    zones: str | PathLike[str] | None = None,
    tile: int = _TILE,
    device: Device = "auto",
    precision: Precision = "fp32",
) -> Prediction:
    """Count the people in many photos and write a table of counts, as `crowdray predict` does.

    The same call resumes an interrupted one. Photos that cannot be counted are in the table, with the reason;
    `Prediction.check` raises an exception for them.

    Args:
        images: A folder of photos, one photo, or a pattern such as photos/*.jpg; a path or a URI.
        output: Folder or URI for the results.
        model: As of `load`.
        save: What to write for each photo besides the table: "densities", "overlays", "points".
        format: Format of the table: "csv", "jsonl" or "parquet".
        zones: Zones file, see `crowdray.pipeline.zones`.
        tile: As of `count`.
        device: As of `load`.
        precision: As of `load`.

    Raises:
        UserError: There are no photos, or the model cannot be loaded.
    """
    from crowdray.cluster.predict import predict
    from crowdray.console.arguments import tracking_uri

    return predict(
        fspath(model),
        fspath(images),
        fspath(output),
        save=save,
        table_format=format,
        zones=None if zones is None else fspath(zones),
        tile=tile,
        device=device,
        precision=precision,
        tracking_uri=tracking_uri(),
    )


def train(
    config: Config | str,
    data: str | PathLike[str],
    *,
    workers: int | str = 1,
    storage: str | PathLike[str] = "runs",
    name: str | None = None,
    device: Device = "auto",
) -> Outcome:
    """Train a counter in three stages through Ray and register it, as `crowdray train` does; prints its progress.

    Args:
        config: A configuration, the name of a preset, or the path of a config.json.
        data: Path or URI of a dataset that `convert` wrote.
        workers: Number of worker processes, or "MIN:MAX".
        storage: Folder or URI for checkpoints and results.
        name: Name of the run; by default it depends on everything that determines the result.
        device: Device of the workers.

    Returns:
        Errors, and the URI of the registered version as `Outcome.model_uri`.

    Raises:
        UserError: The configuration or the dataset cannot be used.
        JobFailed: Training failed.
    """
    from crowdray.cluster.train import train
    from crowdray.console.arguments import load_preset, tracking_uri
    from crowdray.console.progress import TrainingDisplay
    from crowdray.pipeline.identity import parse_workers
    from crowdray.pipeline.run import plan_run
    from crowdray.stage_cache.options import StageCacheOptions
    from crowdray.training.stages import build_stages

    preset = config if isinstance(config, str) else "custom"
    resolved = load_preset(config) if isinstance(config, str) else config
    tracking, parsed = tracking_uri(), parse_workers(workers)
    run = plan_run(resolved, fspath(data), parsed, fspath(storage), name, preset, tracking_uri=tracking)
    with TrainingDisplay(build_stages(run.identity.config)) as display:
        stage_cache = StageCacheOptions().config(run.identity.storage)
        return train(run, display, tracking_uri=tracking, stage_cache=stage_cache, device=device)


def convert(
    source: str,
    dest: str | PathLike[str],
    folder: str | PathLike[str] | None = None,
    *,
    splits: Sequence[str] = (),
    depth: str = "auto",
    overwrite: bool = False,
    strict: bool = False,
    restart_markers: bool = False,
    **options: Any,
) -> Index:
    """Convert a dataset from its official layout into shards, as `crowdray convert` does.

    Args:
        source: Layout of the dataset: "mall", "csv", "synthetic" and so on.
        dest: Path or URI of the new dataset.
        folder: Folder or URI of the dataset in its official layout; None for "synthetic".
        splits: Splits to convert; all by default.
        depth: Source of depth.
        overwrite: Replace an existing dataset.
        strict: Fail if any item is unusable, instead of leaving it out.
        restart_markers: Add restart markers to JPEGs, without loss; needs jpegtran.
        **options: Options of the source, such as train=40 of "synthetic".

    Raises:
        UserError: The source or an option is unknown, or the dataset cannot be used.
    """
    from crowdray.cluster.convert import convert
    from crowdray.datasets.sources import open_source

    opened = open_source(source, None if folder is None else fspath(folder), depth=depth, **options)
    return convert(
        opened, fspath(dest), splits=splits, overwrite=overwrite, strict=strict, restart_markers=restart_markers
    )
