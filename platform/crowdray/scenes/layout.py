"""Static scene of each camera: ground, walls, props and the map of where people may stand.

A layout is a pure function of (spec, camera number). Its site axes are s (along the facades) and t (away from the
camera), rotated against the camera's X and Y.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from crowdray.scenes.camera import Camera
from crowdray.scenes.people import HEAD_WIDTH
from crowdray.scenes.props import VARIANTS, prop_variants
from crowdray.scenes.raster import Figure
from crowdray.scenes.spec import Bools, Floats, SceneSpec, generator

CELL_SIZE = 0.25
"""Side in metres of a cell of the walkable map."""
GRID_HALF_WIDTH, GRID_LENGTH = 32.0, 56.0
"""Extent of the walkable map in metres: |X| and Y."""
MIN_HEAD_WIDTH, MAX_HEAD_WIDTH = 1.8, 19.0
"""Width in pixels, at 240 image rows, of heads at the far and the near end of a scene."""


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


PropCounts = dict[str, dict[str, int]]
SitePlan = tuple[list[Zone], list[Wall], PropCounts]
"""Ground zones, walls, and the maximum number of props of each kind per arrangement: any, row, bed, far."""


@dataclass(frozen=True, eq=False, slots=True)
class SceneLayout:
    """Everything in a camera's scene that is the same in all of its images."""

    kind: str
    """Key of SITE_PLANS."""
    salt: int
    """Seed of its textures."""
    camera: Camera
    angle: float
    """Rotation of the site axes in radians."""
    sun: tuple[float, float, float]
    """Unit vector to the sun: right, forward, up."""
    night: bool
    zones: tuple[Zone, ...]
    walls: tuple[Wall, ...]
    props: tuple[Figure, ...]
    walkable: Bools
    """Where people may stand: (Y, X) cells of CELL_SIZE metres, Y from 0, X from -GRID_HALF_WIDTH."""
    cells: Floats
    """(M, 2) centres X, Y of the walkable cells in view."""
    gathering_points: tuple[tuple[float, float], ...]
    """Centres of gatherings on the ground."""
    queues: tuple[tuple[float, float, float], ...]
    """Start point and direction in radians of queues."""
    peak_crowd: float
    """Number of people in the most crowded image, as a position in [0, 1] in the spec's range on a log scale."""
    darkness: float
    """How dark clothes are, in [0, 1]."""
    roi: Bools
    """(H, W) region in which people are annotated."""


def is_walkable(walkable: Bools, x: npt.ArrayLike, y: npt.ArrayLike) -> Bools:
    """Look up ground points in a walkable map; False outside it and for NaN."""
    i = np.floor(np.nan_to_num(np.asarray(y), nan=-1.0).clip(-1, 1e4) / CELL_SIZE).astype(np.int64)
    j = np.floor((np.nan_to_num(np.asarray(x), nan=1e4).clip(-1e4, 1e4) + GRID_HALF_WIDTH) / CELL_SIZE).astype(np.int64)
    known = (i >= 0) & (i < walkable.shape[0]) & (j >= 0) & (j < walkable.shape[1])
    return np.asarray(known & walkable[np.where(known, i, 0), np.where(known, j, 0)])


