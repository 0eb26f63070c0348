"""The pinhole camera above the ground plane.

World: X right and Y forward on the ground, Z up, in metres; the camera is above the origin. Image: x right, y down, in
continuous pixels. There is no roll, so the slope of a ray depends on its image row alone.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from crowdray.scenes.spec import Floats


@dataclass(frozen=True)
class Camera:
    """A pinhole camera above the ground, pitched down, with its principal point at the image centre."""

    width: int
    height: int
    focal: float
    """Focal length in pixels."""
    altitude: float
    """Height above the ground in metres."""
    pitch: float
    """Angle below the horizon in radians."""

    def project(self, world: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Project world points (..., 3), in metres, to pixels.

        Returns:
            (..., 3): x and y in pixels, depth in metres along the optical axis.
        """
        world = np.asarray(world, np.float64)
        right, forward, drop = world[..., 0], world[..., 1], self.altitude - world[..., 2]
        sin, cos = np.sin(self.pitch), np.cos(self.pitch)
        z = np.maximum(forward * cos + drop * sin, 0.05)
        x = self.width / 2 + self.focal * right / z
        y = self.height / 2 + self.focal * (drop * cos - forward * sin) / z
        return np.stack([x, y, z], axis=-1)

    def row_terms(self, y: npt.ArrayLike) -> tuple[Floats, Floats]:
        """Return, for image rows y, the forward distance per depth and the drop per forward distance of their rays.

        The drop is negative above the horizon, where rays never meet the ground.
        """
        v = (np.asarray(y, np.float64) - self.height / 2) / self.focal
        sin, cos = np.sin(self.pitch), np.cos(self.pitch)
        forward = np.maximum(cos - v * sin, 0.02)
        return forward.astype(np.float32), ((sin + v * cos) / forward).astype(np.float32)

    def column_terms(self, x: npt.ArrayLike) -> Floats:
        """Return, for image columns x, the distance to the right per depth."""
        return ((np.asarray(x, np.float64) - self.width / 2) / self.focal).astype(np.float32)

    def ground(self, x: npt.ArrayLike, y: npt.ArrayLike, plane: float = 0.0) -> tuple[Floats, Floats]:
        """Intersect the rays through columns x (W,) and rows y (H,) with a horizontal plane at height `plane`.

        Returns:
            X and Y, both (H, W) in metres; NaN where a ray does not meet the plane.
        """
        forward, down = self.row_terms(y)
        distance = np.full(down.shape, np.nan, np.float32)
        hit = down > 1e-4
        distance[hit] = (self.altitude - plane) / down[hit]
        lateral = self.column_terms(x)[None, :] * (distance / forward)[:, None]
        return lateral, np.broadcast_to(distance[:, None], lateral.shape)
