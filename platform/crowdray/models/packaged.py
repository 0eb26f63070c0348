"""What ships: a stripped counter that takes the photo as it is, at the scale it was trained for."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crowdray.models.counter import Counter


class PackagedCounter(nn.Module):
    """Raw RGB (B, 3, H, W), 0..255, uint8 or float32, to density (B, 1, ceil(H/k), ceil(W/k)) float32; its
    sum is the count.

    k is the downsampling the counter was trained with. It is repeated here to the bit, rounding included, so
    that no caller can feed the model a scale it does not know. Any H, W above 4k. Nothing in forward depends
    on a concrete size, so one exported graph serves all of them.
    """

    def __init__(self, counter: Counter, downsample: int = 1) -> None:
        super().__init__()
        self.counter = counter.strip()
        self.downsample = downsample

    def forward(self, image: Tensor) -> Tensor:
        """Density of raw RGB images in heads per cell."""
        if self.downsample > 1:
            pooled = F.avg_pool2d(image * 1.0, self.downsample, ceil_mode=True, count_include_pad=False)
            return self.counter.density(torch.round(pooled))
        return self.counter.density(image)
