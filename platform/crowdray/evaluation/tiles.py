"""A large photo counted in tiles that overlap: the density of the whole one, in the memory of a tile.

Shape legend: H W photo, h w density.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from crowdray.models.export import Geometry

TILE = 2048
"""Pixels along a side that are looked at at once unless somebody says otherwise."""


def in_tiles(density: Callable[[Tensor], Tensor], geometry: Geometry, side: int) -> Callable[[Tensor], Tensor]:
    """A density function that looks at no more than about `side` pixels of a photo at once, and their surroundings.

    What it gives is what `density` gives of the whole photo, up to the rounding of sums: each tile carries all that can
    change the cells that are kept of it.
    """
    step = max(1, side // geometry.grid) * geometry.grid
    around = -(-geometry.reach // geometry.grid) * geometry.grid

    def tiled(image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        if height <= step and width <= step:
            return density(image)
        columns = [_Span(left, step, around, width) for left in range(0, width, step)]
        strips = []
        for top in range(0, height, step):
            row = _Span(top, step, around, height)
            tiles = [
                density(image[..., row.window, column.window])[..., row.kept(geometry.cell), column.kept(geometry.cell)]
                for column in columns
            ]
            strips.append(torch.cat(tiles, dim=-1))
        return torch.cat(strips, dim=-2)

    return tiled


@dataclass(frozen=True)
class _Span:
    """A tile along one axis of a photo."""

    start: int
    step: int
    around: int
    length: int

    @property
    def _first(self) -> int:
        return max(0, self.start - self.around)

    @property
    def window(self) -> slice:
        """The pixels that are looked at."""
        return slice(self._first, min(self.length, self.start + self.step + self.around))

    def kept(self, cell: int) -> slice:
        """The cells of that window which belong to the tile."""
        end = min(self.length, self.start + self.step)
        return slice((self.start - self._first) // cell, -(-(end - self._first) // cell))
