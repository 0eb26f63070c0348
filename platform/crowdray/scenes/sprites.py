"""Sprites: flat figures drawn once in metres, with a part and a surface normal per pixel.

Colours come from a palette with one colour per part, light from the scene, so one sprite serves any clothes and any
lighting, and rendering a crowd takes a few array look-ups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from crowdray.scenes.spec import Floats

PARTS = 16
"""Size of a palette; part 0 is transparent."""
NORMALS = 256
"""Number of distinct surface normals: 16 steps sideways times 16 steps upwards."""
OUTLINE_STEPS = 12


@dataclass(frozen=True, eq=False, slots=True)
class Sprite:
    """A drawn figure standing on the ground."""

    texels: npt.NDArray[np.int32]
    """(rows, columns) part * 256 + normal, top row first; the outermost rows and columns are transparent."""
    scale: float
    """Texels per metre."""
    foot: float
    """Column, in texels from the left edge, above the figure's ground point."""
    outline: Floats
    """(OUTLINE_STEPS, 3) height, left and right extent in metres, which shape the shadow."""
    head: tuple[float, float] | None = None
    """Centre of the head in metres, right of and above the ground point."""

    @property
    def size(self) -> tuple[float, float, float]:
        """Extent in metres left and right of the ground point, and the height."""
        rows, columns = self.texels.shape
        return self.foot / self.scale, (columns - self.foot) / self.scale, rows / self.scale

    def mirrored(self) -> "Sprite":
        """Return the mirror image."""
        part, normal = self.texels >> 8, self.texels & 255
        flipped = np.where(part > 0, part << 8 | (15 - (normal >> 4)) << 4 | (normal & 15), 0)
        head = None if self.head is None else (-self.head[0], self.head[1])
        outline = self.outline[:, [0, 2, 1]] * np.array([1, -1, -1], np.float32)
        texels = np.ascontiguousarray(flipped[:, ::-1].astype(np.int32))
        return Sprite(texels, self.scale, self.texels.shape[1] - self.foot, outline, head)


def normal_vectors() -> Floats:
    """Return the unit vectors (NORMALS, 3) of the normal codes: right, towards the camera, up."""
    code = np.arange(NORMALS)
    right, up = (code >> 4) / 7.5 - 1, (code & 15) / 7.5 - 1
    length = np.maximum(np.hypot(right, up), 1)
    right, up = right / length, up / length
    towards = np.sqrt(np.maximum(1 - right**2 - up**2, 0))
    return np.stack([right, towards, up], axis=1).astype(np.float32)


