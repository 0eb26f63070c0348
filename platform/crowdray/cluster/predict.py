"""Prediction in this process, or with Ray Data on a pool of actors that each hold the counter."""

import json
import logging
import os
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from crowdray import storage
from crowdray.cluster.parallel import Progress, no_progress
from crowdray.cluster.runtime import MAX_RETRIES, Resources, choose_gpu, connect, wait_for_workers
from crowdray.config import Device, Precision
from crowdray.credentials import redacted
from crowdray.errors import RESUME_HINT, JobFailed, UserError, first_line
from crowdray.evaluation.inference import TILE
from crowdray.pipeline.count_table import STATE, Parts, TableFormat, printable
from crowdray.pipeline.predict import (
    Photo,
    Prediction,
    PredictOptions,
    choose_device,
    combine,
    count_part,
    find_images,
    list_photos,
    split_into_parts,
)
from crowdray.pipeline.zones import read_zones
from crowdray.registry.loading import DESCRIPTION, download_package, load_counter, resolve_uri

if TYPE_CHECKING:
    import numpy as np

RAY_PHOTOS = 1000
"""Number of photos above which starting Ray pays off on a machine with several CPUs."""


def predict(
    model: str,
    images: str,
    output: str,
    *,
    save: Sequence[str] = ("counts",),
    table_format: TableFormat = "csv",
    zones: str | None = None,
    tile: int = TILE,
    device: Device = "auto",
    precision: Precision = "fp32",
    tracking_uri: str | None = None,
    progress: Progress = no_progress,
) -> Prediction:
    """Count the people in photos and write a table of counts; the same call resumes an interrupted one.

    Ray is used if RAY_ADDRESS is set, or if more than RAY_PHOTOS photos are left and there are several CPUs.

    Args:
        model: The packaged counter, see `load_counter`.
        images: A photo, a folder of photos, or a pattern such as photos/*.jpg.
        output: Folder or URI for the results.
        save: What to write besides the table.
        table_format: Format of the table.
        zones: Zones file, see `pipeline.zones`.
        tile: Side of tiles in pixels; 0 for whole photos.
        device: Where to count.
        precision: Arithmetic of the convolutions.
        tracking_uri: MLflow server or database; MLFLOW_TRACKING_URI by default.
        progress: Shows the progress.

    Raises:
        UserError: The counter or the photos cannot be used; a single photo that cannot be counted is in the table.
    """
    version = resolve_uri(model, tracking_uri)
    read = read_zones(zones) if zones else None
    # The working directory of a worker is another one.
    output = storage.resolve(output)
    options = PredictOptions(output, printable(redacted(version)), tuple(save), tile, read, table_format)
    photos = list_photos(find_images(images, output), save)
    has_cluster = bool(os.environ.get("RAY_ADDRESS"))
    local_device = choose_device("auto" if has_cluster else device)  # the GPUs may be on other nodes
    counter = load_counter(version, local_device, tracking_uri, precision=precision)
    command = options.command(counter)
    done = Parts(output, command).done
    left = [photo for photo in photos if photo.key not in done]
    pending = split_into_parts(left)
    use_ray = has_cluster or (len(left) > RAY_PHOTOS and len(os.sched_getaffinity(0)) > 1)
    with progress(len(photos), len(photos) - len(left)) as advance:
        if use_ray and pending:
            counted = _count_on_cluster(version, tracking_uri, pending, options, command, device, precision)
        else:
            counted = (1 for part in pending for _ in count_part(counter, part, options, command))
        with closing(counted):
            for number in counted:
                advance(number)
    storage.unpublish_directory(_package_folder(output), DESCRIPTION)  # that of a process that was killed
    return combine(counter, photos, options, command)


