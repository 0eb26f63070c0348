"""Static scene of each camera: ground, walls, props and the map of where people may stand.

A layout is a pure function of (spec, camera number). Its site axes are s (along the facades) and t (away from the
camera), rotated against the camera's X and Y.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from crowdray.scenes.camera import Camera
from crowdray.scenes.people import HEAD_WIDTH
from crowdray.scenes.plans import SITE_PLANS, PropCounts, Wall, Zone, to_site
from crowdray.scenes.props import VARIANTS, prop_variants
from crowdray.scenes.spec import Bools, Floats, SceneSpec, generator
from crowdray.scenes.sprites import Sprite

CELL_SIZE = 0.25
"""Side in metres of a cell of the walkable map."""
GRID_HALF_WIDTH, GRID_LENGTH = 32.0, 56.0
"""Extent of the walkable map in metres: |X| and Y."""
MIN_HEAD_WIDTH, MAX_HEAD_WIDTH = 1.8, 19.0
"""Width in pixels, at 240 image rows, of heads at the far and the near end of a scene."""


@dataclass(frozen=True, eq=False, slots=True)
class Prop:
    """A static object: a sprite at a ground point with a size and colours."""

    kind: str
    sprite: Sprite
    palette: Floats
    x: float
    y: float
    size: float


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
    props: tuple[Prop, ...]
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


def _add_props(rng: np.random.Generator, counts: PropCounts, walkable: Bools, camera: Camera, far: float) -> list[Prop]:
    """Distribute props over the ground: anywhere, in a row, in unwalkable beds, or at the far end."""
    x, y = _ground_grid()
    in_view = _in_view(camera, x, y) & (y < far + 3)
    allowed = {
        "any": walkable,
        "row": walkable,
        "bed": ~walkable & (y < far - 1),
        "far": (walkable | (y > far - 1)) & (y > far * 0.7),
    }
    props: list[Prop] = []
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
                    props.append(Prop(kind, *prop_variants(kind)[int(number)], float(px), float(py), size))
    return props


def _block_cells(walkable: Bools, prop: Prop) -> None:
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
