"""CSRNet (Li et al., CVPR 2018), the paper's strong backbone, as published and as the paper's Table 1 prints it.

Shape legend: B batch, H W image, h w = ceil(H / stride), ceil(W / stride).
"""

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import ClassVar

from torch import Tensor, nn

from crowdray.models.backbone import Backbone

_POOL = 0
"""Denotes a pooling layer in a list of channels."""


class CSRNet(Backbone):
    """VGG-16 from conv1_1 to conv4_3 with three poolings (7,635,264 parameters), then three 3x3x512 convolutions of
    dilation 2 (7,079,424).

    `features` has torchvision's layers and names of VGG-16, so ImageNet weights fit. Poolings keep incomplete patches
    at the bottom and the right: images of any size have ceil(H / 8) x ceil(W / 8) features.
    """

    channels = 512
    stride = 8
    output_stride = 8
    receptive_radius = 153
    count_widths = (512, 256, 128, 64)
    count_dropout = 0.5
    pretrained_prefixes = ("features.",)
    vgg_channels: ClassVar[Sequence[int]] = (64, 64, _POOL, 128, 128, _POOL, 256, 256, 256, _POOL, 512, 512, 512)

    def __init__(self) -> None:
        super().__init__()
        self.features = _vgg(self.vgg_channels)
        dilated = [(nn.Conv2d(512, 512, 3, padding=2, dilation=2), nn.ReLU(inplace=True)) for _ in range(3)]
        self.dilated = nn.Sequential(*chain.from_iterable(dilated))

    def forward(self, image: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) to features (B, 512, h, w)."""
        features: Tensor = self.dilated(self.features(image))
        return features

    def checkpoint_segments(self) -> Sequence[nn.Module]:
        """Cut after each pooling, where activations are smallest."""
        poolings = [n + 1 for n, layer in enumerate(self.features) if isinstance(layer, nn.MaxPool2d)]
        cuts = pairwise(sorted({0, *poolings, len(self.features)}))
        return [*(self.features[start:end] for start, end in cuts), self.dilated]


class CSRNetTable1(CSRNet):
    """CSRNet as Table 1 prints it: four blocks of two convolutions and a pooling, stride 16.

    ImageNet weights do not fit: VGG-16 has three convolutions in its third and fourth blocks.
    """

    stride = 16
    output_stride = 16
    receptive_radius = 253
    vgg_channels = (64, 64, _POOL, 128, 128, _POOL, 256, 256, _POOL, 512, 512, _POOL)


def _vgg(channels: Sequence[int]) -> nn.Sequential:
    """3x3 convolutions with ReLUs, and poolings, in torchvision's layer order."""
    layers: list[nn.Module] = []
    before = 3
    for width in channels:
        if width == _POOL:
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        else:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(inplace=True)]
            before = width
    return nn.Sequential(*layers)
