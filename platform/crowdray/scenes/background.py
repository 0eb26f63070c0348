"""Static layers of a scene, ray cast once per process: colour, illumination and distance."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

from crowdray.scenes import surfaces
from crowdray.scenes.camera import Camera
from crowdray.scenes.layout import SceneLayout, Wall, scene_layout, to_site
from crowdray.scenes.raster import FINE, Raster, cast_shadows, contact_shade, shade_figures
from crowdray.scenes.spec import MAX_DEPTH, Bools, Floats, SceneSpec, generator, linear
from crowdray.scenes.sprites import normal_vectors


@dataclass(frozen=True, eq=False, slots=True)
class Background:
    """Layers with FINE x FINE samples per pixel; radiance = albedo * (sky + sun * light + emission)."""

    albedo: Floats
    """(3, FINE * H, FINE * W), linear."""
    light: Floats
    """(FINE * H, FINE * W) received fraction of direct sunlight, including the cosine of its angle."""
    emission: Floats
    """(FINE * H, FINE * W) light emitted by lamps and lit windows, zero by day."""
    forward: Floats
    """(FINE * H, FINE * W) forward distance on the ground, in metres, at which the ray ends."""
    ground: Bools
    """(FINE * H, FINE * W) whether bare ground is visible, which receives shadows."""
    sunlit: Floats
    """(H, W) fraction of sunlight that reaches the ground plane, without occlusion by figures."""


@lru_cache(maxsize=16)
def render_background(spec: SceneSpec, number: int) -> Background:
    """Render the static layers of a camera."""
    layout = scene_layout(spec, number)
    camera = layout.camera
    raster = Raster(camera)
    albedo = np.zeros((*raster.forward.shape, 3), np.float32)
    emission = np.zeros(raster.forward.shape, np.float32)
    light = np.zeros(raster.forward.shape, np.float32)

    _paint_sky(layout, raster, albedo)
    ground = _paint_ground(layout, raster, albedo)
    sunlight = _ground_light(layout)
    albedo[ground] *= (1 - 0.5 * contact_shade(camera, layout.props))[ground][:, None]
    light[ground] = sunlight[ground]
    sunlit = sunlight[::FINE, ::FINE] / np.float32(max(layout.sun[2], 0.1))
    for wall in layout.walls:
        _paint_wall(layout, wall, raster, (albedo, light, emission, ground))
    for i, figure in enumerate(layout.props):
        raster.draw(figure, i)
    drawn = raster.code > 0
    if layout.props:
        palettes = np.stack([p.palette for p in layout.props])
        sunlight_at = light_at(camera, sunlit, np.array([(p.x, p.y) for p in layout.props]))
        codes = raster.code[drawn]
        albedo[drawn], light[drawn] = shade_figures(codes, palettes, sunlight_at, normal_vectors(), layout.sun)
        lamps = np.array([0] + [p.kind in ("lamp", "globe") for p in layout.props])
        emission[drawn & (lamps[raster.code >> 12] > 0) & ((raster.code >> 8 & 15) == 2)] = 2.5 if layout.night else 0.0
    ground &= ~drawn
    return Background(np.ascontiguousarray(albedo.transpose(2, 0, 1)), light, emission, raster.forward, ground, sunlit)


def light_at(camera: Camera, sunlit: Floats, feet: Floats) -> Floats:
    """Return the sunlight (N,) at ground points (N, 2); the median of the image for points outside it."""
    at = camera.project(np.concatenate([feet, np.zeros((len(feet), 1))], 1))
    column, row = np.floor(at[:, 0]).astype(int), np.floor(at[:, 1]).astype(int)
    inside = (column >= 0) & (column < camera.width) & (row >= 0) & (row < camera.height)
    values = sunlit[row.clip(0, camera.height - 1), column.clip(0, camera.width - 1)]
    return np.where(inside, values, np.float32(np.median(sunlit))).astype(np.float32)


def _paint_sky(layout: SceneLayout, raster: Raster, albedo: Floats) -> None:
    rows = np.flatnonzero(raster.down < 0.2)
    cloud = float(generator(layout.salt, 3).uniform(0.1, 0.95))
    across = raster.across[None, :] / raster.per_depth[rows, None]
    down = np.broadcast_to(raster.down[rows, None], across.shape)
    colour = surfaces.sky(down.ravel(), across.ravel(), cloud, layout.night, layout.salt % 97)
    albedo[rows] = 1.7 * colour.reshape(*across.shape, 3)


def _paint_ground(layout: SceneLayout, raster: Raster, albedo: Floats) -> Bools:
    camera = layout.camera
    with np.errstate(divide="ignore"):
        distance = np.where(raster.down > 1e-3, camera.altitude / raster.down, np.inf).astype(np.float32)
    depth = distance / raster.per_depth
    rows = np.flatnonzero(depth < MAX_DEPTH)
    ground = np.zeros(raster.forward.shape, np.bool_)
    x = raster.across[None, :] * depth[rows, None]
    y = np.broadcast_to(distance[rows, None], x.shape)
    s, t = to_site(layout.angle, x, y)
    footprint = np.broadcast_to((depth[rows] ** 2 / (camera.focal * camera.altitude) / FINE * 0.6)[:, None], x.shape)
    zone_of = np.zeros(x.shape, np.int64)
    for i, zone in enumerate(layout.zones):
        zone_of[zone.contains(s, t)] = i
    view = albedo[rows[0] : rows[-1] + 1]
    for i, zone in enumerate(layout.zones):
        inside = zone_of == i
        if not inside.any():
            continue
        colour = surfaces.ground(zone.material, s[inside], t[inside], footprint[inside], layout.salt % 9973 + i)
        if zone.paint:
            white = surfaces.markings(zone.paint, s[inside] - zone.centre[0], t[inside] - zone.centre[1])
            colour[white] = linear(222, 220, 212) * 0.9
        view[inside] = colour
    raster.forward[rows] = distance[rows, None]
    ground[rows] = True
    return ground


def _ground_light(layout: SceneLayout) -> Floats:
    """Return the light on the ground: sunlight without shadows by day, pools under the lamps by night."""
    camera = layout.camera
    if not layout.night:
        shade = cast_shadows(camera, layout.props, layout.sun, softness=1.5)
        shade = np.maximum(shade, _building_shadows(layout))
        return np.asarray(layout.sun[2] * (1 - 0.92 * shade), np.float32)
    rows, columns = (np.arange(camera.height) + 0.5), (np.arange(camera.width) + 0.5)
    x, y = camera.ground(columns, rows)
    pools = np.full(x.shape, 0.22, np.float32)
    lamps = [(p.x, p.y) for p in layout.props if p.kind in ("lamp", "globe")] + [(-4.0, 9.0), (6.0, 20.0)]
    for lx, ly in lamps:
        pools += 0.8 / (1 + ((x - lx) ** 2 + (y - ly) ** 2) / 9)
    return np.nan_to_num(pools, nan=0.3).clip(0, 1.6).repeat(FINE, 0).repeat(FINE, 1)


def _building_shadows(layout: SceneLayout) -> Floats:
    """Return the shadows of the walls: parallelograms from the base to the shadow of the top edge."""
    camera = layout.camera
    x, y = camera.ground(np.arange(camera.width) + 0.5, np.arange(camera.height) + 0.5)
    shade = np.zeros(x.shape, np.float32)
    sx, sy, sz = layout.sun
    for wall in layout.walls:
        (ax, ay), (bx, by) = wall.start, wall.end
        dx, dy = bx - ax, by - ay
        cross = dx * sy - dy * sx
        if abs(cross) < 1e-3:
            continue
        reach = (dx * (ay - y) - dy * (ax - x)) / cross
        along = ((x + reach * sx - ax) * dx + (y + reach * sy - ay) * dy) / (dx * dx + dy * dy)
        shade[(reach > 0) & (reach * sz < wall.height) & (along >= 0) & (along <= 1)] = 1
    fine = shade.repeat(FINE, 0).repeat(FINE, 1)
    return np.asarray(ndimage.uniform_filter(fine, 5, mode="nearest"), np.float32)


def _paint_wall(layout: SceneLayout, wall: Wall, raster: Raster, layers: tuple[Floats, Floats, Floats, Bools]) -> None:
    albedo, light, emission, ground = layers
    (ax, ay), (bx, by) = wall.start, wall.end
    dx, dy = bx - ax, by - ay
    slope = raster.across[None, :] / raster.per_depth[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        y = (dx * ay - dy * ax) / (dx - dy * slope)
        position = ((slope * y - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy)
        z = np.asarray(raster.camera.altitude - y * raster.down[:, None], np.float32)
    hit = (y > 0.5) & (y < raster.forward) & (position >= 0) & (position <= 1) & (z >= 0)
    length = float(np.hypot(dx, dy))
    along = np.asarray(position[hit] * length, np.float32)
    below_top = z[hit] <= surfaces.ragged_top(wall.kind, along, wall.height)
    hit[hit], along = below_top, along[below_top]
    colour, glow = surfaces.facade(wall.kind, along, z[hit], wall.height, wall.salt, layout.night)
    facing = np.array([-dy, dx]) / length
    facing *= -np.sign(facing @ np.array([ax, ay]))
    sunny = max(0.0, float(facing @ np.array(layout.sun[:2])))
    albedo[hit] = colour * (0.75 + 0.25 * np.clip(z[hit] / 3, 0, 1))[:, None]
    light[hit] = np.float32(0.45 / (1 + (0.3 * z[hit]) ** 2)) if layout.night else sunny
    emission[hit] = glow
    raster.forward[hit] = y[hit]
    ground[hit] = False
