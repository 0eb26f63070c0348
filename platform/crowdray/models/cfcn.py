"""CFCN, the paper's light backbone: three convolutions, stride 4.

Shape legend: B batch, H W image, h = ceil(H / 4), w = ceil(W / 4).
"""

import torch
from torch import Tensor, nn

from crowdray.models.backbone import Backbone
from crowdray.models.counter import SEGMENTATION
from crowdray.models.decoders import LogitDecoder, MapDecoder


class CFCN(Backbone):
    """7x7x32 stride 2, 7x7x64 stride 2, 5x5x128, each with a ReLU (Table 1): 310,080 parameters.

    Normalized images (B, 3, H, W) to features (B, 128, h, w).
    """

    channels = 128
    stride = 4
    output_stride = 1
    receptive_radius = 34
    """3 + 6 + 8 pixels from the three convolutions, 8 from the decoder's, 9 from its two upsamplings."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 7, stride=2, padding=3)
        self.conv2 = nn.Conv2d(32, 64, 7, stride=2, padding=3)
        self.conv3 = nn.Conv2d(64, 128, 5, padding=2)

    def forward(self, image: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) to features (B, 128, h, w)."""
        x = torch.relu(self.conv1(image))
        x = torch.relu(self.conv2(x))
        return torch.relu(self.conv3(x))

    def map_decoder(self, task: str) -> nn.Module:
        """The decoder of Table 1; segmentation has one whose logits can be negative."""
        return LogitDecoder(self.channels) if task == SEGMENTATION else MapDecoder(self.channels)
