"""Windows cut on a device against those that the loader's threads cut."""

import dataclasses

import numpy as np
import pytest
import torch

from crowdray.data.batch import Batch
from crowdray.data.gpu_cache import GpuImageCache, keep_on
from crowdray.data.image_cache import ImageCache
from crowdray.data.loader import Loader
from crowdray.data.sampling import WindowRule
from crowdray.data.shards import Dataset

CPU = torch.device("cpu")


def batches(store: ImageCache | GpuImageCache, rows: np.ndarray, rule: WindowRule, depth: bool) -> list[Batch]:
    loader = Loader(store, rows, rule, batch=6, repeats=3, seed=1)
    return [batch.to(CPU) for epoch in (1, 2) for batch in loader.epoch(epoch, depth)]


@pytest.mark.parametrize("depth", [True, False])
@pytest.mark.parametrize("downsample", [1, 2])
@pytest.mark.parametrize("context", [0, 8, 200])
def test_windows_cut_on_a_device_are_the_loaders(noise: Dataset, depth: bool, downsample: int, context: int) -> None:
    rule = WindowRule(crop=32, context=context, margin=8, stride=4, flip=0.5, brightness=0.1, colour=0.1)
    store = ImageCache(noise, downsample, True, 1e9)
    rows = noise.rows("train")[1:]
    resident = keep_on(CPU, store, rows, 1e9)
    assert resident is not None
    both = zip(batches(store, rows, rule, depth), batches(resident, rows, rule, depth), strict=True)
    for one, other in both:
        for field in dataclasses.fields(Batch):
            expected, got = (torch.as_tensor(getattr(batch, field.name)) for batch in (one, other))
            assert expected.dtype == got.dtype, field.name
            assert torch.equal(expected, got), field.name
        assert other.image.is_contiguous(memory_format=torch.channels_last) or 1 in other.image.shape


def test_pictures_without_room_stay_with_the_cpu(noise: Dataset) -> None:
    store, rows = ImageCache(noise, 1, True, 0), noise.rows("train")
    pixels = sum(height * width for height, width in noise.sizes("train"))
    assert keep_on(CPU, store, rows, 6 * pixels) is not None
    assert keep_on(CPU, store, rows, 6 * pixels - 1) is None
    assert keep_on(CPU, store, rows[1:], 6 * pixels - 1) is not None


def test_parts_of_what_is_not_cut_yet_are_the_parts_of_what_is(noise: Dataset) -> None:
    store, rows = ImageCache(noise, 1, True, 0), noise.rows("train")
    resident = keep_on(CPU, store, rows, 1e9)
    assert resident is not None
    batch = next(Loader(resident, rows, WindowRule(crop=32, context=8, margin=8, stride=4), batch=6).epoch(1))
    for before, after in zip(batch.parts(4), batch.to(CPU).parts(4), strict=True):
        assert torch.equal(before.to(CPU).image, after.image)


def test_pictures_that_a_device_has_no_room_for_stay_with_the_cpu(
    noise: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("crowdray.data.gpu_cache.ResidentPictures", refuse)
    assert keep_on(torch.device("cpu"), ImageCache(noise, 1, True, 0.0), noise.rows("train"), 2.0**40) is None