@lru_cache(maxsize=64)
def scene_layout(spec: SceneSpec, number: int) -> SceneLayout:
    """Build the scene of camera `number`."""
    rng = generator(spec.seed, 1, number)
    kinds = generator(spec.seed, 2).permutation(list(SITE_PLANS))
    kind = str(kinds[number % len(kinds)])
    camera = _camera(spec, rng)
    night = number % 6 == 4  # one camera in six records at night
    azimuth, elevation = rng.choice([-1, 1]) * np.pi * rng.uniform(0.12, 0.8), np.deg2rad(rng.uniform(18, 58))
    if night:
        azimuth, elevation = 0.0, np.deg2rad(80)
    sun = (np.cos(elevation) * np.sin(azimuth), np.cos(elevation) * np.cos(azimuth), np.sin(elevation))
    angle = rng.uniform(-0.45, 0.45) * (0.35 if kind == "street" else 1.0)
    salt = int(rng.integers(1 << 30))
    unit = camera.focal * 240 / spec.height
    far = min(unit * HEAD_WIDTH / MIN_HEAD_WIDTH, 50.0)
    near = max(unit * HEAD_WIDTH / MAX_HEAD_WIDTH, 3.0)

    zones, walls, counts = SITE_PLANS[kind](rng, angle, far)
    walkable = _walkable_map(zones, walls, angle, near, far)
    props = _add_props(rng, counts, walkable, camera, far)
    for prop in props:
        _block_cells(walkable, prop)
    cells = _visible_cells(walkable, camera)
    picks = cells[rng.integers(len(cells), size=5)]
    roi = _roi(camera, walkable)
    if int((number + 1) * spec.masked_fraction) > int(number * spec.masked_fraction):
        roi &= _polygon(rng, spec)
    return SceneLayout(
        kind=kind,
        salt=salt,
        camera=camera,
        angle=angle,
        sun=(float(sun[0]), float(sun[1]), float(sun[2])),
        night=night,
        zones=tuple(zones),
        walls=tuple(walls),
        props=tuple(props),
        walkable=walkable,
        cells=cells,
        gathering_points=tuple((float(x), float(y)) for x, y in picks[:2]),
        queues=tuple((float(x), float(y), rng.uniform(0, 2 * np.pi)) for x, y in picks[2:4]),
        peak_crowd=rng.uniform(0.8, 1.0),
        darkness=rng.uniform(0, 1),
        roi=roi,
    )


def _camera(spec: SceneSpec, rng: np.random.Generator) -> Camera:
    """Sample a camera at 3.3 to 11 m, pitched to a random horizon, often above the image."""
    altitude = float(np.exp(rng.uniform(np.log(3.3), np.log(11))))
    focal = rng.uniform(0.95, 1.75) * spec.height
    horizon = rng.uniform(-0.3, 0.26) * spec.height
    return Camera(spec.width, spec.height, focal, altitude, float(np.arctan2(spec.height / 2 - horizon, focal)))


def _ground_grid() -> tuple[Floats, Floats]:
    x = (np.arange(round(2 * GRID_HALF_WIDTH / CELL_SIZE)) + 0.5) * CELL_SIZE - GRID_HALF_WIDTH
    y = (np.arange(round(GRID_LENGTH / CELL_SIZE)) + 0.5) * CELL_SIZE
    gx, gy = np.meshgrid(x.astype(np.float32), y.astype(np.float32))
    return gx, gy


def _walkable_map(zones: list[Zone], walls: list[Wall], angle: float, near: float, far: float) -> Bools:
    """Mark where people may stand: in walkable zones, between near and far, in front of every wall."""
    x, y = _ground_grid()
    s, t = to_site(angle, x, y)
    walkable = np.zeros(x.shape, np.bool_)
    for zone in zones:
        walkable[zone.contains(s, t)] = zone.walkable
    walkable &= (y > near) & (y < far)
    for wall in walls:
        ax, ay = wall.start
        dx, dy = wall.end[0] - ax, wall.end[1] - ay
        length = np.hypot(dx, dy)
        side = (dx * (y - ay) - dy * (x - ax)) / length
        home = (dx * (0 - ay) - dy * (0 - ax)) / length
        walkable &= side * np.sign(home) > 0.6
    return walkable


