"""What ships: a stripped counter that takes the photo as it is, at the scale it was trained for."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crowdray.models.counter import Counter


@dataclass(frozen=True)
class Geometry:
    """How a counter's density lies on a photo, in the photo's pixels along a side."""

    downsample: int
    """Pixels that the counter averages before it looks."""
    cell: int
    """Pixels of one cell; the downsampling divides it."""
    grid: int
    """Multiples of this are where a counter may begin to look without seeing anything else; the cell divides it."""
    reach: int
    """Pixels that can change a cell lie no farther than this from any of its own."""


def geometry_of(counter: Counter, downsample: int = 1) -> Geometry:
    """Where a counter's cells lie on a photo that it is shown at 1 / downsample of its size."""
    encoder, k = counter.encoder, downsample
    return Geometry(k, encoder.output_stride * k, encoder.stride * k, (encoder.receptive_radius + 1) * k)


class PackagedCounter(nn.Module):
    """Raw RGB (B, 3, H, W), 0..255, uint8 or float32, to density (B, 1, h, w) float32; its sum is the count.

    k is the downsampling the counter was trained with, s the stride of its maps: h = ceil(ceil(H / k) / s). The
    downsampling is repeated here to the bit, rounding included, so that no caller can feed the model a scale it does
    not know. Any H, W above 4k. Nothing in forward depends on a concrete size, so one exported graph serves all of
    them.
    """

    def __init__(self, counter: Counter, downsample: int = 1) -> None:
        super().__init__()
        self.counter = counter.strip()
        self.downsample = downsample

    @property
    def geometry(self) -> Geometry:
        """Where its cells lie on a photo."""
        return geometry_of(self.counter, self.downsample)

    def forward(self, image: Tensor) -> Tensor:
        """Density of raw RGB images in heads per cell."""
        if self.downsample > 1:
            pooled = F.avg_pool2d(image * 1.0, self.downsample, ceil_mode=True, count_include_pad=False)
            return self.counter.density(torch.round(pooled))
        return self.counter.density(image)
