"""Similarity of density maps: known limits, and the formulas of PSNR and SSIM evaluated directly."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import correlate

from crowdray.data.targets import density_map
from crowdray.evaluation.map_quality import SIGMA, map_quality

SIZE = (45, 64)
POINTS = np.array([[10.0, 12.0], [40.5, 30.0], [44.0, 31.0]], dtype=np.float32)


def true_map(stride: int = 1) -> NDArray[np.float64]:
    points = torch.from_numpy(POINTS)[None]
    density = density_map(points, torch.ones(1, len(POINTS)), SIZE, sigma=SIGMA, stride=stride)
    return density[0, 0].double().numpy()


def test_map_quality_equals_its_formulas() -> None:
    truth = true_map()
    noise = np.random.default_rng(0).normal(0, 2e-4, SIZE)
    quality = map_quality(truth + noise, POINTS, SIZE, 1)
    assert quality is not None
    x, y = truth / truth.max(), (truth + noise) / truth.max()
    assert quality.psnr == pytest.approx(10 * np.log10(1 / np.mean((x - y) ** 2)), rel=1e-5)

    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    mean_x, mean_y, xx, yy, xy = (correlate(values, window) for values in (x, y, x * x, y * y, x * y))
    variances = xx - mean_x**2 + yy - mean_y**2
    first, second = 0.01**2, 0.03**2
    ssim = (2 * mean_x * mean_y + first) * (2 * (xy - mean_x * mean_y) + second)
    ssim /= (mean_x**2 + mean_y**2 + first) * (variances + second)
    assert quality.ssim == pytest.approx(ssim[5:-5, 5:-5].mean(), rel=1e-4)


def test_map_quality_of_the_true_map_is_perfect_and_falls_with_its_scale() -> None:
    perfect, half, double = (map_quality(scale * true_map(), POINTS, SIZE, 1) for scale in (1.0, 0.5, 2.0))
    assert perfect and half and double
    assert perfect.ssim == pytest.approx(1.0, abs=1e-6) and perfect.psnr > 100
    assert max(half.ssim, double.ssim) < 0.95
    assert half.psnr == pytest.approx(double.psnr + 20 * np.log10(2))


@pytest.mark.parametrize(("cell", "ssim", "psnr"), [(2, 0.99, 40), (4, 0.95, 30)])
def test_map_quality_hardly_depends_on_the_resolution_of_an_ideal_density(cell: int, ssim: float, psnr: float) -> None:
    quality = map_quality(true_map(cell), POINTS, SIZE, cell)
    assert quality and quality.ssim > ssim and quality.psnr > psnr


def test_map_quality_ignores_all_outside_the_region_of_interest() -> None:
    roi = np.zeros(SIZE, dtype=bool)
    roi[:, 24:] = True
    cells = true_map() * roi
    inside = map_quality(cells, POINTS[1:], SIZE, 1, roi)
    assert inside and inside.ssim == pytest.approx(1.0, abs=1e-3) and inside.psnr > 60
    worse = map_quality(cells + 1e-3 * roi, POINTS[1:], SIZE, 1, roi)
    everywhere = map_quality(cells + 1e-3 * roi, POINTS[1:], SIZE, 1)
    assert worse and everywhere and worse.psnr < everywhere.psnr  # pixels outside, all equal, would flatter


def test_map_quality_without_heads_or_on_a_tiny_image_is_undefined() -> None:
    assert map_quality(np.zeros(SIZE), POINTS[:0], SIZE, 1) is None
    assert map_quality(np.ones((8, 40)), POINTS[:1], (8, 40), 1) is None