def _add_props(
    rng: np.random.Generator, counts: PropCounts, walkable: Bools, camera: Camera, far: float
) -> list[Figure]:
    """Distribute props over the ground: anywhere, in a row, in unwalkable beds, or at the far end."""
    x, y = _ground_grid()
    in_view = _in_view(camera, x, y) & (y < far + 3)
    allowed = {
        "any": walkable,
        "row": walkable,
        "bed": ~walkable & (y < far - 1),
        "far": (walkable | (y > far - 1)) & (y > far * 0.7),
    }
    props: list[Figure] = []
    for arrangement, kinds in counts.items():
        for kind, limit in kinds.items():
            nearest = 9 if kind in ("tree", "conifer", "kiosk", "parasol") else 4
            spots = np.argwhere(in_view & allowed[arrangement] & (y > nearest))
            count = int(rng.integers(limit // 2, limit + 1))
            if count == 0 or len(spots) == 0:
                continue
            rows, columns = spots[rng.integers(len(spots), size=count)].T
            points = np.stack([x[rows, columns], y[rows, columns]], 1)
            choice = rng.integers(VARIANTS, size=count)
            if arrangement == "row":
                heading, gap = rng.uniform(-0.5, 0.5), rng.uniform(1.0, 3.0)
                steps = (np.arange(count) - count / 2)[:, None] * gap
                points = points[0] + steps * np.array([np.cos(heading), np.sin(heading)])
                choice[:] = choice[0]
            for (px, py), number in zip(points, choice, strict=True):
                if py >= 3.5:
                    size = rng.uniform(0.93, 1.07)
                    props.append(Figure(kind, *prop_variants(kind)[int(number)], float(px), float(py), size))
    return props


def _block_cells(walkable: Bools, prop: Figure) -> None:
    """Mark the cells under a prop as not walkable."""
    left, right, _ = prop.sprite.size
    trunk_radius = {"tree": 0.4, "conifer": 0.6, "lamp": 0.25, "globe": 0.3, "topiary": 0.35, "parasol": 1.2}
    radius = trunk_radius.get(prop.kind, max(left, right))
    x, y = _ground_grid()
    walkable[(x - prop.x) ** 2 + ((y - prop.y) * 1.2) ** 2 < (radius + 0.15) ** 2] = False


def _in_view(camera: Camera, x: Floats, y: Floats) -> Bools:
    """Return whether an average head above ground points projects into the image, with a margin."""
    projected = camera.project(np.stack([x, y, np.full_like(x, 1.6)], -1))
    margin_x, margin_y = 0.04 * camera.width, 0.05 * camera.height
    inside_x = (projected[..., 0] > -margin_x) & (projected[..., 0] < camera.width + margin_x)
    return np.asarray(inside_x & (projected[..., 1] > -margin_y) & (projected[..., 1] < camera.height + margin_y))


def _visible_cells(walkable: Bools, camera: Camera) -> Floats:
    x, y = _ground_grid()
    chosen = walkable & _in_view(camera, x, y)
    if not chosen.any():
        chosen = walkable if walkable.any() else _in_view(camera, x, y)
    return np.stack([x[chosen], y[chosen]], 1)


def _roi(camera: Camera, walkable: Bools) -> Bools:
    """Mark the pixels whose rays pass over walkable ground at a height of 2 m or less."""
    columns, rows = np.arange(camera.width) + 0.5, np.arange(camera.height) + 0.5
    roi = np.zeros((camera.height, camera.width), np.bool_)
    for plane in np.linspace(0, 2.0, 21):
        roi |= is_walkable(walkable, *camera.ground(columns, rows, float(plane)))
    closed = ndimage.uniform_filter(roi.astype(np.float32), 7, mode="nearest") > 0.5
    return np.asarray(ndimage.binary_fill_holes(roi | closed), np.bool_)


def _polygon(rng: np.random.Generator, spec: SceneSpec) -> Bools:
    """Sample a polygon, as drawn by an annotator, without the upper corners and strips at the sides."""
    cuts = rng.uniform([0.05, 0.15, 0.0, 0.0], [0.3, 0.45, 0.12, 0.12])
    x, y = np.meshgrid((np.arange(spec.width) + 0.5) / spec.width, (np.arange(spec.height) + 0.5) / spec.height)
    left, right = x / max(cuts[0], 1e-3) + y / cuts[1] > 1, (1 - x) / max(cuts[0], 1e-3) + y / cuts[1] > 1
    return np.asarray(left & right & (x > cuts[2]) & (x < 1 - cuts[3]))


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
