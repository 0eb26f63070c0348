"""Evaluation of counters on datasets: what is evaluated, and the rows that one process evaluates."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from crowdray.config import Device, Precision
from crowdray.credentials import redacted
from crowdray.data.shards import Dataset
from crowdray.errors import UserError
from crowdray.evaluation.images import FailedImage, evaluate_image
from crowdray.evaluation.report import EvaluatedDataset, EvaluatedModel, Outcome
from crowdray.pipeline.predict import choose_device, tiled
from crowdray.registry.loading import LoadedCounter, load_counter, resolve_uri
from crowdray.registry.tracking import DATA_DIGEST, GIT_REVISION


@dataclass(frozen=True)
class LoadedModel:
    """A counter to evaluate."""

    model: EvaluatedModel
    """What it is."""
    counter: LoadedCounter
    """The counter itself."""
    uri: str
    """URI that does not change, with credentials."""


def load_models(
    uris: Sequence[str], device: Device, tracking_uri: str | None, precision: Precision
) -> list[LoadedModel]:
    """Load the counters to evaluate; arguments as of `load_counter`.

    Raises:
        UserError: A counter is given twice, or cannot be loaded.
    """
    versions = [resolve_uri(uri, tracking_uri) for uri in uris]
    if repeated := [uri for number, uri in enumerate(uris) if versions[number] in versions[:number]]:
        raise UserError(f"--model has {repeated[0]}, a counter that it has already; give each once")
    return [_load(*pair, device, tracking_uri, precision) for pair in zip(uris, versions, strict=True)]


def _load(uri: str, version: str, device: Device, tracking_uri: str | None, precision: Precision) -> LoadedModel:
    counter = load_counter(version, choose_device(device), tracking_uri, precision=precision)
    recorded, trained = counter.metadata.get("tags"), counter.training_data
    tags = recorded if isinstance(recorded, Mapping) else {}
    model = EvaluatedModel(
        uri=redacted(uri),
        version=redacted(version),
        digest=counter.digest,
        trained_on=str(trained or ""),
        training_dataset=trained.dataset if trained else "",
        cell=counter.geometry.cell,
        downsample=counter.geometry.downsample,
        precision=counter.precision,
        revision=str(tags.get(GIT_REVISION, "")),
        training_digest=str(tags.get(DATA_DIGEST, "")),
    )
    return LoadedModel(model, counter, version)


def describe_dataset(dataset: Dataset, split: str) -> EvaluatedDataset:
    """Describe a split. Raises UserError for an unknown one."""
    counts = dataset.counts(split)
    index = dataset.index
    return EvaluatedDataset(redacted(dataset.uri), index.name, index.digest, split, len(counts), int(counts.sum()))


def evaluate_rows(
    counter: LoadedCounter, dataset: Dataset, rows: Sequence[int], tile: int, threads: int = 1
) -> Iterator[Outcome]:
    """Evaluate images, in the order of `rows`; one that cannot be decoded or counted does not stop the others.

    On a CPU, each image is counted by one thread, and `threads` of them at the same time, so that no number depends on
    how many CPUs there are.

    Raises:
        UserError: A shard of the dataset cannot be read.
    """
    density = tiled(counter, tile)

    def evaluate(row: int) -> Outcome:
        name = dataset.sample(row).name
        try:
            return evaluate_image(density, dataset, row, counter.geometry, maps=True, interval=interval)
        except UserError as error:
            return FailedImage(row, name, str(error))

    def interval(image: NDArray[np.uint8], whole: float, inside: float) -> tuple[float, float] | None:
        known = counter.training_data
        unlike = bool(known and known.differences(image, whole))
        return counter.interval.around(inside) if counter.interval and not unlike else None

    with _single_threaded_torch():
        if counter.device.type != "cpu":
            yield from map(evaluate, rows)
            return
        with ThreadPoolExecutor(threads, "evaluate", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(evaluate, rows)


@contextmanager
def _single_threaded_torch() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
