"""The places: what the camera of each scene looks at, drawn up in plan on the ground.

Every place is a pure function of (spec, camera number). Its own axes are s (along its facades) and t (away
from the camera), turned by some angle against the camera's X and Y.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from crowdray.scenes.camera import Camera
from crowdray.scenes.clutter import STOCK, stock
from crowdray.scenes.people import HEAD_WIDTH
from crowdray.scenes.plans import PLANS, Wall, Wanted, Zone, turn
from crowdray.scenes.spec import Bools, Floats, SceneSpec, generator
from crowdray.scenes.sprites import Sprite

CELL = 0.25
"""Side in metres of a cell of the plan of where people may stand."""
PLAN_HALF, PLAN_FAR = 32.0, 56.0
SMALLEST_HEAD, LARGEST_HEAD = 1.8, 19.0
"""Width in pixels, at 240 image rows, of the heads of people at the far and the near end of a place."""


@dataclass(frozen=True, eq=False, slots=True)
class Thing:
    """A sprite at a ground point, with its own size and colours."""

    kind: str
    sprite: Sprite
    palette: Floats
    x: float
    y: float
    size: float


@dataclass(frozen=True, eq=False, slots=True)
class Place:
    """Everything about one camera's scene that does not change from image to image."""

    kind: str
    salt: int
    camera: Camera
    angle: float
    sun: tuple[float, float, float]
    """Unit vector towards the sun: right, forward, up."""
    night: bool
    zones: tuple[Zone, ...]
    walls: tuple[Wall, ...]
    things: tuple[Thing, ...]
    walkable: Bools
    """Plan of where people may stand, (Y, X) cells of CELL metres, Y from 0, X from -PLAN_HALF."""
    cells: Floats
    """(M, 2) centres X, Y of the walkable cells that the camera can see."""
    stages: tuple[tuple[float, float], ...]
    """Ground points where people gather."""
    queues: tuple[tuple[float, float, float], ...]
    """Ground point and direction in radians of queues."""
    busiest: float
    """Number of people in the fullest image, in [0, 1] of the spec's range on a logarithmic scale."""
    sombre: float
    """How dark people dress here, in [0, 1]."""
    roi: Bools
    """(H, W) where people are annotated."""


def on_plan(plan: Bools, x: npt.ArrayLike, y: npt.ArrayLike) -> Bools:
    """The plan's value at ground points; False outside it and where a coordinate is NaN."""
    i = np.floor(np.nan_to_num(np.asarray(y), nan=-1.0).clip(-1, 1e4) / CELL).astype(np.int64)
    j = np.floor((np.nan_to_num(np.asarray(x), nan=1e4).clip(-1e4, 1e4) + PLAN_HALF) / CELL).astype(np.int64)
    known = (i >= 0) & (i < plan.shape[0]) & (j >= 0) & (j < plan.shape[1])
    return np.asarray(known & plan[np.where(known, i, 0), np.where(known, j, 0)])


@lru_cache(maxsize=64)
def place(spec: SceneSpec, number: int) -> Place:
    """The place that camera `number` looks at."""
    rng = generator(spec.seed, 1, number)
    kinds = generator(spec.seed, 2).permutation(list(PLANS))
    kind = str(kinds[number % len(kinds)])
    camera = _camera(spec, rng)
    night = number % 6 == 4  # one camera in six works by night
    azimuth, elevation = rng.choice([-1, 1]) * np.pi * rng.uniform(0.12, 0.8), np.deg2rad(rng.uniform(18, 58))
    if night:
        azimuth, elevation = 0.0, np.deg2rad(80)
    sun = (np.cos(elevation) * np.sin(azimuth), np.cos(elevation) * np.cos(azimuth), np.sin(elevation))
    angle = float(rng.uniform(-0.45, 0.45)) * (0.35 if kind == "street" else 1.0)
    salt = int(rng.integers(1 << 30))
    unit = camera.focal * 240 / spec.height
    far = min(unit * HEAD_WIDTH / SMALLEST_HEAD, 50.0)
    near = max(unit * HEAD_WIDTH / LARGEST_HEAD, 3.0)

    zones, walls, wanted = PLANS[kind](rng, angle, far)
    plan = _plan(zones, walls, angle, near, far)
    things = _furnish(rng, wanted, plan, camera, far)
    for thing in things:
        _block(plan, thing)
    cells = _visible_cells(plan, camera)
    picks = cells[rng.integers(len(cells), size=5)]
    roi = _roi(camera, plan)
    if int((number + 1) * spec.masked_share) > int(number * spec.masked_share):
        roi &= _polygon(rng, spec)
    return Place(
        kind=kind,
        salt=salt,
        camera=camera,
        angle=angle,
        sun=(float(sun[0]), float(sun[1]), float(sun[2])),
        night=night,
        zones=tuple(zones),
        walls=tuple(walls),
        things=tuple(things),
        walkable=plan,
        cells=cells,
        stages=tuple((float(x), float(y)) for x, y in picks[:2]),
        queues=tuple((float(x), float(y), float(rng.uniform(0, 2 * np.pi))) for x, y in picks[2:4]),
        busiest=float(rng.uniform(0.8, 1.0)),
        sombre=float(rng.uniform(0, 1)),
        roi=roi,
    )


def _camera(spec: SceneSpec, rng: np.random.Generator) -> Camera:
    """A camera at 3.3 to 11 m, pitched so that the horizon lies where it was drawn, often above the image."""
    altitude = float(np.exp(rng.uniform(np.log(3.3), np.log(11))))
    focal = float(rng.uniform(0.95, 1.75)) * spec.height
    horizon = float(rng.uniform(-0.3, 0.26)) * spec.height
    return Camera(spec.width, spec.height, focal, altitude, float(np.arctan2(spec.height / 2 - horizon, focal)))