def _count_on_cluster(
    model: str,
    tracking_uri: str | None,
    parts: Sequence[Sequence[Photo]],
    options: PredictOptions,
    command: str,
    device: Device,
    precision: Precision,
) -> Generator[int, None, None]:
    """Count parts with Ray Data, and yield the number of photos of each finished one."""
    # Ray Data starts its actors in a way about which Ray writes an error to the terminal.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with _shared_package(model, tracking_uri, options.output) as package, connect() as resources:
        import ray
        import ray.data

        workers = min(len(parts), device_workers(resources, device))
        gpu = choose_gpu(resources, workers, device)
        wait_for_workers(resources, 1, {"CPU": 1, "GPU": int(gpu)}, partial(print, flush=True))
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # which its import sets to INFO
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = [{"photos": json.dumps([asdict(photo) for photo in part])} for part in parts]
        tasks = ray.data.from_items(rows, override_num_blocks=len(rows))
        # Without these limits, deprecated without a replacement, a photo that kills its actor is tried for ever.
        limits: dict[str, Any] = {"max_restarts": MAX_RETRIES, "max_task_retries": MAX_RETRIES}
        with warnings.catch_warnings(action="ignore"):
            counts = tasks.map_batches(
                _PartCounter,
                fn_constructor_args=(package, options, command, "gpu" if gpu else "cpu", precision),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(min_size=1, initial_size=workers, max_size=workers),
                num_cpus=1,
                num_gpus=int(gpu),
                **limits,
            )
        try:
            for row in counts.iter_rows():
                if missing := next(filter(storage.exists, json.loads(row["missing"])), None):
                    raise UserError(
                        f"a worker cannot find {missing}, which exists for this process: with several nodes --input "
                        "must be reachable by all of them, as a shared folder or a URI such as s3://bucket/folder"
                    )
                yield int(row["number"])
        except ray.exceptions.RayTaskError as error:
            raise _user_error(error) or error from None
        except ray.exceptions.RayError as error:
            raise JobFailed(
                f"workers were lost repeatedly ({first_line(error)}). If memory ran out, set a smaller --tile or give "
                f"Ray fewer CPUs; {RESUME_HINT}"
            ) from error


def _user_error(error: BaseException | None) -> UserError | None:
    """Return the UserError of a worker, which Ray Data wraps in exceptions of its own."""
    while error is not None and not isinstance(error, UserError):
        error = getattr(error, "cause", None) or error.__cause__
    return error


@contextmanager
def _shared_package(model: str, tracking_uri: str | None, output: str) -> Iterator[str]:
    """Publish a package where all workers find it, for the duration of the block; they may not reach MLflow."""
    uri = _package_folder(output)
    storage.unpublish_directory(uri, DESCRIPTION)
    with storage.scratch_folder("package") as folder:
        download_package(model, folder, tracking_uri)
        storage.publish_directory(folder, uri, DESCRIPTION)
    try:
        yield uri
    finally:
        storage.unpublish_directory(uri, DESCRIPTION)


def _package_folder(output: str) -> str:
    return storage.join(storage.resolve(output), STATE, "package")


def device_workers(resources: Resources, device: Device) -> int:
    """Number of workers that use all GPUs, or all CPUs without GPUs."""
    return resources.gpus if resources.gpus and device != "cpu" else max(1, resources.cpus)


class _PartCounter:
    """Actor that loads the counter once and counts parts."""

    def __init__(
        self, package: str, options: PredictOptions, command: str, device: Device, precision: Precision
    ) -> None:
        self._counter = load_counter(package, choose_device(device), precision=precision)
        self._options, self._command = options, command
        torch.set_num_threads(1)

    def __call__(self, batch: "dict[str, np.ndarray[Any, Any]]") -> dict[str, list[Any]]:
        """Count the photos of one part; returns their number, and the URIs of those that do not exist here."""
        photos = [Photo(**fields) for fields in json.loads(str(batch["photos"][0]))]
        counts = list(count_part(self._counter, photos, self._options, self._command))
        pairs = zip(photos, counts, strict=True)
        missing = [photo.uri for photo, count in pairs if count.error and not storage.exists(photo.uri)]
        return {"number": [len(counts)], "missing": [json.dumps(missing)]}
