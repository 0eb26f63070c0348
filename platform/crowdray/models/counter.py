"""The counter: one encoder, the density decoder that ships, and the auxiliary decoders that only train.

Shape legend: B batch, H W image, C h w features, N side of the count decoder's crop in features.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from crowdray.models.backbone import Backbone, recomputed

DENSITY = "density"
SEGMENTATION = "segmentation"
DEPTH = "depth"
COUNT = "count"
AUXILIARY = (SEGMENTATION, DEPTH, COUNT)
TASKS = (DENSITY, *AUXILIARY)

# Mean and deviation of ImageNet's training images, RGB in 0..255: what published encoder weights expect.
_MEAN = (123.675, 116.28, 103.53)
_STD = (58.395, 57.12, 57.375)


class Counter(nn.Module):
    """Encoder, density decoder, and any of the auxiliary decoders of the paper.

    `decoders` maps task names to modules; "density" must be among them. The density decoder's raw output is
    `density_scale` times heads per cell, and the count decoder's is heads divided by `count_scale`.
    Images are raw RGB, (B, 3, H, W), 0..255, any real dtype: the normalisation ships with the model.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Backbone, decoders: Mapping[str, nn.Module], density_scale: float) -> None:
        super().__init__()
        self.encoder: Backbone = encoder
        self.decoders = nn.ModuleDict(decoders)
        self.density_scale = density_scale
        self.activation_checkpointing = False
        """Whether the encoder's activations are computed again in the backward pass instead of kept."""
        self.register_buffer("mean", torch.tensor(_MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).reshape(3, 1, 1), persistent=False)

    def features(self, image: Tensor) -> Tensor:
        """Encode raw RGB (B, 3, H, W) to features (B, C, h, w)."""
        normalised = (image - self.mean) / self.std
        if self.activation_checkpointing and torch.is_grad_enabled():
            return recomputed(self.encoder, normalised)
        features: Tensor = self.encoder(normalised)
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

        corners (B, 2): integer row and column, in features, of the N x N square that the count decoder reads (0, 0
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
        out = {task: self._map(task, features, size) for task in tasks if task != COUNT}
        if COUNT in tasks:
            decoder = self.decoders[COUNT]
            out[COUNT] = decoder(_squares(features, corners, cast(int, decoder.side)))
        return out

    def density(self, image: Tensor) -> Tensor:
        """Density of raw RGB (B, 3, H, W): (B, 1, h', w') float32 in heads per cell, h' = ceil(H / output stride); its
        sum is the count."""
        return self._map(DENSITY, self.features(image), image.shape[-2:]) / self.density_scale

    def strip(self) -> "Counter":
        """The same counter without its auxiliary decoders: shares the encoder and the density decoder."""
        return Counter(self.encoder, {DENSITY: self.decoders[DENSITY]}, self.density_scale)

    def _map(self, task: str, features: Tensor, size: Sequence[int]) -> Tensor:
        """A task's map of images of the given size, float32."""
        cells: Tensor = self.decoders[task](features)
        if self.encoder.output_stride == self.encoder.stride:
            return cells
        height, width = (-(-side // self.encoder.output_stride) for side in size)
        return cells[..., :height, :width]


def _squares(features: Tensor, corners: Tensor | None, side: int) -> Tensor:
    if corners is None or features.shape[-2:] == (side, side):
        return features[..., :side, :side]
    # Corners stay tensors: a GPU would be waited for, and a compiler would take each number for a case of its own.
    along = torch.arange(side, device=features.device)
    rows, columns = (corner[:, None] + along for corner in corners.unbind(1))
    images = torch.arange(len(features), device=features.device)[:, None, None]
    return features.permute(0, 2, 3, 1)[images, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
