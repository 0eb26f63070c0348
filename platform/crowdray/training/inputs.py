"""Images and batches of a training run."""

import numpy as np
from numpy.typing import NDArray

from crowdray.config import Config
from crowdray.data.gpu_cache import build_gpu_cache
from crowdray.data.image_cache import ImageCache
from crowdray.data.loader import Loader
from crowdray.data.sampling import WindowConfig
from crowdray.data.shards import Dataset
from crowdray.data.targets import KERNEL_RADIUS
from crowdray.models.counter import DEPTH, Counter
from crowdray.training.stages import build_stages
from crowdray.training.state import TrainState

PREFETCHED_BATCHES = 3
"""Batches prepared in the background while a GPU trains."""


def open_images(config: Config, dataset: Dataset) -> ImageCache:
    """Open the decoded images of a dataset at the configured resolution and cache size."""
    sampling = config.sampling
    return ImageCache(dataset, sampling.downsample, sampling.roi, sampling.cache_gib * 2**30)


def window_config(config: Config, counter: Counter) -> WindowConfig:
    """Return how windows are cut for this configuration and encoder."""
    encoder, reach = counter.encoder, KERNEL_RADIUS * config.target.sigma
    return WindowConfig(config.sampling, encoder.receptive_radius, encoder.stride, reach)


def build_loader(state: TrainState, images: ImageCache, rows: NDArray[np.int64]) -> Loader:
    """Build the loader of this rank's windows; on a GPU, with its images on the device if they fit."""
    config, device = state.config, state.device
    sampling, on_gpu = config.sampling, device.type == "cuda"
    gpu_images = None
    if on_gpu and not sampling.scale:
        depth = any(DEPTH in stage.tasks for stage in build_stages(config))
        gpu_images = build_gpu_cache(device, images, rows, sampling.gpu_cache_gib * 2**30, depth)
    return Loader(
        gpu_images or images,
        rows,
        window_config(config, state.counter),
        seed=config.seed,
        rank=state.world.rank,
        world=state.world.size,
        pin=on_gpu,
        ahead=PREFETCHED_BATCHES if on_gpu else 0,
    )