def _plan_grid() -> tuple[Floats, Floats]:
    x = (np.arange(round(2 * PLAN_HALF / CELL)) + 0.5) * CELL - PLAN_HALF
    y = (np.arange(round(PLAN_FAR / CELL)) + 0.5) * CELL
    gx, gy = np.meshgrid(x.astype(np.float32), y.astype(np.float32))
    return gx, gy


def _plan(zones: list[Zone], walls: list[Wall], angle: float, near: float, far: float) -> Bools:
    """Where people may stand: in walkable zones, within reach of the camera, in front of every wall."""
    x, y = _plan_grid()
    s, t = turn(angle, x, y)
    plan = np.zeros(x.shape, np.bool_)
    for zone in zones:
        plan[zone.contains(s, t)] = zone.walkable
    plan &= (y > near) & (y < far)
    for wall in walls:
        ax, ay = wall.start
        dx, dy = wall.end[0] - ax, wall.end[1] - ay
        length = np.hypot(dx, dy)
        side = (dx * (y - ay) - dy * (x - ax)) / length
        home = (dx * (0 - ay) - dy * (0 - ax)) / length
        plan &= side * np.sign(home) > 0.6
    return plan


def _furnish(rng: np.random.Generator, wanted: Wanted, plan: Bools, camera: Camera, far: float) -> list[Thing]:
    """Things on the plan: in a row, in the beds where nobody walks, at the far end, or anywhere."""
    x, y = _plan_grid()
    seen = _in_view(camera, x, y) & (y < far + 3)
    ground = {
        "any": plan,
        "row": plan,
        "bed": ~plan & (y < far - 1),
        "far": (plan | (y > far - 1)) & (y > far * 0.7),
    }
    things: list[Thing] = []
    for manner, kinds in wanted.items():
        for kind, most in kinds.items():
            nearest = 9 if kind in ("tree", "conifer", "kiosk", "parasol") else 4
            spots = np.argwhere(seen & ground[manner] & (y > nearest))
            count = int(rng.integers(most // 2, most + 1))
            if count == 0 or len(spots) == 0:
                continue
            rows, columns = spots[rng.integers(len(spots), size=count)].T
            points = np.stack([x[rows, columns], y[rows, columns]], 1)
            choice = rng.integers(STOCK, size=count)
            if manner == "row":
                heading, gap = rng.uniform(-0.5, 0.5), rng.uniform(1.0, 3.0)
                steps = (np.arange(count) - count / 2)[:, None] * gap
                points = points[0] + steps * np.array([np.cos(heading), np.sin(heading)])
                choice[:] = choice[0]
            for (px, py), number in zip(points, choice, strict=True):
                if py >= 3.5:
                    size = float(rng.uniform(0.93, 1.07))
                    things.append(Thing(kind, *stock(kind)[int(number)], float(px), float(py), size))
    return things


def _block(plan: Bools, thing: Thing) -> None:
    """Nobody stands inside a thing."""
    left, right, _ = thing.sprite.size
    slim = {"tree": 0.4, "conifer": 0.6, "lamp": 0.25, "globe": 0.3, "topiary": 0.35, "parasol": 1.2}
    radius = slim.get(thing.kind, max(left, right))
    x, y = _plan_grid()
    plan[(x - thing.x) ** 2 + ((y - thing.y) * 1.2) ** 2 < (radius + 0.15) ** 2] = False


def _in_view(camera: Camera, x: Floats, y: Floats) -> Bools:
    """Whether the head of an average person at ground points would lie in the image, or nearly."""
    projected = camera.project(np.stack([x, y, np.full_like(x, 1.6)], -1))
    margin_x, margin_y = 0.04 * camera.width, 0.05 * camera.height
    inside_x = (projected[..., 0] > -margin_x) & (projected[..., 0] < camera.width + margin_x)
    return np.asarray(inside_x & (projected[..., 1] > -margin_y) & (projected[..., 1] < camera.height + margin_y))


def _visible_cells(plan: Bools, camera: Camera) -> Floats:
    x, y = _plan_grid()
    chosen = plan & _in_view(camera, x, y)
    if not chosen.any():
        chosen = plan if plan.any() else _in_view(camera, x, y)
    return np.stack([x[chosen], y[chosen]], 1)


def _roi(camera: Camera, plan: Bools) -> Bools:
    """The pixels whose ray passes over a point where people may stand, 2 m above the ground or lower."""
    columns, rows = np.arange(camera.width) + 0.5, np.arange(camera.height) + 0.5
    roi = np.zeros((camera.height, camera.width), np.bool_)
    for plane in np.linspace(0, 2.0, 21):
        roi |= on_plan(plan, *camera.ground(columns, rows, float(plane)))
    mended = ndimage.uniform_filter(roi.astype(np.float32), 7, mode="nearest") > 0.5
    return np.asarray(ndimage.binary_fill_holes(roi | mended), np.bool_)


def _polygon(rng: np.random.Generator, spec: SceneSpec) -> Bools:
    """A polygon as a person would draw it, leaving out the upper corners and a strip at one side."""
    cuts = rng.uniform([0.05, 0.15, 0.0, 0.0], [0.3, 0.45, 0.12, 0.12])
    x, y = np.meshgrid((np.arange(spec.width) + 0.5) / spec.width, (np.arange(spec.height) + 0.5) / spec.height)
    left, right = x / max(cuts[0], 1e-3) + y / cuts[1] > 1, (1 - x) / max(cuts[0], 1e-3) + y / cuts[1] > 1
    return np.asarray(left & right & (x > cuts[2]) & (x < 1 - cuts[3]))
