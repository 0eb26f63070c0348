"""The training and validation rows of a run, checked against its batch size."""

import numpy as np
from numpy.typing import NDArray

from crowdray.config import Config
from crowdray.data.sampling import split_validation
from crowdray.data.shards import Dataset
from crowdray.errors import InfeasibleConfigError, UserError


def split_rows(config: Config, dataset: Dataset, workers: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split the dataset's training split into training and validation rows.

    Returns:
        Training rows and validation rows, each ascending.

    Raises:
        UserError: either part is empty.
        InfeasibleConfigError: a batch has fewer windows than there are microbatches over all workers.
    """
    sampling = config.sampling
    training, validation = split_validation(
        dataset.rows("train"), sampling.validation_fraction, sampling.validation, config.seed
    )
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
    return training, validation
