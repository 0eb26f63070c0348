"""The exported model: a stripped counter that takes images at their original size."""

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crowdray.models.counter import Counter


@dataclass(frozen=True)
class Geometry:
    """How the cells of a density map onto image pixels; all lengths in pixels of the original image."""

    downsample: int
    """Factor by which the counter downsamples images."""
    cell: int
    """Side of a density cell; a multiple of the downsampling."""
    grid: int
    """Crops that start at multiples of this have the same features as the whole image; a multiple of the cell."""
    reach: int
    """Largest distance from a cell at which a pixel can change it."""


def density_geometry(counter: Counter, downsample: int = 1) -> Geometry:
    """The geometry of a counter whose images are downsampled by a factor."""
    encoder, k = counter.encoder, downsample
    return Geometry(k, encoder.output_stride * k, encoder.stride * k, (encoder.receptive_radius + 1) * k)


class ExportedCounter(nn.Module):
    """Raw RGB (B, 3, H, W), 0..255, uint8 or float32, to density (B, 1, h, w) float32; its sum is the count.

    With downsampling k and output stride s, h = ceil(ceil(H / k) / s). The downsampling equals that of training to the
    last bit, rounding included, so that callers cannot use the model at the wrong scale. Any H, W above 4k. `forward`
    does not depend on a concrete size, so that one exported graph serves all sizes.
    """

    def __init__(self, counter: Counter, downsample: int = 1) -> None:
        super().__init__()
        self.counter = counter.strip()
        self.downsample = downsample

    @property
    def geometry(self) -> Geometry:
        """How its cells map onto image pixels."""
        return density_geometry(self.counter, self.downsample)

    def forward(self, image: Tensor) -> Tensor:
        """Density of raw RGB images in heads per cell."""
        if self.downsample > 1:
            pooled = F.avg_pool2d(image * 1.0, self.downsample, ceil_mode=True, count_include_pad=False)
            return self.counter.density(torch.round(pooled))
        return self.counter.density(image)


def weights_digest(counter: ExportedCounter) -> str:
    """sha256 over the names, dtypes, shapes and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*counter.named_parameters(), *counter.named_buffers()]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
