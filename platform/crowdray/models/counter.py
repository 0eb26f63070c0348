"""The counter: an encoder, the density decoder, and auxiliary decoders for training only.

Shape legend: B batch, H W image, C h w features, N side of the count decoder's crop in features.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from crowdray.models.backbone import IMAGE_MEAN, IMAGE_STD, Backbone, checkpointed_forward

DENSITY = "density"
SEGMENTATION = "segmentation"
DEPTH = "depth"
COUNT = "count"
AUXILIARY = (SEGMENTATION, DEPTH, COUNT)
TASKS = (DENSITY, *AUXILIARY)


class Counter(nn.Module):
    """Encoder, density decoder, and any of the paper's auxiliary decoders.

    Images are raw RGB, (B, 3, H, W), 0..255, any real dtype: normalization is part of the model. The raw output of the
    density decoder is heads per cell times `density_scale`, that of the count decoder heads divided by the trainer's
    `count_scale`.

    Args:
        encoder: Images to features.
        decoders: Decoders by task; "density" is required.
        density_scale: Divisor from the density decoder's output to heads per cell.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Backbone, decoders: Mapping[str, nn.Module], density_scale: float) -> None:
        super().__init__()
        self.encoder: Backbone = encoder
        self.decoders = nn.ModuleDict(decoders)
        self.density_scale = density_scale
        self.activation_checkpointing = False
        """Recompute the encoder's activations in the backward pass instead of storing them."""
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).reshape(3, 1, 1), persistent=False)

    def features(self, image: Tensor) -> Tensor:
        """Encode raw RGB (B, 3, H, W) to features (B, C, h, w)."""
        normalized = (image - self.mean) / self.std
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpointed_forward(self.encoder, normalized)
        features: Tensor = self.encoder(normalized)
        return features

    def forward(
        self,
        image: Tensor,
        tasks: Collection[str] = (DENSITY,),
        corners: Tensor | None = None,
        frozen_encoder: bool = False,
    ) -> dict[str, Tensor]:
        """Predict tasks in the units of their losses: density and count scaled, segmentation as logits.

        Args:
            image: (B, 3, H, W) raw RGB.
            tasks: Which of TASKS.
            corners: (B, 2) integer row and column, in features, of the N x N square that the count decoder reads; None
                means (0, 0).
            frozen_encoder: Record no autograd graph of the encoder (second stage).
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen_encoder):
            features = self.features(image)
        return self.decode(features, tasks, image.shape[-2:], corners)

    def decode(
        self, features: Tensor, tasks: Collection[str], size: Sequence[int], corners: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Decode features (B, C, h, w) of images of size (H, W); other arguments as in `forward`."""
        out = {task: self._map(task, features, size) for task in tasks if task != COUNT}
        if COUNT in tasks:
            decoder = self.decoders[COUNT]
            out[COUNT] = decoder(_crop_squares(features, corners, cast(int, decoder.side)))
        return out

    def density(self, image: Tensor) -> Tensor:
        """Density of raw RGB (B, 3, H, W) in heads per cell; its sum is the count.

        Returns (B, 1, ceil(H / output_stride), ceil(W / output_stride)) float32.
        """
        return self._map(DENSITY, self.features(image), image.shape[-2:]) / self.density_scale

    def strip(self) -> "Counter":
        """The counter without auxiliary decoders; shares the encoder and the density decoder."""
        return Counter(self.encoder, {DENSITY: self.decoders[DENSITY]}, self.density_scale)

    def _map(self, task: str, features: Tensor, size: Sequence[int]) -> Tensor:
        """A task's map of images of size (H, W), float32."""
        cells: Tensor = self.decoders[task](features)
        if self.encoder.output_stride == self.encoder.stride:
            return cells
        height, width = (-(-side // self.encoder.output_stride) for side in size)
        return cells[..., :height, :width]


def _crop_squares(features: Tensor, corners: Tensor | None, side: int) -> Tensor:
    if corners is None or features.shape[-2:] == (side, side):
        return features[..., :side, :side]
    # Corners stay tensors: numbers would synchronize with the GPU, and make torch.compile specialize on each.
    along = torch.arange(side, device=features.device)
    rows, columns = (corner[:, None] + along for corner in corners.unbind(1))
    images = torch.arange(len(features), device=features.device)[:, None, None]
    return features.permute(0, 2, 3, 1)[images, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
