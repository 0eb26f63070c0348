"""Targets against scipy's normal distribution, and the laws of counting maps."""

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
def test_density_equals_scipys_gaussian_integrated_over_each_cell(stride: int) -> None:
    points = [(5.0, 7.5), (40.25, 3.0), (63.9, 31.0), (0.0, 0.0)]
    ours = density_map(*heads(*points), (32, 64), sigma=SIGMA, stride=stride)[0, 0]
    np.testing.assert_allclose(ours.numpy(), reference(points, (32, 64), SIGMA, stride), atol=2e-7)


def test_mass_is_the_number_of_heads_even_at_the_border_outside_and_on_one_pixel() -> None:
    points, present = heads((0, 0), (64, 32), (20, 20), (20, 20), (-5, 90), (63.5, 0.5))
    assert density_map(points, present, (32, 64), sigma=SIGMA).sum().item() == pytest.approx(6, abs=1e-4)


def test_500_heads_on_a_large_image_sum_to_500() -> None:
    points = torch.rand(1, 500, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1024.0, 768.0])
    assert density_map(points, torch.ones(1, 500), (768, 1024), sigma=4.0).sum().item() == pytest.approx(500, abs=1e-3)


def test_padding_adds_nothing_and_an_empty_scene_is_zero() -> None:
    points, present = heads((10, 10), (30, 20))
    present[0, 1] = 0
    alone = density_map(*heads((10, 10)), (32, 64), sigma=SIGMA)
    torch.testing.assert_close(density_map(points, present, (32, 64), sigma=SIGMA), alone)
    assert density_map(points, torch.zeros(1, 2), (32, 64), sigma=SIGMA).abs().sum() == 0


def test_a_windows_map_is_a_window_of_the_images_map() -> None:
    generator = torch.Generator().manual_seed(1)
    points = torch.rand(1, 60, 2, generator=generator) * torch.tensor([128.0, 96.0])
    present = torch.ones(1, 60)
    whole = density_map(points, present, (96, 128), sigma=SIGMA)
    top, left, height, width = 20, 40, 48, 64
    extent = torch.tensor([[-left, -top, 128 - left, 96 - top]], dtype=torch.float32)
    window = density_map(points - torch.tensor([left, top]), present, (height, width), sigma=SIGMA, extent=extent)
    torch.testing.assert_close(window, whole[..., top : top + height, left : left + width], atol=1e-7, rtol=1e-4)


def test_mass_that_would_leave_the_region_of_interest_is_put_back() -> None:
    roi = torch.zeros(1, 1, 32, 64)
    roi[..., 8:, 10:50] = 1
    points, present = heads((11, 9), (49.5, 31.5), (30, 20))
    density = density_map(points, present, (32, 64), sigma=SIGMA, roi=roi)
    assert density.sum().item() == pytest.approx(3, abs=1e-4)
    assert (density * (1 - roi)).sum() == 0


def test_a_batch_equals_its_images_one_by_one() -> None:
    points = torch.rand(3, 7, 2, generator=torch.Generator().manual_seed(2)) * 32
    present = torch.ones(3, 7)
    together = density_map(points, present, (32, 32), sigma=SIGMA)
    for index in range(3):
        alone = density_map(points[index : index + 1], present[:1], (32, 32), sigma=SIGMA)
        torch.testing.assert_close(together[index : index + 1], alone)


def test_mirroring_points_mirrors_the_map() -> None:
    points, present = heads((3.25, 4), (50, 20))
    mirrored = points.clone()
    mirrored[..., 0] = 64 - mirrored[..., 0]
    there = density_map(points, present, (32, 64), sigma=SIGMA)
    torch.testing.assert_close(density_map(mirrored, present, (32, 64), sigma=SIGMA).flip(-1), there)


def test_segmentation_of_one_head_is_the_disc_where_its_gaussian_exceeds_the_fraction() -> None:
    points, present = heads((32.5, 32.5))
    depth = torch.full((1, 1, 65, 65), 0.6)
    targets = make_targets(points, present, (65, 65), depth, sigma=5.0, threshold=0.3)
    rows, columns = torch.meshgrid(torch.arange(65) - 32.0, torch.arange(65) - 32.0, indexing="ij")
    radius = 5.0 * np.sqrt(-2 * np.log(0.3))
    distance = (rows**2 + columns**2).sqrt()
    clear = (distance - radius).abs() > 0.1  # the integral over a pixel differs from its centre's value at the rim
    assert torch.equal(targets.segmentation[0, 0].bool()[clear], (distance < radius)[clear])
    torch.testing.assert_close(targets.depth, targets.segmentation * 0.6)
    assert targets.density.max().item() == pytest.approx(peak_density(5.0), rel=1e-5)


@pytest.mark.parametrize("size", [(30, 61), (32, 64), (33, 7)])
def test_cells_count_with_half_of_their_pixels_in_the_image(size: tuple[int, int]) -> None:
    """Against a loop over the cells, also where the image ends inside them."""
    mask = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(3)).round()
    extent = torch.tensor([[0.0, 0.0, size[1], size[0]]])
    ours = cell_mask(mask, extent, 8)[0, 0]
    blocks = [[mask[0, 0, y : y + 8, x : x + 8] for x in range(0, size[1], 8)] for y in range(0, size[0], 8)]
    assert torch.equal(ours, torch.tensor([[float(block.mean() >= 0.5) for block in row] for row in blocks]))


@pytest.mark.parametrize("mirrored", [False, True])
def test_coarse_cells_hold_all_mass_of_an_image_that_ends_inside_a_cell(mirrored: bool) -> None:
    """A window of 64 x 48 shows an image of 58 x 43, at its left or, mirrored, at its right end."""
    height, width, left = 43, 58, 64 - 58 if mirrored else 0
    points = torch.tensor([[[left + 0.5, 0.5], [left + 57.9, 42.9], [left + 20, 30]]])
    present = torch.ones(1, 3)
    extent = torch.tensor([[left, 0, left + width, height]], dtype=torch.float32)
    roi = torch.zeros(1, 1, 48, 64)
    roi[..., :height, left : left + width] = 1
    depth = torch.zeros(1, 1, 48, 64)
    for inside in (None, roi):
        targets = make_targets(
            points, present, (48, 64), depth, sigma=SIGMA, threshold=0.3, stride=8, extent=extent, roi=inside
        )
        assert targets.density.shape == (1, 1, 6, 8)
        assert targets.density.sum().item() == pytest.approx(3, abs=1e-4)
    fine = density_map(points, present, (48, 64), sigma=SIGMA, extent=extent) * roi
    summed = torch.nn.functional.avg_pool2d(fine, 8) * 64
    torch.testing.assert_close(density_map(points, present, (48, 64), sigma=SIGMA, stride=8, extent=extent), summed)
