"""Tiled inference equals inference on the whole image."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from crowdray.config import BACKBONES, Config, ModelConfig, SamplingConfig
from crowdray.evaluation.inference import tiled_density
from crowdray.models.build import build_counter
from crowdray.models.export import ExportedCounter


def exported(backbone: str, downsample: int) -> ExportedCounter:
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
def test_tiled_density_equals_density_of_the_whole_image(backbone: str, downsample: int, size: tuple[int, int]) -> None:
    counter, image = exported(backbone, downsample), noise(*size)
    sizes = []

    def recorded(tile: Tensor) -> Tensor:
        sizes.append(tile.shape[-2:].numel())
        density: Tensor = counter(tile)
        return density

    with torch.inference_mode():
        whole, tiled = counter(image), tiled_density(recorded, counter.geometry, 64)(image)
    assert tiled.shape == whole.shape
    torch.testing.assert_close(tiled, whole, atol=1e-6 * float(whole.abs().max()), rtol=1e-4)
    assert tiled.sum().item() == pytest.approx(whole.sum().item(), rel=1e-5)
    if max(size) > 64:
        assert len(sizes) > 1 and max(sizes) < image.shape[-2:].numel()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_geometry_grid_is_a_multiple_of_the_cell(backbone: str) -> None:
    geometry = exported(backbone, 2).geometry
    assert geometry.grid % geometry.cell == 0 and geometry.reach > geometry.grid
