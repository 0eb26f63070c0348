"""Promotion of a candidate: the evidence is gathered on a test split, then the registry decides.

The candidate and the champion count the same images. This is the one step that chooses by the test split.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crowdray import storage
from crowdray.config import BACKBONES, Device
from crowdray.data.decoding import decode_image
from crowdray.data.shards import Dataset
from crowdray.errors import UserError, first_line
from crowdray.evaluation.images import evaluate_images
from crowdray.evaluation.inference import TILE, image_to_tensor
from crowdray.evaluation.intervals import mean_interval
from crowdray.models.build import build_counter
from crowdray.models.export import ExportedCounter
from crowdray.pipeline.predict import choose_device, tiled
from crowdray.pipeline.run import RESULT, TRAINED
from crowdray.registry.clean_load import clean_load_problem
from crowdray.registry.loading import LoadedCounter, load_counter
from crowdray.registry.packaging import same_density
from crowdray.registry.promotion import Bounds, Decision, Evidence, FetchedVersion, PromotionRegistry
from crowdray.training.checkpoint import load_checkpoint
from crowdray.training.result import TrainingResult

_ROUNDS, _MAX_ROUNDS = 15, 150
"""Alternating runs of both counters whose shortest times are compared."""


def promote(
    registry: PromotionRegistry,
    candidate: str | None,
    data: str,
    split: str,
    bounds: Bounds,
    *,
    device: Device = "auto",
    on_status: Callable[[str], None] = lambda message: None,
) -> Decision:
    """Compare a version with the champion, and make it the champion if it is better; record the decision either way.

    Args:
        registry: The registered model.
        candidate: models:/NAME/VERSION or models:/NAME@ALIAS; the alias `candidate` by default.
        data: URI of the dataset.
        split: Its split; no version may have been trained on it.
        bounds: What the candidate must keep.
        device: Where images are counted.
        on_status: Receives messages on the progress.

    Raises:
        UserError: A version, the dataset or the split does not exist, or the version is the champion already.
        JobFailed: Another process changed the champion meanwhile.
    """
    number, champion = registry.resolve(candidate), registry.champion()
    if number == champion:
        raise UserError(f"version {number} of {registry.name} is the champion already; name another --candidate")
    dataset = Dataset.open(data)
    rows = dataset.rows(split).tolist()
    with storage.scratch_folder("promotion") as scratch:
        on_status(f"loading version {number}" + (f" and champion version {champion}" if champion else ""))
        fetched = [
            registry.fetch(version, scratch / str(version)) for version in (number, champion) if version is not None
        ]
        counters = [load_counter(str(version.folder), choose_device(device)) for version in fetched]
        on_status(f"counting {len(rows):,} images of {split}")
        errors, truth = zip(*[_absolute_errors(counter, dataset, rows) for counter in counters], strict=True)
        if champion is None:
            errors = (*errors, np.abs(truth[0] - _mean_count(dataset, split)))
        image = image_to_tensor(decode_image(dataset.sample(rows[0]).image), torch.device("cpu"))
        on_status("loading the candidate in a clean environment")
        on_cpu = load_counter(str(fetched[0].folder))
        parent, differs = _compare_with_parent(on_cpu(image), image, fetched[0])
        evidence = Evidence(
            candidate=number,
            champion=champion,
            data=dataset.uri,
            data_digest=dataset.digest,
            split=split,
            images=len(rows),
            candidate_mae=float(errors[0].mean()),
            opponent_mae=float(errors[1].mean()),
            gain=mean_interval(errors[1] - errors[0]),
            latency_ratio=_latency_ratio(counters, image, bounds.latency_ratio) if champion else None,
            size_ratio=fetched[0].size / fetched[1].size if champion else None,
            clean_load=clean_load_problem(fetched[0].folder, image, on_cpu(image)),
            parent=parent,
            parent_differs=differs,
        )
    return registry.decide(evidence, bounds)


def _absolute_errors(
    counter: LoadedCounter, dataset: Dataset, rows: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Absolute errors and true counts of the images, inside their regions of interest."""
    images = evaluate_images(tiled(counter, TILE), dataset, rows, geometry=counter.geometry)
    counts = np.array([(image.inside.predicted, image.inside.truth) for image in images], dtype=np.float64)
    return np.abs(counts[:, 0] - counts[:, 1]), counts[:, 1]


def _mean_count(dataset: Dataset, split: str) -> float:
    return float(dataset.counts("train" if "train" in dataset.index.splits else split).mean())


def _latency_ratio(counters: Sequence[LoadedCounter], image: Tensor, bound: float) -> float:
    """Shortest time of the first counter in relation to that of the second.

    Other work on the machine makes a round longer, never shorter: a ratio above the bound is measured further.
    """
    shortest = [float("inf")] * len(counters)
    for number in range(_MAX_ROUNDS):
        if number >= _ROUNDS and shortest[0] <= bound * shortest[1]:
            break
        for index, counter in enumerate(counters):
            start = time.perf_counter()
            counter(image).sum().item()  # waits for a GPU
            shortest[index] = min(shortest[index], time.perf_counter() - start)
    return shortest[0] / shortest[1]


def _compare_with_parent(density: Tensor, image: Tensor, fetched: FetchedVersion) -> tuple[str, bool]:
    """Compare a density with that of the run's whole network, with its auxiliary decoders.

    Returns:
        Why it could not be compared, and whether it differs.
    """
    if fetched.run_folder is None:
        return "the run of the version is gone", False
    trained = storage.join(fetched.run_folder, TRAINED)
    try:
        if not storage.exists(storage.join(trained, RESULT)):
            return f"{trained} is not reachable from here", False
        with storage.local_copy(trained) as folder:
            expected = _parent_density(folder, image)
    except (UserError, RuntimeError, KeyError) as error:  # missing weights, or some that do not fit
        return first_line(error), False
    if expected is None:
        return "its backbone is code outside of crowdray, which a promotion does not run", False
    return "", not same_density(density, expected)


def _parent_density(folder: Path, image: Tensor) -> Tensor | None:
    checkpoint = load_checkpoint(folder)
    if checkpoint.config.model.backbone not in BACKBONES:
        return None
    result = TrainingResult.from_json((folder / RESULT).read_bytes(), str(folder / RESULT))
    parent = build_counter(checkpoint.config, checkpoint.progress.density_scale).eval()
    parent.load_state_dict(checkpoint.weights, strict=False)  # without the count decoder
    parent.load_state_dict(checkpoint.best_weights[result.best_stage], strict=False)
    whole = ExportedCounter(parent, checkpoint.config.sampling.downsample)
    whole.counter = parent  # with its auxiliary decoders
    with torch.inference_mode():
        density: Tensor = whole(image)
    return density
