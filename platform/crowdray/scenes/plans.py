"""Site plans of each kind of scene: ground zones, walls and numbers of props.

Site axes: s along the facades, t away from the camera, rotated by an angle against X and Y.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from crowdray.scenes.spec import Bools, Floats


@dataclass(frozen=True, slots=True)
class Zone:
    """A rectangle or an ellipse of one ground material."""

    material: str
    """Kind of `surfaces.ground`."""
    centre: tuple[float, float]
    """Site coordinates s, t in metres."""
    half: tuple[float, float]
    """Half extent along s and t in metres."""
    walkable: bool = True
    """Whether people may stand on it."""
    round: bool = False
    """Whether it is an ellipse."""
    paint: str = ""
    """Kind of `surfaces.markings`; "" for none."""

    def contains(self, s: Floats, t: Floats) -> Bools:
        """Return whether site coordinates lie in the zone."""
        u, v = (s - self.centre[0]) / self.half[0], (t - self.centre[1]) / self.half[1]
        return np.asarray(u * u + v * v <= 1 if self.round else (np.abs(u) <= 1) & (np.abs(v) <= 1))


@dataclass(frozen=True, slots=True)
class Wall:
    """A vertical wall between two ground points (X, Y), seen from the camera's side."""

    start: tuple[float, float]
    end: tuple[float, float]
    height: float
    """Metres."""
    kind: str
    """building, hedge or woods."""
    salt: int
    """Seed of its facade."""


