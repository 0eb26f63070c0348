"""Render one image: figures over the static layers, lighting, haze, lens and sensor, and its ground truth.

Shape legend: H W image; supersampled layers are FINE times as large.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from crowdray.scenes.background import Background, light_at, render_background
from crowdray.scenes.crowd import sample_crowd
from crowdray.scenes.layout import SceneLayout, scene_layout
from crowdray.scenes.people import HEAD_PARTS
from crowdray.scenes.raster import FINE, Figure, Raster, cast_shadows, contact_shade, shade_figures
from crowdray.scenes.spec import MAX_DEPTH, Floats, RenderedScene, SceneSpec, generator, linear
from crowdray.scenes.sprites import PARTS, normal_vectors

MIN_VISIBLE_FRACTION = 0.3
"""Minimum visible fraction of an annotated head; annotators would miss less."""

_TONE = (np.linspace(0, 1, 4096, dtype=np.float64) ** (1 / 2.2) * 255).astype(np.float32)


def render(spec: SceneSpec, index: int) -> RenderedScene:
    """Render image `index` of a spec: bit-identical in any process and order on the same kind of machine.

    A person is annotated if the head's centre lies in the image and the ROI and at least MIN_VISIBLE_FRACTION of the
    head is visible.
    """
    number = index % spec.cameras
    layout, static = scene_layout(spec, number), render_background(spec, number)
    rng = generator(spec.seed, 3, index)
    crowd = sample_crowd(spec, layout, rng)
    raster = Raster(layout.camera, static.forward.copy())
    for i, figure in enumerate(crowd):
        raster.draw(figure, i)
    depth = _depth(raster)
    image = _sensor(spec, layout, _light(layout, static, crowd, raster, rng), depth, rng)
    return RenderedScene(
        image, annotated_heads(layout, crowd, raster), depth, layout.roi.copy(), f"camera-{number:02d}"
    )


def _depth(raster: Raster) -> Floats:
    """Return the depth (H, W) in metres of the nearest sample of each pixel."""
    fine = raster.forward * (1 / raster.per_depth)[:, None]
    nearest = fine.reshape(raster.camera.height, FINE, raster.camera.width, FINE).min(axis=(1, 3))
    return np.asarray(np.minimum(nearest, np.float32(MAX_DEPTH)), np.float32)


def annotated_heads(layout: SceneLayout, crowd: Sequence[Figure], raster: Raster) -> Floats:
    """Return the centres (N, 2) of the heads that an annotator would mark."""
    camera = layout.camera
    part = (raster.code >> 8) & (PARTS - 1)
    visible = raster.code[np.isin(part, HEAD_PARTS)] >> 12
    seen = np.bincount(visible, minlength=len(crowd) + 1)[1:]
    heads = []
    for figure, samples in zip(crowd, seen, strict=True):
        if figure.sprite.head is None:
            continue
        right, up = (metres * figure.size for metres in figure.sprite.head)
        x, y, z = camera.project([figure.x + right, figure.y, up])
        # A bald head is an ellipse of 0.186 x 0.244 m; hats and buns only enlarge it.
        # Seen from above, anything upright is foreshortened by forward distance / depth.
        full = np.pi / 4 * 0.186 * 0.244 * (figure.size * camera.focal / z * FINE) ** 2 * figure.y / z
        inside = 0 <= x < camera.width and 0 <= y < camera.height
        if inside and samples >= MIN_VISIBLE_FRACTION * full and samples > 0 and layout.roi[int(y), int(x)]:
            heads.append((x, y))
    return np.array(heads, np.float32).reshape(-1, 2)


def _light(
    layout: SceneLayout, static: Background, crowd: Sequence[Figure], raster: Raster, rng: np.random.Generator
) -> Floats:
    """Return the image in linear light (3, H, W), the mean over the samples of each pixel."""
    clear = float(np.clip(rng.beta(1.2, 0.9), 0.02, 1))
    sky, sun = _weather(layout, clear, rng)
    drawn = np.flatnonzero(raster.code)
    feet = np.array([(f.x, f.y) for f in crowd], np.float32)
    sunlit = light_at(layout.camera, static.sunlit, feet)
    palettes = np.stack([f.palette for f in crowd])
    colour, direct = shade_figures(raster.code.ravel()[drawn], palettes, sunlit, normal_vectors(), layout.sun)

    shade = 1 - np.float32(0.45) * contact_shade(layout.camera, crowd) * static.ground
    light = static.light * shade
    if not layout.night:
        cast = cast_shadows(layout.camera, crowd, layout.sun, softness=0.5 + 2 * (1 - clear))
        light *= 1 - np.float32(0.92) * cast * static.ground
    shade.ravel()[drawn] = 1
    light.ravel()[drawn] = direct
    emission = static.emission.copy()
    emission.ravel()[drawn] = 0
    radiance = np.empty((3, layout.camera.height, layout.camera.width), np.float32)
    for channel, glow in enumerate(linear(255, 206, 138)):
        albedo = static.albedo[channel].copy()
        albedo.ravel()[drawn] = colour[:, channel]
        arriving = light * sun[channel]
        arriving += shade * sky[channel]
        if layout.night:
            arriving += emission * (2 * glow)
        arriving *= albedo
        rows = arriving[::FINE] + arriving[1::FINE]
        radiance[channel] = (rows[:, ::FINE] + rows[:, 1::FINE]) * np.float32(1 / FINE**2)
    return radiance


def _weather(layout: SceneLayout, clear: float, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Return the colours of sky light and sunlight."""
    jitter = rng.normal(1, 0.03, 3).astype(np.float32)
    if layout.night:
        return linear(120, 128, 160) * 0.9 * jitter, linear(255, 210, 150) * np.float32(0.8) * jitter
    low = np.clip(1.3 - layout.sun[2] * 1.5, 0, 1)
    warm = linear(255, 244, 228) * (1 - low) + linear(255, 206, 150) * low
    sky = linear(186, 204, 232) * clear + linear(222, 224, 228) * (1 - clear)
    sunlight = warm * 2.0 * clear * jitter
    return np.asarray(sky * (0.75 - 0.3 * clear) * jitter, np.float32), np.asarray(sunlight, np.float32)


