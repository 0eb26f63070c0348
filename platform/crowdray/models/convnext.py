"""ConvNeXt (Liu et al., CVPR 2022) as a backbone: 7.4 GFLOPs for a crop of 224 pixels, CSRNet's are 41; by way of
transformers.

Shape legend: B batch, H W image, h w = ceil(H / 16), ceil(W / 16).
"""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from crowdray.models.backbone import Backbone
from crowdray.models.decoders import exact

try:
    from transformers import ConvNextBackbone, ConvNextConfig
except ImportError as error:
    raise ImportError("convnext needs transformers: pip install 'crowdray[convnext]'") from error


class ConvNeXt(Backbone):
    """The first three stages of ConvNeXt-Tiny: 12,348,768 parameters, stride 16, maps of stride 8.

    The first version, since the second one's response normalisation sees the whole image: then no window could show
    what the image shows. Weights of ImageNet fit as they are published for transformers, facebook/convnext-tiny-224 for
    example.
    """

    channels = 384
    stride = 16
    output_stride = 8
    receptive_radius = 587
    count_widths = (256, 64)
    libraries = ("transformers",)
    published = ("convnext.embeddings.", "convnext.encoder.")

    def __init__(self) -> None:
        super().__init__()
        stages = ConvNextConfig(num_stages=3, depths=[3, 3, 9], hidden_sizes=[96, 192, 384])
        self.convnext = ConvNextBackbone(stages)

    def forward(self, image: Tensor) -> Tensor:
        """Encode an image (B, 3, H, W) to features (B, 384, h, w)."""
        features: Tensor = self.convnext(self._padded(image)).feature_maps[-1]
        return features

    def segments(self) -> Sequence[Callable[[Tensor], Tensor]]:
        """Each block alone: it has ten times as much inside as comes in."""
        network = self.convnext
        lists = [blocks for stage in network.encoder.stages for blocks in stage.children()]
        blocks = [block for one in lists for block in one.children()]
        return [lambda image: network.embeddings(self._padded(image)), *blocks, *network.hidden_states_norms.values()]

    def _padded(self, image: Tensor) -> Tensor:
        """Its convolutions leave incomplete squares out."""
        height, width = image.shape[-2:]
        return F.pad(image, (0, -width % self.stride, 0, -height % self.stride))

    def map_decoder(self, task: str) -> nn.Module:
        """Four cells of the map from each feature."""
        return ShuffleDecoder(self.channels)


class ShuffleDecoder(nn.Module):
    """A 1x1x128 and a 3x3x64 convolution with a ReLU each, then a plain 3x3 one to four cells of each feature.

    Features (B, C, h, w) give a map (B, 1, 2h + 1, 2w + 1) of any sign, whose last row and column the counter cuts. The
    last convolution stays in float32, as in `DilatedDecoder`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(channels, 128, 1), nn.ReLU(), nn.Conv2d(128, 64, 3, padding=1), nn.ReLU())
        self.cells = nn.Conv2d(64, 4, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """Decode features (B, C, h, w) to a map (B, 1, 2h + 1, 2w + 1), float32."""
        return F.pad(F.pixel_shuffle(exact(self.cells, self.layers(features)), 2), (0, 1, 0, 1))
