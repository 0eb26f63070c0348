"""Windows cut on the device against those cut by the loader."""

import dataclasses

import numpy as np
import pytest
import torch

from crowdray.config import SamplingConfig
from crowdray.data.batch import Batch
from crowdray.data.gpu_cache import GpuImageCache, build_gpu_cache
from crowdray.data.image_cache import ImageCache
from crowdray.data.loader import Loader
from crowdray.data.sampling import WindowConfig
from crowdray.data.shards import Dataset

CPU = torch.device("cpu")


def batches(images: ImageCache | GpuImageCache, rows: np.ndarray, config: WindowConfig, depth: bool) -> list[Batch]:
    """Batches of an epoch, and microbatches that are moved one by one, of another."""
    loader = Loader(images, rows, config, seed=1)
    second = [part for batch in loader.epoch(2, depth) for part in batch.microbatches(4)]
    return [batch.to(CPU) for batch in (*loader.epoch(1, depth), *second)]


@pytest.mark.parametrize("depth", [True, False])
@pytest.mark.parametrize("downsample", [1, 2])
@pytest.mark.parametrize("context", [0, 8, 200])
def test_gpu_cache_batches_equal_those_of_the_loader(
    noise: Dataset, depth: bool, downsample: int, context: int
) -> None:
    sampling = SamplingConfig(crop=32, context=context, batch=6, crops_per_image=3, brightness=0.1, colour=0.1)
    config = WindowConfig(sampling, margin=8, stride=4)
    cache = ImageCache(noise, downsample, True, 1e9)
    rows = noise.rows("train")[1:]
    gpu_cache = build_gpu_cache(CPU, cache, rows, 1e9)
    assert gpu_cache is not None
    both = zip(batches(cache, rows, config, depth), batches(gpu_cache, rows, config, depth), strict=True)
    for one, other in both:
        for field in dataclasses.fields(Batch):
            expected, got = (torch.as_tensor(getattr(batch, field.name)) for batch in (one, other))
            assert expected.dtype == got.dtype, field.name
            assert torch.equal(expected, got), field.name
        assert other.image.is_contiguous(memory_format=torch.channels_last) or 1 in other.image.shape


def test_build_gpu_cache_returns_none_above_the_memory_limit(noise: Dataset) -> None:
    cache, rows = ImageCache(noise, 1, True, 0), noise.rows("train")
    pixels = sum(height * width for height, width in noise.sizes("train"))
    assert build_gpu_cache(CPU, cache, rows, 6 * pixels) is not None
    assert build_gpu_cache(CPU, cache, rows, 6 * pixels - 1) is None
    assert build_gpu_cache(CPU, cache, rows[1:], 6 * pixels - 1) is not None


def test_build_gpu_cache_returns_none_when_the_device_is_out_of_memory(
    noise: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("crowdray.data.gpu_cache.GpuImageCache", refuse)
    assert build_gpu_cache(torch.device("cpu"), ImageCache(noise, 1, True, 0.0), noise.rows("train"), 2.0**40) is None
