"""Positions of people in one image: single people, groups, queues and gatherings."""

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from crowdray.scenes.layout import SceneLayout, is_walkable
from crowdray.scenes.people import POSE_HEIGHT, clothing_palettes, person_sprites
from crowdray.scenes.props import MOVABLE_KINDS, VARIANTS, prop_variants
from crowdray.scenes.raster import Figure
from crowdray.scenes.spec import SceneSpec

MIN_DISTANCE = 0.42
"""Minimum distance in metres between two people."""

Feet = npt.NDArray[np.float64]


def sample_crowd(spec: SceneSpec, layout: SceneLayout, rng: np.random.Generator) -> tuple[Figure, ...]:
    """Sample the people and the movable props of one image, far to near."""
    low, high = np.log(spec.min_people + 1), np.log(spec.max_people + 1)
    peak_crowd = low + (high - low) * layout.peak_crowd
    target = max(round(float(np.exp(low + (peak_crowd - low) * rng.random() ** 0.5))) - 1, spec.min_people)
    props = _remove_overlaps(_pick_cells(layout, rng, 0.8, int(rng.integers(3, 15))))
    people = _sample_positions(layout, rng, target + len(props))
    people = _remove_overlaps(np.concatenate([props, people]))[len(props) :][:target]

    figures = []
    for x, y in props:
        kind = MOVABLE_KINDS[int(rng.integers(len(MOVABLE_KINDS)))]
        variant = prop_variants(kind)[int(rng.integers(VARIANTS))]
        figures.append(Figure(kind, *variant, float(x), float(y), rng.uniform(0.9, 1.1)))
    poses = person_sprites()
    heights = rng.normal(1.71, 0.085, len(people)).clip(1.5, 1.9)
    chosen = rng.integers(len(poses), size=len(people))
    clothes = clothing_palettes(rng, len(people), layout.darkness)
    for (x, y), height, pose, palette in zip(people, heights, chosen, clothes, strict=True):
        figures.append(Figure("person", poses[pose], palette, float(x), float(y), float(height) / POSE_HEIGHT))
    return tuple(sorted(figures, key=lambda figure: -figure.y))


def _pick_cells(layout: SceneLayout, rng: np.random.Generator, nearness: float, count: int) -> Feet:
    """Sample visible ground points, uniform on the ground for nearness 0 and in the image for 2."""
    weight = np.cumsum(layout.cells[:, 1].astype(np.float64) ** -nearness)
    chosen = np.searchsorted(weight, rng.random(count) * weight[-1]).clip(0, len(layout.cells) - 1)
    return np.asarray(layout.cells[chosen] + rng.uniform(-0.12, 0.12, (count, 2)), np.float64)


def _sample_positions(layout: SceneLayout, rng: np.random.Generator, target: int) -> Feet:
    """Sample `target` ground points from a random mixture of formations; fewer if the free space is too small."""
    nearness = rng.uniform(0.2, 1.6)
    weights = rng.dirichlet([1.6, 1.4, 0.5, 0.7])
    found = np.zeros((0, 2))
    for _ in range(6):
        missing = round((target - len(found)) * 1.25) + 3
        counts = rng.multinomial(missing, weights)
        parts = [
            _pick_cells(layout, rng, nearness, int(counts[0])),
            _groups(layout, rng, nearness, int(counts[1])),
            _queue(layout, rng, int(counts[2])),
            _gathering(layout, rng, int(counts[3])),
        ]
        found = np.concatenate([found, rng.permutation(np.concatenate(parts))])
        found = _remove_overlaps(found[is_walkable(layout.walkable, found[:, 0], found[:, 1])])
        if len(found) >= target:
            break
        weights = np.array([0.8, 0.2, 0.0, 0.0])
    return found[:target]


def _groups(layout: SceneLayout, rng: np.random.Generator, nearness: float, count: int) -> Feet:
    """Sample groups of 2 to 6 people, standing in a circle or walking side by side."""
    parts = [np.zeros((0, 2))]
    while count > 0:
        size = min(int(rng.integers(2, 7)), max(count, 2))
        centre = _pick_cells(layout, rng, nearness, 1)
        if rng.random() < 0.5:
            angle = rng.uniform(0, 2 * np.pi) + np.arange(size) * 2 * np.pi / size
            offset = np.stack([np.cos(angle), np.sin(angle)], 1) * (0.3 + 0.09 * size)
        else:
            heading = rng.uniform(0, np.pi)
            offset = (np.arange(size) - size / 2)[:, None] * 0.6 * np.array([[np.cos(heading), np.sin(heading)]])
        parts.append(centre + offset + rng.normal(0, 0.07, (size, 2)))
        count -= size
    return np.concatenate(parts)


def _queue(layout: SceneLayout, rng: np.random.Generator, count: int) -> Feet:
    """Sample a slightly curved queue."""
    x, y, heading = layout.queues[int(rng.integers(len(layout.queues)))]
    bend = heading + np.cumsum(rng.normal(0, 0.09, count))
    step = rng.uniform(0.55, 0.95, count)
    return np.stack([x + np.cumsum(step * np.cos(bend)), y + np.cumsum(step * np.sin(bend))], 1)


def _gathering(layout: SceneLayout, rng: np.random.Generator, count: int) -> Feet:
    """Sample a dense crowd around a point with a free centre."""
    x, y = layout.gathering_points[int(rng.integers(len(layout.gathering_points)))]
    density = rng.uniform(0.5, 2.2)
    inner = rng.uniform(0.3, 2.0)
    radius = np.sqrt(inner**2 + rng.random(count) ** 1.3 * count / density / np.pi)
    angle = rng.uniform(0, 2 * np.pi, count)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], 1)


def _remove_overlaps(feet: Feet) -> Feet:
    """Remove points closer than MIN_DISTANCE to an earlier one."""
    pairs = cKDTree(feet).query_pairs(MIN_DISTANCE, output_type="ndarray")
    keep = np.ones(len(feet), np.bool_)
    keep[pairs.max(1)] = False
    return feet[keep]
