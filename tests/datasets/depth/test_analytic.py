"""Analytic depth teachers recover known perspectives; unknown choices raise an error."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import spearmanr

from crowdray.data.sample import make_sample
from crowdray.datasets.depth import TEACHERS, open_teacher
from crowdray.datasets.depth.analytic import (
    DEFAULT_HEAD_SCALE,
    NoDepth,
    PointSpacingDepth,
    SourceDepth,
    fit_head_scale,
    plane_depth,
)
from crowdray.datasets.depth.teacher import DepthInput, DepthTeacher
from crowdray.errors import UserError

Heads = NDArray[np.float64]
HEIGHT, WIDTH, FOCAL = 480, 640, 600.0
NO_HEADS = np.zeros((0, 2))
DROP = 3.3
"""Height in metres of the camera above the plane of the heads."""


def crowd(seed: int, pitch: float, heads: int = 150) -> tuple[Heads, Heads]:
    """Heads distributed evenly on the ground under a pinhole camera: (n, 2) pixels, and depth in metres."""
    rng = np.random.default_rng(seed)
    x, far = rng.uniform(-25, 25, heads * 8), rng.uniform(2, 40, heads * 8)
    depth = far * np.cos(pitch) + DROP * np.sin(pitch)
    points = np.stack([FOCAL * x, FOCAL * (DROP * np.cos(pitch) - far * np.sin(pitch))], axis=1)
    points = points / depth[:, None] + [WIDTH / 2, HEIGHT / 2]
    seen = ((points > 0) & (points < [WIDTH, HEIGHT])).all(axis=1)
    return points[seen][:heads], depth[seen][:heads]


def true_scale(pitch: float) -> float:
    """Ratio of head size, top edge to bottom edge."""
    points, depth = crowd(0, pitch, 2000)
    slope, offset = np.polyfit(points[:, 1], 1 / depth, 1)
    return float(offset / (offset + slope * HEIGHT))


def depth_of(teacher: DepthTeacher, points: Heads = NO_HEADS, **knowledge: Any) -> NDArray[np.float32]:
    sample = make_sample(name="a", split="train", scene="", image=b"", points=points, shape=(HEIGHT, WIDTH))
    depth = teacher.depth(DepthInput(sample=sample, **knowledge))
    assert depth is not None
    return depth


@pytest.mark.parametrize("scale", [0.1, 0.3, 1.0])
def test_fit_head_scale_recovers_the_scale_of_a_plane(scale: float) -> None:
    # Isolated rows of four whose spacing is exactly proportional to head size, a tenth of them disturbed.
    rng = np.random.default_rng(1)
    images = []
    for _ in range(20):
        rows = rng.uniform(0, HEIGHT, 40)
        gap = 6 * (scale + (1 - scale) * rows / HEIGHT) * np.where(rng.random(40) < 0.1, 3, 1)
        left = np.arange(40) * 10000.0
        steps = np.arange(4.0)
        x = (left[:, None] + gap[:, None] * steps).ravel()
        images.append((np.stack([x, np.repeat(rows, 4)], axis=1), HEIGHT))
    # The grid of candidates has steps of 5%.
    assert fit_head_scale(images, one_camera=True) == pytest.approx(scale, rel=0.08)


@pytest.mark.parametrize("pitch", [0.5, 0.6])
def test_fit_head_scale_of_a_known_camera_recovers_depth(pitch: float) -> None:
    images = [crowd(seed, pitch)[0] for seed in range(20)]
    scale = fit_head_scale([(points, HEIGHT) for points in images], one_camera=True)
    assert scale == pytest.approx(true_scale(pitch), rel=0.35)
    points, depth = crowd(99, pitch)
    found = plane_depth(scale, HEIGHT)[points[:, 1].astype(int)]
    assert spearmanr(found, depth).statistic > 0.999
    # Estimated depth is proportional to true depth.
    ratio = found / depth
    assert ratio.std() / ratio.mean() < 0.12


def test_point_spacing_of_one_image_orders_depth_and_falls_back_to_prior() -> None:
    points, depth = crowd(3, 0.5)
    depth_map = depth_of(PointSpacingDepth(), points)
    assert depth_map.shape == (HEIGHT // 4, WIDTH // 4) and depth_map.dtype == np.float32
    rows = (points[:, 1] / 4).astype(int).clip(max=HEIGHT // 4 - 1)
    assert spearmanr(depth_map[rows, 0], depth).statistic > 0.99
    assert (np.diff(depth_map, axis=0) <= 0).all() and np.ptp(depth_map, axis=1).max() == 0
    for few in (NO_HEADS, points[:1]):
        assert fit_head_scale([(few, HEIGHT)], prior=0.4) == 0.4
        fallback = depth_of(PointSpacingDepth(), few)[:, 0]
        np.testing.assert_allclose(fallback, plane_depth(DEFAULT_HEAD_SCALE, HEIGHT // 4), rtol=1e-6)
    assert fit_head_scale([(points[:2], HEIGHT)], prior=0.4) == pytest.approx(0.4, rel=0.5)


def test_point_spacing_of_fixed_camera_ignores_heads_of_the_image() -> None:
    one, other = (
        depth_of(PointSpacingDepth(), crowd(seed, 0.5)[0], head_scale=0.3, fixed_camera=True) for seed in (1, 2)
    )
    np.testing.assert_array_equal(one, other)


def test_fit_head_scale_accepts_coinciding_heads() -> None:
    assert 0 < fit_head_scale([(np.full((10, 2), 7.0), HEIGHT)]) <= 1


def test_source_depth_is_kept() -> None:
    depth = np.linspace(10, 50, HEIGHT)[:, None] * np.ones((1, WIDTH))
    np.testing.assert_allclose(depth_of(SourceDepth("own-1"), source_depth=depth), depth, rtol=1e-6)


def test_open_teacher_auto_takes_the_best_and_errors_list_choices() -> None:
    assert open_teacher("auto", ("perspective", "points", "none")).name == "perspective-1"
    assert isinstance(open_teacher("none", ("points", "none")), NoDepth)
    for choice in ("perspective", "lidar", "own"):
        with pytest.raises(UserError, match=f"--depth {choice}.*auto, points, none"):
            open_teacher(choice, ("points", "none"))
    assert {open_teacher(choice, tuple(TEACHERS)).name.split("-")[0] for choice in TEACHERS} == set(TEACHERS)
    with pytest.raises(UserError, match="--depth points:3 is not available"):
        open_teacher("points:3", ("points", "none"))
