"""Failures of a training step: divergence and lack of memory."""

import torch

from crowdray.data.batch import Batch
from crowdray.errors import JobFailed

OUT_OF_MEMORY_MESSAGES = (
    *("can't allocate memory", "could not create a primitive", "could not create a memory"),  # CPU
    *("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "[CUDA]: out of memory"),
)


class DivergedError(JobFailed):
    """A loss or gradient is not finite; raised on all ranks before any of it is saved."""


class BatchTooLargeError(torch.OutOfMemoryError):
    """The forward and backward pass of a batch do not fit into memory."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(f"{len(batch.rows)} windows do not fit into memory")
        self.batch = batch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, or a library below it, failed to allocate device or host memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in OUT_OF_MEMORY_MESSAGES)
