"""A small counter with the structure of the real ones, to test the registry without them."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crowdray.registry.packaging import Package

Repackage = Callable[[nn.Module, Path], Package]


class PlainCounter(nn.Module):
    """Strided encoder, fixed upsampling, crop to the size of the image."""

    kernel: Tensor
    mean: Tensor

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.encoder = nn.Sequential(
                nn.Conv2d(3, 8, 7, stride=2, padding=3),
                nn.ReLU(),
                nn.Conv2d(8, 8, 7, stride=2, padding=3),
                nn.ReLU(),
                nn.Conv2d(8, 8, 5, padding=2),
                nn.ReLU(),
            )
        taps = torch.tensor([1.0, 2, 3, 4, 3, 2, 1]) / 8
        self.register_buffer("kernel", torch.outer(taps, taps)[None, None], persistent=False)
        self.register_buffer("mean", torch.tensor([120.0, 110.0, 100.0]).reshape(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        density: Tensor = self.encoder((image * 1.0 - self.mean) / 58.0).mean(1, keepdim=True)
        for _ in range(2):
            padded = F.pad(density, (1, 2, 1, 2), mode="replicate")
            density = F.conv_transpose2d(padded, self.kernel, stride=2, padding=5)
        return density[..., :height, :width]


def photo(batch: int, height: int, width: int, seed: int = 1) -> Tensor:
    """Random photos: uint8 (B, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


METRICS = {"val/mae": 2.5, "val/rmse": 3.25}
TAGS = {
    "crowdray.data_digest": "d" * 64,
    "crowdray.git_revision": "abc+dirty",
    "crowdray.dataset_uri": "s3://b/c",
}
