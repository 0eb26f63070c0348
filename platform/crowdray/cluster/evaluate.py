"""Evaluation of counters on datasets in this process, or in Ray actors that each hold all counters."""

import os
from collections import defaultdict
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from crowdray import storage
from crowdray.cluster.parallel import Progress, no_progress
from crowdray.cluster.predict import device_workers
from crowdray.cluster.runtime import MAX_RETRIES, choose_gpu, connect, wait_for_workers
from crowdray.config import Device, Precision
from crowdray.data.shards import Dataset
from crowdray.errors import JobFailed, UserError, first_line
from crowdray.evaluation.inference import TILE
from crowdray.evaluation.report import EvaluationReport, Outcome, make_report
from crowdray.pipeline.evaluate import LoadedModel, describe_dataset, evaluate_rows
from crowdray.pipeline.predict import choose_device
from crowdray.registry.loading import DESCRIPTION, GRAPH, LoadedCounter, download_package, load_counter

if TYPE_CHECKING:
    import ray

SLICE_IMAGES = 16
"""Images of a task."""
_THREADS = 4
"""Images counted at the same time in this process; each needs the memory of its activations."""

Job = tuple[Sequence[dict[str, bytes]], Sequence[Dataset], int, Device, Precision]
"""Files of each package, datasets, side of tiles, device and precision."""
Result = tuple[int, int, list[Outcome], str]
"""Index of a dataset and of a counter, images, and the device that counted them."""
Slice = tuple[int, int, Sequence[int]]
"""Index of a dataset and of a counter, and rows of the dataset."""


def evaluate(
    models: Sequence[LoadedModel],
    datasets: Sequence[Dataset],
    splits: Sequence[str],
    *,
    workers: int | None = None,
    block: int | None = None,
    tile: int = TILE,
    device: Device = "auto",
    tracking_uri: str | None = None,
    progress: Progress = no_progress,
) -> EvaluationReport:
    """Evaluate each counter on a split of each dataset; no number depends on the number of workers.

    Args:
        models: The counters; the others are compared with the first.
        datasets: The datasets; workers must reach them under the same path or URI.
        splits: The split of each dataset.
        workers: Ray actors, which share the CPUs if there are fewer; None: this process, or all CPUs or GPUs of the
            cluster at RAY_ADDRESS.
        block: Consecutive images that intervals resample together; None: 50 for known videos, else 1.
        tile: Side of tiles in pixels; 0 for whole images.
        device: Where workers count.
        tracking_uri: MLflow server or database of the counters.
        progress: Shows the progress.

    Raises:
        UserError: A dataset has no such split, or there are not enough GPUs.
        JobFailed: Workers were lost repeatedly.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}; give at least 1")
    if block is not None and block < 1:
        raise UserError(f"--block is {block}; give a number of images, at least 1")
    rows = [dataset.rows(split).tolist() for dataset, split in zip(datasets, splits, strict=True)]
    slices = [
        (number, index, part)
        for number, dataset_rows in enumerate(rows)
        for index in range(len(models))
        for part in slice_rows(dataset_rows, SLICE_IMAGES)
    ]
    if workers is None and not os.environ.get("RAY_ADDRESS"):
        results = _evaluate_here(models, datasets, slices, tile)
    else:
        results = _evaluate_on_cluster(models, datasets, slices, tile, workers, device, tracking_uri)
    outcomes: defaultdict[tuple[int, int], list[Outcome]] = defaultdict(list)
    used = set[str]()
    with progress(sum(map(len, rows)) * len(models), 0) as advance, closing(results):
        for number, index, images, worker_device in results:
            outcomes[number, index] += images
            used.add(worker_device)
            advance(len(images))
    return make_report(
        [model.model for model in models],
        [describe_dataset(*pair) for pair in zip(datasets, splits, strict=True)],
        outcomes,
        block=block,
        device=", ".join(sorted(used)),
        tile=tile,
    )


def slice_rows(rows: Sequence[int], length: int) -> list[Sequence[int]]:
    """Divide rows into slices of at most `length`; each row is in exactly one."""
    return [rows[start : start + length] for start in range(0, len(rows), length)]


def _evaluate_here(
    models: Sequence[LoadedModel], datasets: Sequence[Dataset], slices: Sequence[Slice], tile: int
) -> Generator[Result, None, None]:
    threads = min(_THREADS, len(os.sched_getaffinity(0)))
    for number, index, rows in slices:
        counter = models[index].counter
        yield number, index, list(evaluate_rows(counter, datasets[number], rows, tile, threads)), counter.device.type


def _evaluate_on_cluster(
    models: Sequence[LoadedModel],
    datasets: Sequence[Dataset],
    slices: Sequence[Slice],
    tile: int,
    workers: int | None,
    device: Device,
    tracking_uri: str | None,
) -> Generator[Result, None, None]:
    """Yield the images of each slice in order of completion."""
    packages = [_read_package(model.uri, tracking_uri) for model in models]
    with connect() as resources:
        import ray
        from ray.util import ActorPool

        number = min(workers or device_workers(resources, device), len(slices))
        gpu = choose_gpu(replace(resources, cpus=max(resources.cpus, number)), number, device)
        needs = {"CPU": min(1.0, resources.cpus / number), "GPU": float(gpu)}
        wait_for_workers(resources, 1, needs, partial(print, flush=True))
        actor: Any = ray.remote(
            num_cpus=needs["CPU"], num_gpus=int(gpu), max_restarts=MAX_RETRIES, max_task_retries=MAX_RETRIES
        )(_Evaluator)
        shared = ray.put((packages, datasets, tile, "gpu" if gpu else "cpu", models[0].counter.precision))
        pool = ActorPool([actor.remote() for _ in range(number)])
        try:
            yield from pool.map_unordered(
                lambda evaluator, part: evaluator.evaluate.remote([shared], *part), list(slices)
            )
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, UserError) else error from None
        except ray.exceptions.RayError as error:
            raise JobFailed(
                f"workers were lost repeatedly ({first_line(error)}). If memory ran out, set a smaller --tile or fewer "
                "--workers"
            ) from error


def _read_package(uri: str, tracking_uri: str | None) -> dict[str, bytes]:
    """Read the files of a packaged counter: workers may not reach MLflow."""
    with storage.scratch_folder("package") as folder:
        download_package(uri, folder, tracking_uri)
        return {name: (folder / name).read_bytes() for name in (DESCRIPTION, GRAPH)}


class _Evaluator:
    """Actor that loads each counter when its first slice arrives."""

    def __init__(self) -> None:
        self._job: Job | None = None
        self._counters: dict[int, LoadedCounter] = {}

    def evaluate(self, shared: "Sequence[ray.ObjectRef[Job]]", number: int, index: int, rows: Sequence[int]) -> Result:
        """Evaluate a slice. Its job comes in a list, unresolved, so that only the first slice fetches it."""
        import ray

        packages, datasets, tile, device, precision = self._job = self._job or ray.get(shared[0])
        if index not in self._counters:
            self._counters[index] = _load(packages[index], device, precision)
        counter = self._counters[index]
        return number, index, list(evaluate_rows(counter, datasets[number], rows, tile)), counter.device.type


def _load(package: dict[str, bytes], device: Device, precision: Precision) -> LoadedCounter:
    with storage.scratch_folder("package") as folder:
        for name, content in package.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return load_counter(str(folder), choose_device(device), precision=precision)
