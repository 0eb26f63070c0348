"""ConvNeXt (Liu et al., CVPR 2022) from transformers: 7.4 GFLOPs per crop of 224 pixels, where CSRNet takes 41.

Shape legend: B batch, H W image, h w = ceil(H / 16), ceil(W / 16).
"""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ConvNextBackbone, ConvNextConfig

from crowdray.models.backbone import Backbone
from crowdray.models.decoders import ShuffleDecoder


class ConvNeXt(Backbone):
    """The first three stages of ConvNeXt-Tiny: 12,348,768 parameters, stride 16, maps of stride 8.

    Not ConvNeXt V2, whose response normalization sees the whole image: features of a window would differ from those of
    its image. ImageNet weights published for transformers fit, for example facebook/convnext-tiny-224.
    """

    channels = 384
    stride = 16
    output_stride = 8
    receptive_radius = 587
    count_widths = (256, 64)
    requirements = ("transformers",)
    pretrained_prefixes = ("convnext.embeddings.", "convnext.encoder.")

    def __init__(self) -> None:
        super().__init__()
        stages = ConvNextConfig(num_stages=3, depths=[3, 3, 9], hidden_sizes=[96, 192, 384])
        self.convnext = ConvNextBackbone(stages)

    def forward(self, image: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) to features (B, 384, h, w)."""
        features: Tensor = self.convnext(self._padded(image)).feature_maps[-1]
        return features

    def checkpoint_segments(self) -> Sequence[Callable[[Tensor], Tensor]]:
        """One segment per block: a block's activations take ten times the memory of its input."""
        network = self.convnext
        lists = [blocks for stage in network.encoder.stages for blocks in stage.children()]
        blocks = [block for one in lists for block in one.children()]
        return [lambda image: network.embeddings(self._padded(image)), *blocks, *network.hidden_states_norms.values()]

    def _padded(self, image: Tensor) -> Tensor:
        """Pad to a multiple of the stride; the convolutions would drop incomplete patches."""
        height, width = image.shape[-2:]
        return F.pad(image, (0, -width % self.stride, 0, -height % self.stride))

    def map_decoder(self, task: str) -> nn.Module:
        """A decoder with 2x2 map cells per feature."""
        return ShuffleDecoder(self.channels)