def _sensor(
    spec: SceneSpec, layout: SceneLayout, light: Floats, depth: Floats, rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """Convert linear light (3, H, W) to uint8 RGB (H, W, 3): haze, exposure, blur, tone curve, noise."""
    height, width = depth.shape
    level = max(float(light[:, height // 4 :].mean()), 1e-4)
    reach = float(np.exp(rng.uniform(np.log(90), np.log(900))))
    clear_air = np.exp(depth * np.float32(-1 / reach))
    veil = (linear(120, 128, 150) if layout.night else linear(222, 228, 236)) * np.float32(level * 1.5)
    target = float(np.exp(rng.normal(np.log(0.15 if layout.night else 0.2), 0.16)))
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    vignette = 1 - np.float32(rng.uniform(0.08, 0.3) / 2) * (x**2 + y**2).astype(np.float32)
    balance = rng.normal(target / level, 0.035 * target / level, 3).astype(np.float32)
    blur = rng.uniform(0.3, 0.62)
    strength = spec.sensor_noise * rng.uniform(0.7, 1.6) * (1.7 if layout.night else 1.0)
    grain = rng.standard_normal((height, width), np.float32) * np.float32(1.7 * strength)
    grain += np.float32(0.5)  # rounds when the cast to uint8 truncates
    image = np.empty((height, width, 3), np.uint8)
    for channel in range(3):
        plane = (veil[channel] + clear_air * (light[channel] - veil[channel])) * (vignette * balance[channel])
        plane = ndimage.gaussian_filter(plane, blur, truncate=3, mode="nearest")
        plane = plane * (1 + 0.35 * plane) / (1 + plane)  # soft shoulder for highlights
        signal = _TONE[np.clip(plane * np.float32(1.12 * 4095), 0, 4095).astype(np.int32)]
        tint = rng.standard_normal(((height + 1) // 2, (width + 1) // 2), np.float32) * np.float32(1.6 * strength)
        signal += grain
        signal += tint.repeat(2, 0).repeat(2, 1)[:height, :width]
        image[..., channel] = np.clip(signal, 0, 255)
    return image
