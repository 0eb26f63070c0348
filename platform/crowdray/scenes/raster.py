"""Rasterize figures with a depth test into a buffer of codes at twice the image's resolution.

A figure is a flat sprite that stands upright and faces the camera, so each image row meets it at one height and each
column at one lateral distance. The buffer stores figure, part and normal; all samples are shaded later at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from crowdray.scenes.camera import Camera
from crowdray.scenes.spec import MAX_DEPTH, Floats
from crowdray.scenes.sprites import NORMALS, PARTS, Sprite

FINE = 2
"""Samples per image pixel and direction."""


@dataclass(frozen=True, eq=False, slots=True)
class Figure:
    """A person or a prop: a sprite at a ground point, scaled by `size`."""

    kind: str
    """"person", or a key of PROP_KINDS."""
    sprite: Sprite
    palette: Floats
    x: float
    y: float
    size: float


class Raster:
    """Sample buffers (FINE * H, FINE * W) of visible figures and their distance.

    `code`, int32, is (figure + 1) << 12 | part << 8 | normal, or 0 without a figure; `forward`, float32, is the forward
    distance on the ground in metres.
    """

    def __init__(self, camera: Camera, forward: Floats | None = None) -> None:
        rows = (np.arange(camera.height * FINE) + 0.5) / FINE
        columns = (np.arange(camera.width * FINE) + 0.5) / FINE
        self.camera = camera
        self.per_depth, self.down = camera.row_terms(rows)
        self.across = camera.column_terms(columns)
        if forward is None:  # free rays end at MAX_DEPTH along the optical axis
            forward = np.repeat(self.per_depth[:, None] * MAX_DEPTH, len(columns), axis=1)
        self.forward = forward
        self.code = np.zeros(forward.shape, np.int32)

    def draw(self, figure: Figure, number: int) -> None:
        """Draw a figure where it is nearer than the buffer's content."""
        sprite, size, y = figure.sprite, figure.size, figure.y
        left, right, top = (metres * size for metres in sprite.size)
        bounds = [
            [figure.x - left, y, 0],
            [figure.x + right, y, 0],
            [figure.x - left, y, top],
            [figure.x + right, y, top],
        ]
        corners = self.camera.project(bounds)[:, :2] * FINE
        height, width = self.camera.height * FINE, self.camera.width * FINE
        x0, y0 = np.maximum(corners.min(0).astype(int), 0)
        x1, y1 = np.minimum(corners.max(0).astype(int) + 2, (width, height))
        if x0 >= x1 or y0 >= y1:
            return
        texels = sprite.scale / size
        altitude = self.camera.altitude - y * self.down[y0:y1]
        row = np.clip((top - altitude) * texels, 0, sprite.texels.shape[0] - 1).astype(np.int32)
        row[altitude < 0] = 0
        lateral = self.across[None, x0:x1] * (y * texels / self.per_depth[y0:y1])[:, None] + (
            sprite.foot - figure.x * texels
        )
        column = np.clip(lateral, 0, sprite.texels.shape[1] - 1).astype(np.int32)
        shown = sprite.texels.ravel().take(row[:, None] * sprite.texels.shape[1] + column)
        forward = self.forward[y0:y1, x0:x1]
        visible = (shown > 0) & (forward > y)
        np.copyto(self.code[y0:y1, x0:x1], shown + ((number + 1) << 12), where=visible)
        np.copyto(forward, np.float32(y), where=visible)


def cast_shadows(
    camera: Camera, figures: Sequence[Figure], sun: tuple[float, float, float], *, softness: float
) -> Floats:
    """Return the fraction of sunlight that shadows block on the ground, (FINE * H, FINE * W) in [0, 1].

    A figure's shadow is its outline, rotated to face the sun and projected onto the ground.
    """
    canvas = Image.new("L", (camera.width * FINE, camera.height * FINE))
    if figures:
        outlines = np.stack([f.sprite.outline * np.float32(f.size) for f in figures])
        feet = np.array([(f.x, f.y) for f in figures])
        fall = -np.array(sun[:2]) / max(sun[2], 0.15)
        across = np.array([-sun[1], sun[0]]) / max(np.hypot(sun[0], sun[1]), 1e-6)
        spine = feet[:, None] + outlines[..., :1] * fall
        edges = [spine + outlines[..., k, None] * across for k in (1, 2)]
        ground = np.concatenate([edges[0], edges[1][:, ::-1]], axis=1)
        ground[..., 1] = np.maximum(ground[..., 1], 0.3)
        _fill(canvas, camera, ground, 255)
    return _blurred(canvas, softness)


def contact_shade(camera: Camera, figures: Sequence[Figure]) -> Floats:
    """Return the fraction of sky light that figures block at their feet, (FINE * H, FINE * W) in [0, 1]."""
    canvas = Image.new("L", (camera.width * FINE, camera.height * FINE))
    if figures:
        feet = np.array([(f.x, f.y) for f in figures])
        stance = np.array([f.sprite.outline[0, 2] - f.sprite.outline[0, 1] for f in figures])
        reach = np.minimum(stance + 0.25, 2.0) * np.array([f.size for f in figures]) / 2
        angle = np.linspace(0, 2 * np.pi, 10, endpoint=False)
        rim = np.stack([np.cos(angle), 0.8 * np.sin(angle)], -1)
        for scale, value in ((1.25, 70), (0.9, 150), (0.6, 255)):
            ground = feet[:, None] + scale * reach[:, None, None] * rim
            ground[..., 1] = np.maximum(ground[..., 1], 0.3)
            _fill(canvas, camera, ground, value)
    return _blurred(canvas, 2.0)


def _fill(canvas: Image.Image, camera: Camera, ground: npt.NDArray[np.float64], value: int) -> None:
    corners = camera.project(np.concatenate([ground, np.zeros((*ground.shape[:2], 1))], -1))[..., :2] * FINE
    pen = ImageDraw.Draw(canvas)
    for corner in corners.clip(-9999, 9999).reshape(len(corners), -1).tolist():
        pen.polygon(corner, fill=value)


def _blurred(canvas: Image.Image, radius: float) -> Floats:
    return np.asarray(canvas.filter(ImageFilter.BoxBlur(radius)), np.float32) * np.float32(1 / 255)


def shade_figures(
    code: npt.NDArray[np.int32], palettes: Floats, sunlit: Floats, normals: Floats, sun: tuple[float, float, float]
) -> tuple[Floats, Floats]:
    """Return the albedo (N, 3) and the received fraction of sunlight (N,) of samples with codes (N,).

    `palettes` (figures, PARTS, 3) and `sunlit` (figures,) belong to the figures; `sun` is the unit vector to the sun.
    """
    towards = np.array([sun[0], -sun[1], sun[2]], np.float32)
    sky = (0.6 + 0.28 * normals[:, 2] + 0.2 * normals[:, 1]).astype(np.float32)
    direct = np.maximum(normals @ towards, 0) / sky
    figure, normal = (code >> 12) - 1, code & (NORMALS - 1)
    albedo = palettes.reshape(-1, 3)[figure * PARTS + ((code >> 8) & (PARTS - 1))] * sky[normal][:, None]
    return albedo, sunlit[figure] * direct[normal]
