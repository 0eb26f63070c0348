"""The split of a dataset's training images into training and validation rows."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from crowdray.config import Config
from crowdray.data.shards import Dataset
from crowdray.errors import InfeasibleConfigError, UserError

_VALIDATION_STREAM, _SUBSET_STREAM = 1, 5
"""First entry of the random seed, see `data.sampling`."""


def split_rows(config: Config, dataset: Dataset, workers: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split the training images into training and validation rows, and check the batch size.

    Returns:
        Training rows and validation rows, each ascending.

    Raises:
        UserError: If either part is empty, or sampling.images is larger than the training split.
        InfeasibleConfigError: If a batch has fewer windows than all workers have microbatches.
    """
    sampling = config.sampling
    rows = dataset.rows("train")
    if sampling.images > len(rows):
        raise UserError(f"sampling.images is {sampling.images}, but {dataset.uri} has {len(rows)} training images")
    if sampling.images:
        rows = draw_subset(rows, sampling.images, config.seed)
    training, validation = split_validation(rows, sampling.validation_fraction, sampling.validation, config.seed)
    if len(training) == 0 or len(validation) == 0:
        raise UserError(
            f"{dataset.uri} leaves {len(training)} images for training and {len(validation)} for validation; both "
            "need at least one: change sampling.validation_fraction or convert more images"
        )
    batch = min(sampling.batch, len(training) * sampling.crops_per_image)
    steps = config.optimizer.grad_accumulation_steps
    if batch < workers * steps:
        raise InfeasibleConfigError(
            f"a batch of {batch} windows is too small for {workers} workers with {steps} gradient accumulation steps "
            "each: change --workers, --sampling.batch or --optimizer.grad_accumulation_steps"
        )
    microbatch = batch // (workers * steps)
    if config.loss.placebo and microbatch < 2 * sampling.crops_per_image:
        raise InfeasibleConfigError(
            f"loss.placebo needs two images in each microbatch, which is {microbatch} windows, with "
            f"{sampling.crops_per_image} windows from each image: raise --sampling.batch, or lower "
            "--sampling.crops-per-image, --workers or --optimizer.grad-accumulation-steps"
        )
    return training, validation


def draw_subset(rows: NDArray[np.int64], number: int, seed: int) -> NDArray[np.int64]:
    """A random subset of rows, ascending; a larger subset with the same seed contains it."""
    order = np.random.default_rng((_SUBSET_STREAM, seed)).permutation(len(rows))
    return np.sort(rows[order[:number]])


def split_validation(
    rows: NDArray[np.int64], fraction: float, method: Literal["random", "run"], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training and validation rows, each ascending; validation rows are drawn one by one or as one consecutive run."""
    rng = np.random.default_rng((_VALIDATION_STREAM, seed))
    held_out = round(len(rows) * fraction)
    kept = len(rows) - held_out
    chosen = rng.permutation(len(rows))[kept:] if method == "random" else rng.integers(kept + 1) + np.arange(held_out)
    return np.sort(np.delete(rows, chosen)), np.sort(rows[chosen])
