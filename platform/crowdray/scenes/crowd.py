"""Who stands where: groups, queues, gatherings and people on their own, different in every image."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from crowdray.scenes.clutter import MOVABLE, STOCK, stock
from crowdray.scenes.layout import Place, on_plan
from crowdray.scenes.people import POSE_HEIGHT, dress, wardrobe
from crowdray.scenes.raster import Figure
from crowdray.scenes.spec import Floats, SceneSpec

ELBOW_ROOM = 0.42
"""Least distance in metres between two people."""

Feet = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False, slots=True)
class Crowd:
    """The figures of one image, far to near, with their palettes (figures, PARTS, 3)."""

    figures: tuple[Figure, ...]
    palettes: Floats
    is_person: npt.NDArray[np.bool_]


def gather(spec: SceneSpec, where: Place, rng: np.random.Generator) -> Crowd:
    """People and movable clutter of one image."""
    low, high = np.log(spec.min_people + 1), np.log(spec.max_people + 1)
    busiest = low + (high - low) * where.busiest
    target = max(round(float(np.exp(low + (busiest - low) * rng.random() ** 0.5))) - 1, spec.min_people)
    clutter = _apart(_pick_cells(where, rng, 0.8, int(rng.integers(3, 15))))
    people = _positions(where, rng, target + len(clutter))
    people = _apart(np.concatenate([clutter, people]))[len(clutter) :][:target]

    figures = []
    palettes = []
    for x, y in clutter:
        sprite, palette = stock(MOVABLE[int(rng.integers(len(MOVABLE)))])[int(rng.integers(STOCK))]
        figures.append(Figure(sprite, float(x), float(y), float(rng.uniform(0.9, 1.1))))
        palettes.append(palette)
    poses = wardrobe()
    heights = rng.normal(1.71, 0.085, len(people)).clip(1.5, 1.9)
    for (x, y), height, pose in zip(people, heights, rng.integers(len(poses), size=len(people)), strict=True):
        figures.append(Figure(poses[pose], float(x), float(y), float(height) / POSE_HEIGHT))
    colours = np.concatenate([np.array(palettes, np.float32).reshape(-1, 16, 3), dress(rng, len(people), where.sombre)])
    order = sorted(range(len(figures)), key=lambda i: -figures[i].y)
    return Crowd(
        tuple(figures[i] for i in order),
        colours[order],
        np.array([i >= len(clutter) for i in order], np.bool_),
    )


def _pick_cells(where: Place, rng: np.random.Generator, nearness: float, count: int) -> Feet:
    """Ground points; nearness 0 spreads them evenly on the ground, 2 evenly in the image."""
    weight = np.cumsum(where.cells[:, 1].astype(np.float64) ** -nearness)
    chosen = np.searchsorted(weight, rng.random(count) * weight[-1]).clip(0, len(where.cells) - 1)
    return np.asarray(where.cells[chosen] + rng.uniform(-0.12, 0.12, (count, 2)), np.float64)


def _positions(where: Place, rng: np.random.Generator, target: int) -> Feet:
    """`target` ground points in this image's mixture of habits, fewer only where there is no room."""
    nearness = float(rng.uniform(0.2, 1.6))
    habits = rng.dirichlet([1.6, 1.4, 0.5, 0.7])
    found = np.zeros((0, 2))
    for _ in range(6):
        missing = round((target - len(found)) * 1.25) + 3
        share = rng.multinomial(missing, habits)
        parts = [
            _pick_cells(where, rng, nearness, int(share[0])),
            _groups(where, rng, nearness, int(share[1])),
            _queue(where, rng, int(share[2])),
            _gathering(where, rng, int(share[3])),
        ]
        found = np.concatenate([found, rng.permutation(np.concatenate(parts))])
        found = _apart(found[on_plan(where.walkable, found[:, 0], found[:, 1])])
        if len(found) >= target:
            break
        habits = np.array([0.8, 0.2, 0.0, 0.0])
    return found[:target]


def _groups(where: Place, rng: np.random.Generator, nearness: float, count: int) -> Feet:
    """Small groups of 2 to 6: in a ring talking, or abreast walking."""
    parts = [np.zeros((0, 2))]
    while count > 0:
        size = min(int(rng.integers(2, 7)), max(count, 2))
        centre = _pick_cells(where, rng, nearness, 1)
        if rng.random() < 0.5:
            angle = rng.uniform(0, 2 * np.pi) + np.arange(size) * 2 * np.pi / size
            offset = np.stack([np.cos(angle), np.sin(angle)], 1) * (0.3 + 0.09 * size)
        else:
            heading = rng.uniform(0, np.pi)
            offset = (np.arange(size) - size / 2)[:, None] * 0.6 * np.array([[np.cos(heading), np.sin(heading)]])
        parts.append(centre + offset + rng.normal(0, 0.07, (size, 2)))
        count -= size
    return np.concatenate(parts)


def _queue(where: Place, rng: np.random.Generator, count: int) -> Feet:
    """A line of people that bends a little."""
    x, y, heading = where.queues[int(rng.integers(len(where.queues)))]
    bend = heading + np.cumsum(rng.normal(0, 0.09, count))
    step = rng.uniform(0.55, 0.95, count)
    return np.stack([x + np.cumsum(step * np.cos(bend)), y + np.cumsum(step * np.sin(bend))], 1)


def _gathering(where: Place, rng: np.random.Generator, count: int) -> Feet:
    """A dense crowd around a point, open in its middle."""
    x, y = where.stages[int(rng.integers(len(where.stages)))]
    density = rng.uniform(0.5, 2.2)
    inner = rng.uniform(0.3, 2.0)
    radius = np.sqrt(inner**2 + rng.random(count) ** 1.3 * count / density / np.pi)
    angle = rng.uniform(0, 2 * np.pi, count)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], 1)


def _apart(feet: Feet) -> Feet:
    """Without those who stand too close to somebody earlier in the list."""
    if len(feet) < 2:
        return feet
    pairs = cKDTree(feet).query_pairs(ELBOW_ROOM, output_type="ndarray")
    keep = np.ones(len(feet), np.bool_)
    keep[pairs.max(1)] = False
    return feet[keep]
