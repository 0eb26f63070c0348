"""Decoders of the paper's Table 1: density, segmentation, depth and count.

Shape legend: B batch, C feature channels, h w feature map.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FixedUpsample(nn.Module):
    """Double height and width with the fixed 7x7 bilinear kernel of the paper's stride-2 deconvolution.

    (B, C, h, w) to (B, C, 2h + 1, 2w + 1), each channel alone, any floating dtype; no trained parameter. Output cell 2i
    is centred on input cell i, and a constant map stays constant. Edge values are replicated: zero padding would lose
    up to a quarter of the mass at the border. The caller cuts the extra row and column: a slice that always removes
    something exports for every image size, whereas one that sometimes does not leaves a guard on the size.
    """

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 2.0, 3.0, 4.0, 3.0, 2.0, 1.0]) / 8  # the taps of each output parity sum to 1
        self.register_buffer("kernel", torch.outer(taps, taps)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Upsample x (B, C, h, w) to (B, C, 2h + 1, 2w + 1)."""
        channels = x.shape[1]
        padded = F.pad(x, (1, 2, 1, 2), mode="replicate")
        return F.conv_transpose2d(padded, self.kernel.expand(channels, 1, 7, 7), stride=2, padding=5, groups=channels)


class MapDecoder(nn.Module):
    """5x5x64 convolution, then two fixed deconvolutions (64 -> 32 -> 1 channels, x4 in size).

    Both deconvolutions average groups of channels and upsample with the same fixed kernel, linear operations that
    commute: so the 64 channels are averaged first and one channel is upsampled, with the same result. 204,864
    parameters, as in the paper. Features (B, C, h, w) to a non-negative map (B, 1, 4h + 3, 4w + 3), which the counter
    cuts to the image's size.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 64, 5, padding=2)
        self.upsample = FixedUpsample()

    def forward(self, features: Tensor) -> Tensor:
        """Decode features (B, C, h, w) to a non-negative map (B, 1, 4h + 3, 4w + 3), float32."""
        channels = torch.relu(self.conv(features))
        mean = channels.mean(dim=1, keepdim=True, dtype=torch.promote_types(channels.dtype, torch.float32))
        return apply_float32(self.upsample, apply_float32(self.upsample, mean))


class LogitDecoder(MapDecoder):
    """A map decoder with a trained scale and bias on its output, so that logits can be negative.

    In the paper the map is never negative: as a logit it would mean a probability of at least one half everywhere, and
    the cross-entropy would stay at ln 2. Scale and bias (two parameters) start so that logits lie within a few units of
    the prior probability `foreground`.
    """

    def __init__(self, channels: int, foreground: float = 0.1) -> None:
        super().__init__(channels)
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.bias = nn.Parameter(torch.tensor(math.log(foreground / (1 - foreground))))

    def forward(self, features: Tensor) -> Tensor:
        """Decode features (B, C, h, w) to logits (B, 1, 4h + 3, 4w + 3), float32."""
        return super().forward(features) * self.scale + self.bias


class DilatedDecoder(nn.Module):
    """3x3 convolutions of dilation 2 to 256, 128 and 64 channels with ReLUs, then a 3x3 convolution to the map.

    Features (B, C, h, w) to a map (B, 1, h, w) of any sign, which serves as a logit too. The last convolution computes
    in float32 even under bfloat16 autocast, because its output is the map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise((channels, 256, 128, 64)):
            layers += [nn.Conv2d(before, after, 3, padding=2, dilation=2), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        self.map = nn.Conv2d(64, 1, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """Decode features (B, C, h, w) to a map (B, 1, h, w), float32."""
        return apply_float32(self.map, self.layers(features))


class ShuffleDecoder(nn.Module):
    """A 1x1x128 and a 3x3x64 convolution with ReLUs, then a 3x3x4 convolution and a pixel shuffle.

    Features (B, C, h, w) to a map (B, 1, 2h + 1, 2w + 1) of any sign, whose last row and column the counter cuts. The
    last convolution computes in float32, as in `DilatedDecoder`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(channels, 128, 1), nn.ReLU(), nn.Conv2d(128, 64, 3, padding=1), nn.ReLU())
        self.cells = nn.Conv2d(64, 4, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """Decode features (B, C, h, w) to a map (B, 1, 2h + 1, 2w + 1), float32."""
        return F.pad(F.pixel_shuffle(apply_float32(self.cells, self.layers(features)), 2), (0, 1, 0, 1))


def apply_float32(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer in float32, also under autocast."""
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return apply_float32(layer, x.float())
    result: Tensor = layer(x)
    return result


class CountDecoder(nn.Module):
    """An NxN and several 1x1 convolutions from the features of a crop to its count.

    Features (B, C, N, N) to counts (B,), float32, in units of `count_scale` heads. N fixes the crop size during
    training only, because the exported model has no count decoder. 13,109,377 parameters for CFCN (C = 128, N = 40,
    widths 64 and 32); 205,521,408 in the first layer alone for CSRNet (C = 512, N = 28, width 512).

    A convolution whose kernel spans the map is computed as a linear layer. It computes in float32 even under bfloat16
    autocast: converting its millions of weights, each used once per image, would cost more than using them.
    """

    def __init__(self, channels: int, side: int, widths: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        self.side = side
        layers: list[nn.Module] = []
        for before, after in pairwise((channels * side * side, *widths)):
            layers += [nn.Linear(before, after), nn.ReLU()]
        if dropout:
            layers.insert(2, nn.Dropout(dropout))
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def forward(self, features: Tensor) -> Tensor:
        """Regress counts (B,) from features (B, C, N, N)."""
        with torch.autocast(features.device.type, enabled=False):
            count: Tensor = self.layers(features.float().flatten(1))
        return count.flatten()


class PooledCountDecoder(nn.Module):
    """1x1 convolutions to 64 and 32 channels, the mean over the crop, and a linear layer.

    Same inputs and outputs as `CountDecoder`, but its 10,369 parameters (C = 128) do not depend on the crop size.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.cells = nn.Sequential(nn.Conv2d(channels, 64, 1), nn.ReLU(), nn.Conv2d(64, 32, 1), nn.ReLU())
        self.sum = nn.Linear(32, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Regress counts (B,) from features (B, C, N, N)."""
        mean = self.cells(features).mean((2, 3), dtype=torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            count: Tensor = self.sum(mean)
        return count.flatten()
