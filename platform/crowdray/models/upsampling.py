"""Fixed bilinear upsampling: the deconvolution that the paper never trains.

Shape legend: B batch, C channels, H height, W width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FixedUpsample(nn.Module):
    """Double height and width with the fixed 7x7 bilinear kernel of a stride-2 deconvolution.

    Input (B, C, H, W), output (B, C, 2H + 1, 2W + 1), any floating dtype; no trained parameter. Output cell
    2i lies on input cell i, as a stride-2 convolution with odd kernel reads it; a constant map stays that
    constant. At the rim the map is continued by its edge values: a plain deconvolution sees zeros there and
    loses up to a quarter of the border's mass. The one row and column too many are the caller's to cut: a cut
    that always cuts something exports for every image size, one that sometimes does not leaves a guard on the
    size.

    Each channel is upsampled alone: the kernel is linear and shared, so the paper's averaging of channels (64
    to 32 to 1) commutes with it and is done by the caller, before, at a fraction of the cost.
    """

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 2.0, 3.0, 4.0, 3.0, 2.0, 1.0]) / 8  # the taps of each output parity sum to one
        self.register_buffer("kernel", torch.outer(taps, taps)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Upsample x (B, C, H, W) to (B, C, 2H + 1, 2W + 1), in x's own precision also under autocast."""
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x)
        channels = x.shape[1]
        padded = F.pad(x, (1, 2, 1, 2), mode="replicate")
        return F.conv_transpose2d(padded, self.kernel.expand(channels, 1, 7, 7), stride=2, padding=5, groups=channels)
