"""Tiles against the whole photo."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from crowdray.config import BACKBONES, Config, ModelConfig, SamplingConfig
from crowdray.evaluation.inference import tiled_density
from crowdray.models.build import build_counter
from crowdray.models.export import ExportedCounter


def packaged(backbone: str, downsample: int) -> ExportedCounter:
    model = ModelConfig(backbone, "pooled")
    config = replace(Config(), sampling=SamplingConfig(crop=32, context=0), model=model)
    return ExportedCounter(build_counter(config, 1.0), downsample).eval()


def noise(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("backbone", "downsample", "size"),
    [("cfcn", 1, (131, 250)), ("cfcn", 3, (70, 500)), ("cfcn", 2, (40, 64)), ("csrnet", 1, (40, 470))],
)
def test_tiles_give_the_whole_photos_density(backbone: str, downsample: int, size: tuple[int, int]) -> None:
    counter, photo = packaged(backbone, downsample), noise(*size)
    looked_at = []

    def watched(image: Tensor) -> Tensor:
        looked_at.append(image.shape[-2:].numel())
        density: Tensor = counter(image)
        return density

    with torch.inference_mode():
        whole, ours = counter(photo), tiled_density(watched, counter.geometry, 64)(photo)
    assert ours.shape == whole.shape
    torch.testing.assert_close(ours, whole, atol=1e-6 * float(whole.abs().max()), rtol=1e-4)
    assert ours.sum().item() == pytest.approx(whole.sum().item(), rel=1e-5)
    if max(size) > 64:
        assert len(looked_at) > 1 and max(looked_at) < photo.shape[-2:].numel()


def test_with_less_around_them_tiles_would_differ() -> None:
    """So what the test above compares does depend on the reach."""
    counter, photo = packaged("cfcn", 1), noise(64, 250)
    known = counter.geometry
    with torch.inference_mode():
        whole, short = counter(photo), tiled_density(counter, replace(known, reach=known.grid), 64)(photo)
    assert not torch.allclose(short, whole, atol=1e-6 * float(whole.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_cells_divide_the_grid(backbone: str) -> None:
    geometry = packaged(backbone, 2).geometry
    assert geometry.grid % geometry.cell == 0 and geometry.reach > geometry.grid
