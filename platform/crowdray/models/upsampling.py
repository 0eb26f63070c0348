"""Fixed bilinear upsampling, the untrained deconvolution of the paper.

Shape legend: B batch, C channels, H height, W width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FixedUpsample(nn.Module):
    """Double height and width with the fixed 7x7 bilinear kernel of a stride-2 deconvolution.

    Input (B, C, H, W), output (B, C, 2H + 1, 2W + 1), any floating dtype; no trained parameter. Output cell 2i is
    centred on input cell i, as in a stride-2 convolution with an odd kernel, and a constant map stays constant. Edge
    values are replicated: zero padding would lose up to a quarter of the mass at the border. The caller cuts the extra
    row and column: a slice that always removes something exports for every image size, whereas one that sometimes does
    not leaves a guard on the size.

    Channels are upsampled independently: the paper's averaging of channels (64 to 32 to 1) commutes with the shared
    linear kernel, and the caller does it first, at a fraction of the cost.
    """

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 2.0, 3.0, 4.0, 3.0, 2.0, 1.0]) / 8  # the taps of each output parity sum to 1
        self.register_buffer("kernel", torch.outer(taps, taps)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Upsample x (B, C, H, W) to (B, C, 2H + 1, 2W + 1), in the precision of x, also under autocast."""
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x)
        channels = x.shape[1]
        padded = F.pad(x, (1, 2, 1, 2), mode="replicate")
        return F.conv_transpose2d(padded, self.kernel.expand(channels, 1, 7, 7), stride=2, padding=5, groups=channels)
