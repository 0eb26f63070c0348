"""Targets: comparison with scipy's normal distribution, and conservation of mass."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from crowdray.data.targets import cell_mask, density_map, make_targets, peak_density

SIGMA = 3.0


def heads(*points: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([points], dtype=torch.float32), torch.ones(1, len(points))


def reference(points: list[tuple[float, float]], size: tuple[int, int], sigma: float, stride: int) -> np.ndarray:
    total = np.zeros((size[0] // stride, size[1] // stride))
    for x, y in points:
        along = [
            np.diff(norm.cdf(np.arange(0, length + 1, stride), loc=centre, scale=sigma))
            for centre, length in ((y, size[0]), (x, size[1]))
        ]
        total += np.outer(*(axis / axis.sum() for axis in along))
    return total


@pytest.mark.parametrize("stride", [1, 4, 8])
def test_density_map_equals_scipys_gaussian_integrated_over_cells(stride: int) -> None:
    points = [(5.0, 7.5), (40.25, 3.0), (63.9, 31.0), (0.0, 0.0)]
    actual = density_map(*heads(*points), (32, 64), sigma=SIGMA, stride=stride)[0, 0]
    np.testing.assert_allclose(actual.numpy(), reference(points, (32, 64), SIGMA, stride), atol=2e-7)


def test_density_map_sums_to_the_heads_at_borders_outside_and_on_one_pixel() -> None:
    inside = torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([64.0, 32.0])
    border = torch.tensor([(0, 0), (64, 32), (20, 20), (20, 20), (-5, 90), (63.5, 0.5)])
    points = torch.cat([inside, border])[None]
    assert density_map(points, torch.ones(1, 506), (32, 64), sigma=SIGMA).sum().item() == pytest.approx(506, abs=1e-3)


def test_density_map_ignores_padding_and_is_zero_without_heads() -> None:
    points, valid_mask = heads((10, 10), (30, 20))
    valid_mask[0, 1] = 0
    alone = density_map(*heads((10, 10)), (32, 64), sigma=SIGMA)
    torch.testing.assert_close(density_map(points, valid_mask, (32, 64), sigma=SIGMA), alone)
    assert density_map(points, torch.zeros(1, 2), (32, 64), sigma=SIGMA).abs().sum() == 0


def test_density_map_of_a_window_is_a_window_of_the_images_map() -> None:
    generator = torch.Generator().manual_seed(1)
    points = torch.rand(1, 60, 2, generator=generator) * torch.tensor([128.0, 96.0])
    valid_mask = torch.ones(1, 60)
    whole = density_map(points, valid_mask, (96, 128), sigma=SIGMA)
    top, left, height, width = 20, 40, 48, 64
    extent = torch.tensor([[-left, -top, 128 - left, 96 - top]], dtype=torch.float32)
    window = density_map(points - torch.tensor([left, top]), valid_mask, (height, width), sigma=SIGMA, extent=extent)
    torch.testing.assert_close(window, whole[..., top : top + height, left : left + width], atol=1e-7, rtol=1e-4)


def test_density_map_keeps_mass_inside_the_region_of_interest() -> None:
    roi = torch.zeros(1, 1, 32, 64)
    roi[..., 8:, 10:50] = 1
    points, valid_mask = heads((11, 9), (49.5, 31.5), (30, 20))
    density = density_map(points, valid_mask, (32, 64), sigma=SIGMA, roi=roi)
    assert density.sum().item() == pytest.approx(3, abs=1e-4)
    assert (density * (1 - roi)).sum() == 0


def test_density_map_of_a_batch_equals_that_of_each_image() -> None:
    points = torch.rand(3, 7, 2, generator=torch.Generator().manual_seed(2)) * 32
    valid_mask = torch.ones(3, 7)
    together = density_map(points, valid_mask, (32, 32), sigma=SIGMA)
    for index in range(3):
        alone = density_map(points[index : index + 1], valid_mask[:1], (32, 32), sigma=SIGMA)
        torch.testing.assert_close(together[index : index + 1], alone)


def test_segmentation_of_one_head_is_the_disc_above_the_threshold() -> None:
    points, valid_mask = heads((32.5, 32.5))
    depth = torch.full((1, 1, 65, 65), 0.6)
    targets = make_targets(points, valid_mask, (65, 65), depth, sigma=5.0, threshold=0.3)
    rows, columns = torch.meshgrid(torch.arange(65) - 32.0, torch.arange(65) - 32.0, indexing="ij")
    radius = 5.0 * np.sqrt(-2 * np.log(0.3))
    distance = (rows**2 + columns**2).sqrt()
    clear = (distance - radius).abs() > 0.1  # at the edge, the integral over a pixel differs from its centre's value
    assert torch.equal(targets.segmentation[0, 0].bool()[clear], (distance < radius)[clear])
    torch.testing.assert_close(targets.depth, targets.segmentation * 0.6)
    assert targets.density.max().item() == pytest.approx(peak_density(5.0), rel=1e-5)


@pytest.mark.parametrize("size", [(30, 61), (32, 64), (33, 7)])
def test_cell_mask_is_one_with_half_of_the_pixels_of_a_cell(size: tuple[int, int]) -> None:
    """Compare with a loop over cells, including cells in which the image ends."""
    mask = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(3)).round()
    extent = torch.tensor([[0.0, 0.0, size[1], size[0]]])
    actual = cell_mask(mask, extent, 8)[0, 0]
    blocks = [[mask[0, 0, y : y + 8, x : x + 8] for x in range(0, size[1], 8)] for y in range(0, size[0], 8)]
    assert torch.equal(actual, torch.tensor([[float(block.mean() >= 0.5) for block in row] for row in blocks]))


@pytest.mark.parametrize("flip", [False, True])
def test_density_map_with_stride_keeps_mass_when_the_image_ends_in_a_cell(flip: bool) -> None:
    """A window of 64 x 48 contains an image of 58 x 43 at its left end or, flipped, at its right end."""
    height, width, left = 43, 58, 64 - 58 if flip else 0
    points = torch.tensor([[[left + 0.5, 0.5], [left + 57.9, 42.9], [left + 20, 30]]])
    valid_mask = torch.ones(1, 3)
    extent = torch.tensor([[left, 0, left + width, height]], dtype=torch.float32)
    roi = torch.zeros(1, 1, 48, 64)
    roi[..., :height, left : left + width] = 1
    depth = torch.zeros(1, 1, 48, 64)
    for inside in (None, roi):
        targets = make_targets(
            points, valid_mask, (48, 64), depth, sigma=SIGMA, threshold=0.3, stride=8, extent=extent, roi=inside
        )
        assert targets.density.shape == (1, 1, 6, 8)
        assert targets.density.sum().item() == pytest.approx(3, abs=1e-4)
    fine = density_map(points, valid_mask, (48, 64), sigma=SIGMA, extent=extent) * roi
    summed = torch.nn.functional.avg_pool2d(fine, 8) * 64
    torch.testing.assert_close(density_map(points, valid_mask, (48, 64), sigma=SIGMA, stride=8, extent=extent), summed)
