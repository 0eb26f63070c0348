"""The counter: one encoder, the density decoder that ships, and the auxiliary decoders that only train.

Shape legend: B batch, H W image, C h w features, N side of the count decoder's crop in features.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

DENSITY = "density"
SEGMENTATION = "segmentation"
DEPTH = "depth"
COUNT = "count"
AUXILIARY = (SEGMENTATION, DEPTH, COUNT)
TASKS = (DENSITY, *AUXILIARY)

# Mean and deviation of ImageNet's training images, RGB in 0..255: what published encoder weights expect.
_MEAN = (123.675, 116.28, 103.53)
_STD = (58.395, 57.12, 57.375)


class Encoder(Protocol):
    """What a backbone says of itself; it is an nn.Module from (B, 3, H, W) to (B, channels, ceil(H/stride),
    ceil(W/stride))."""

    channels: int
    stride: int
    receptive_radius: int


class Counter(nn.Module):
    """Encoder, density decoder, and any of the auxiliary decoders of the paper.

    `decoders` maps task names to modules; "density" must be among them. The density decoder's raw output is
    `density_scale` times heads per cell, and the count decoder's is heads divided by `count_scale`.
    Images are raw RGB, (B, 3, H, W), 0..255, any real dtype: the normalisation ships with the model.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: nn.Module, decoders: Mapping[str, nn.Module], density_scale: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoders = nn.ModuleDict(decoders)
        self.density_scale = density_scale
        self.register_buffer("mean", torch.tensor(_MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).reshape(3, 1, 1), persistent=False)

    @property
    def backbone(self) -> Encoder:
        """The encoder, seen as what it says of itself."""
        return cast(Encoder, self.encoder)

    def features(self, image: Tensor) -> Tensor:
        """Encode raw RGB (B, 3, H, W) to features (B, C, h, w)."""
        features: Tensor = self.encoder((image - self.mean) / self.std)
        return features

    def forward(
        self,
        image: Tensor,
        tasks: Collection[str] = (DENSITY,),
        corners: Tensor | None = None,
        frozen_encoder: bool = False,
    ) -> dict[str, Tensor]:
        """Predict the asked tasks, in the units their losses compare (density and count scaled, segmentation
        as logits).

        corners (B, 2): row and column, in features, of the N x N square that the count decoder reads (0, 0
        when None).
        frozen_encoder: keep no graph of the encoder (stage 2).
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen_encoder):
            features = self.features(image)
        return self.decode(features, tasks, image.shape[-2:], corners)

    def decode(
        self, features: Tensor, tasks: Collection[str], size: Sequence[int], corners: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Decode features (B, C, h, w) of images of the given size (H, W); the rest as in `forward`."""
        height, width = size
        out = {task: self.decoders[task](features)[..., :height, :width] for task in tasks if task != COUNT}
        if COUNT in tasks:
            decoder = self.decoders[COUNT]
            out[COUNT] = decoder(_squares(features, corners, cast(int, decoder.side)))
        return out

    def density(self, image: Tensor) -> Tensor:
        """Density of raw RGB (B, 3, H, W): (B, 1, H, W) float32 in heads per cell; its sum is the count."""
        height, width = image.shape[-2:]
        scaled: Tensor = self.decoders[DENSITY](self.features(image))
        return scaled[..., :height, :width] / self.density_scale

    def strip(self) -> "Counter":
        """The same counter without its auxiliary decoders: shares the encoder and the density decoder."""
        return Counter(self.encoder, {DENSITY: self.decoders[DENSITY]}, self.density_scale)


def _squares(features: Tensor, corners: Tensor | None, side: int) -> Tensor:
    if corners is None:
        return features[..., :side, :side]
    return torch.stack([f[:, r : r + side, c : c + side] for f, (r, c) in zip(features, corners.tolist(), strict=True)])