class Pen:
    """Draws a sprite shape by shape, later shapes on top; x is to the right, z up, in metres."""

    def __init__(self, half_width: float, top: float, scale: float) -> None:
        self.scale = scale
        self.half = half_width
        rows, columns = round(top * scale) + 2, round(2 * half_width * scale) + 2
        self.part = np.zeros((rows, columns), np.int32)
        self.normal = np.zeros((rows, columns), np.int32)
        self.x = ((np.arange(columns) + 0.5) / scale - half_width - 1 / scale).astype(np.float32)
        self.z = ((rows - np.arange(rows) - 0.5) / scale - 1 / scale).astype(np.float32)

    def _window(self, x0: float, x1: float, z0: float, z1: float) -> tuple[slice, slice, Floats, Floats]:
        left, right = np.searchsorted(self.x, [x0, x1])
        bottom, top = np.searchsorted(self.z[::-1], [z0, z1])
        rows, columns = slice(len(self.z) - int(top), len(self.z) - int(bottom)), slice(int(left), int(right))
        return rows, columns, self.x[None, columns], self.z[rows, None]

    def _paint(
        self, rows: slice, columns: slice, inside: npt.NDArray[np.bool_], part: int, right: Floats, up: Floats
    ) -> None:
        code = np.rint((np.clip(right, -1, 1) + 1) * 7.5).astype(np.int32) * 16
        code = code + np.rint((np.clip(up, -1, 1) + 1) * 7.5).astype(np.int32)
        np.copyto(self.part[rows, columns], part, where=inside)
        np.copyto(self.normal[rows, columns], code, where=inside)

    def disc(self, x: float, z: float, rx: float, rz: float, part: int, above: float = -9.0) -> None:
        """Draw an ellipsoid, cut off below the height `above`."""
        rows, columns, gx, gz = self._window(x - rx, x + rx, max(z - rz, above), z + rz)
        right, up = (gx - x) / np.float32(rx), (gz - z) / np.float32(rz)
        self._paint(rows, columns, right**2 + up**2 <= 1, part, right + 0 * up, up + 0 * right)

    def limb(self, *joints: tuple[float, float, float], part: int) -> None:
        """Draw tapered capsules through joints (x, z, radius)."""
        for (xa, za, ra), (xb, zb, rb) in pairwise(joints):
            r = max(ra, rb)
            rows, columns, gx, gz = self._window(min(xa, xb) - r, max(xa, xb) + r, min(za, zb) - r, max(za, zb) + r)
            dx, dz = xb - xa, zb - za
            along = np.clip(((gx - xa) * dx + (gz - za) * dz) / max(dx * dx + dz * dz, 1e-9), 0, 1)
            radius = ra + along * (rb - ra)
            right, up = (gx - xa - along * dx) / radius, (gz - za - along * dz) / radius
            self._paint(rows, columns, right**2 + up**2 <= 1, part, right.astype(np.float32), up.astype(np.float32))

    def lathe(self, profile: Sequence[tuple[float, float]], part: int, x: float = 0.0, up: float = 0.1) -> None:
        """Draw a solid of revolution about a vertical axis at x with a profile (z, half width), bottom first."""
        heights, widths = np.array(profile, np.float32).T
        widest = float(widths.max())
        rows, columns, gx, gz = self._window(x - widest, x + widest, float(heights[0]), float(heights[-1]))
        half = np.maximum(np.interp(gz[:, 0], heights, widths).astype(np.float32)[:, None], 1e-3)
        right = (gx - x) / half
        slope = np.gradient(half[:, 0]) * self.scale if len(half) > 1 else np.zeros(len(half))
        lift = np.clip(slope, -1, 1).astype(np.float32)[:, None] * 0.8 + up
        self._paint(rows, columns, np.abs(right) <= 1, part, right, lift + 0 * right)

    def box(self, x0: float, x1: float, z0: float, z1: float, part: int, right: float = 0.0, up: float = 0.0) -> None:
        """Draw a flat rectangle with one normal."""
        rows, columns, gx, gz = self._window(x0, x1, z0, z1)
        flat = 0 * gx + 0 * gz
        self._paint(rows, columns, flat == 0, part, flat + np.float32(right), flat + np.float32(up))

    def ring(self, x: float, z: float, r: float, thickness: float, part: int) -> None:
        """Draw a ring seen from the side."""
        rows, columns, gx, gz = self._window(x - r, x + r, z - r, z + r)
        distance = np.hypot(gx - x, gz - z)
        self._paint(
            rows, columns, np.abs(distance - r + thickness / 2) <= thickness / 2, part, 0 * distance, 0 * distance
        )

    def sprite(self, head: tuple[float, float] | None = None) -> Sprite:
        """Return the drawing, cropped to its content plus a transparent border of one texel."""
        rows = np.flatnonzero(self.part.any(1))
        columns = np.flatnonzero(self.part.any(0))
        c0, c1 = max(int(columns[0]) - 1, 0), min(int(columns[-1]) + 2, self.part.shape[1])
        r0 = max(int(rows[0]) - 1, 0)
        texels = np.where(self.part > 0, self.part << 8 | self.normal, 0)[r0:-1, c0:c1].astype(np.int32)
        texels[0] = 0
        texels[:, [0, -1]] = 0
        foot = self.half * self.scale + 1 - c0
        return Sprite(texels, self.scale, foot, _outline(texels > 0, self.scale, foot), head)


def _outline(drawn: npt.NDArray[np.bool_], scale: float, foot: float) -> Floats:
    """Return heights with the left and right extent of the drawing, bottom first."""
    rows = np.flatnonzero(drawn.any(1))
    bands = np.array_split(rows[::-1], OUTLINE_STEPS)
    result = np.zeros((OUTLINE_STEPS, 3), np.float32)
    for i, band in enumerate(bands):
        if len(band) == 0:
            result[i] = result[i - 1]
            continue
        line = np.flatnonzero(drawn[band].mean(0) > 0.4)
        left, right = (line[0], line[-1] + 1) if len(line) else (foot, foot + 1)
        at = band[0] if i < OUTLINE_STEPS - 1 else band[-1]
        result[i] = ((drawn.shape[0] - at - 0.5) / scale, (left - foot) / scale, (right - foot) / scale)
    return result