def to_site(angle: float, x: npt.ArrayLike, y: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Convert ground coordinates X, Y to site coordinates s, t."""
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return np.asarray(x * cos - y * sin, np.float32), np.asarray(x * sin + y * cos, np.float32)


def to_ground(angle: float, s: float, t: float) -> tuple[float, float]:
    """Convert site coordinates s, t to ground coordinates X, Y."""
    return s * np.cos(angle) + t * np.sin(angle), -s * np.sin(angle) + t * np.cos(angle)


def _building_row(
    rng: np.random.Generator, angle: float, t: float, s0: float, s1: float, heights: tuple[float, float] = (8, 17)
) -> list[Wall]:
    walls, s = [], s0
    while s < s1:
        length = rng.uniform(9, 18)
        back = rng.uniform(0, 0.6)
        ends = to_ground(angle, s, t + back), to_ground(angle, s + length, t + back)
        walls.append(Wall(*ends, rng.uniform(*heights), "building", int(rng.integers(1 << 30))))
        s += length
    return walls


PropCounts = dict[str, dict[str, int]]
SitePlan = tuple[list[Zone], list[Wall], PropCounts]
"""Ground zones, walls, and the maximum number of props of each kind per arrangement: any, row, bed, far."""


def _plaza(rng: np.random.Generator, angle: float, far: float) -> SitePlan:
    depth = far + rng.uniform(2, 12)
    zones = [
        Zone(str(rng.choice(["slabs", "cobbles", "brick"])), (0, 40), (90, 90)),
        Zone("slabs", (rng.uniform(-4, 4), far * 0.55), (far * 0.3, far * 0.3), round=True),
        Zone("cobbles", (rng.uniform(-12, 12), far * rng.uniform(0.5, 0.8)), (1.6, 60)),
    ]
    for _ in range(int(rng.integers(1, 4))):
        s, t = rng.uniform(-far * 0.5, far * 0.5), rng.uniform(far * 0.4, far * 0.95)
        zones.append(Zone("grass", (s, t), (rng.uniform(1.5, 4), rng.uniform(1, 3)), False, True))
    if rng.random() < 0.5:
        zones.append(Zone("water", (rng.uniform(-6, 6), far * 0.6), (2.4, 2.4), False, True))
    walls = _building_row(rng, angle, depth, -60, 60)
    prop_counts = {
        "bed": {"tree": 4, "bush": 7},
        "any": {"lamp": 4, "globe": 4, "statue": 2, "parasol": 4, "bench": 4, "kiosk": 1, "bin": 2},
        "row": {"bollard": 6, "topiary": 3, "planter": 3},
    }
    return zones, walls, prop_counts


def _street(rng: np.random.Generator, angle: float, far: float) -> SitePlan:
    left, right = -rng.uniform(5, 10), rng.uniform(5, 10)
    zones = [
        Zone("slabs", (0, 40), (90, 90)),
        Zone(str(rng.choice(["cobbles", "brick", "asphalt"])), ((left + right) / 2, 40), ((right - left) * 0.28, 90)),
    ]
    walls = [
        *_side(rng, angle, left),
        *_side(rng, angle, right),
        *_building_row(rng, angle, far + rng.uniform(8, 30), -30, 30),
    ]
    prop_counts = {
        "row": {"lamp": 3, "tree": 2, "bollard": 8, "bicycle": 4, "topiary": 4, "planter": 3},
        "any": {"globe": 3, "board": 3, "bench": 3, "mannequin": 4, "parasol": 3, "bin": 2, "pillar": 2},
    }
    return zones, walls, prop_counts


def _side(rng: np.random.Generator, angle: float, s: float) -> list[Wall]:
    walls, t = [], -4.0
    while t < 62:
        length = rng.uniform(8, 16)
        ends = [to_ground(angle, s, t), to_ground(angle, s, t + length)]
        walls.append(Wall(ends[0], ends[1], rng.uniform(8, 15), "building", int(rng.integers(1 << 30))))
        t += length
    return walls


def _park(rng: np.random.Generator, angle: float, far: float) -> SitePlan:
    zones = [Zone("grass", (0, 40), (90, 90))]
    for _ in range(int(rng.integers(1, 3))):
        zones.append(Zone("gravel", (rng.uniform(-8, 8), 30), (rng.uniform(1.5, 3), 90)))
    zones.append(Zone("gravel", (0, rng.uniform(0.45, 0.7) * far), (90, rng.uniform(1.2, 2.5))))
    zones.append(Zone("gravel", (zones[1].centre[0], zones[-1].centre[1]), (5, 4), round=True))
    if rng.random() < 0.6:
        side = float(rng.choice([-1, 1]))
        zones.append(Zone("water", (side * far * 0.45, far * 0.75), (6, 4), False, True))
    depth = far + rng.uniform(2, 6)
    walls = [Wall(to_ground(angle, -60, depth), to_ground(angle, 60, depth), rng.uniform(1.2, 2.2), "hedge", 1)]
    for back in (5, 14):
        ends = to_ground(angle, -90, depth + back), to_ground(angle, 90, depth + back)
        walls.append(Wall(*ends, rng.uniform(7, 12) + back / 3, "woods", int(rng.integers(1 << 30))))
    prop_counts = {
        "far": {"tree": 12, "conifer": 5},
        "any": {"bush": 12, "bench": 6, "globe": 6, "statue": 2, "lamp": 2, "kiosk": 1, "bin": 3, "bicycle": 2},
        "row": {"topiary": 6},
    }
    return zones, walls, prop_counts


def _station(rng: np.random.Generator, angle: float, far: float) -> SitePlan:
    depth = far + rng.uniform(1, 6)
    road = far * rng.uniform(0.72, 0.85)
    zones = [
        Zone(str(rng.choice(["slabs", "brick"])), (0, 40), (90, 90)),
        Zone("asphalt", (0, road), (90, 3.2), False, paint="lane"),
        Zone("asphalt", (rng.uniform(-6, 6), road), (2.4, 3.2), paint="zebra"),
    ]
    walls = _building_row(rng, angle, depth, -60, 60, (6, 13))
    prop_counts = {
        "row": {"bicycle": 10, "bollard": 10, "planter": 4},
        "any": {"lamp": 4, "globe": 3, "pillar": 4, "bin": 3, "kiosk": 2, "bench": 4, "board": 3, "bush": 4},
        "far": {"tree": 3},
    }
    return zones, walls, prop_counts


SITE_PLANS: dict[str, Callable[[np.random.Generator, float, float], SitePlan]] = {
    "plaza": _plaza,
    "street": _street,
    "park": _park,
    "station": _station,
}
"""Planners of each kind of site, given a generator, the site's angle and the distance to its far end in metres."""
