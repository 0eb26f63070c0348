"""Base class of backbones: an encoder with its strides, receptive field and matching decoders.

Shape legend: B batch, H W image, C h w features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import ClassVar

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crowdray.errors import UserError
from crowdray.models.decoders import CountDecoder, DilatedDecoder

IMAGE_MEAN, IMAGE_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""Mean and standard deviation of ImageNet's training images, RGB in 0..255, with which a counter normalizes images."""


class Backbone(nn.Module):
    """Encoder from normalized RGB (B, 3, H, W) to features (B, channels, ceil(H / stride), ceil(W / stride)).

    A custom backbone derives from this class, sets the four numbers below and defines `forward`; docs/backbone.md has
    an example. BatchNorm and dropout are supported.
    """

    channels: ClassVar[int]
    """Number of feature channels."""
    stride: ClassVar[int]
    """Pixels per feature along each axis."""
    output_stride: ClassVar[int]
    """Pixels per cell of the output maps along each axis; a divisor of the stride."""
    receptive_radius: ClassVar[int]
    """Largest distance in pixels from an output cell at which a pixel can change the cell's density."""
    count_widths: ClassVar[tuple[int, ...]] = (64, 32)
    """Widths of the hidden layers of the paper's count decoder."""
    count_dropout: ClassVar[float] = 0.0
    """Dropout after the first hidden layer."""
    pretrained_prefixes: ClassVar[tuple[str, ...]] = ("",)
    """Prefixes of the parameter names that `load_pretrained` takes from a file of pretrained weights."""
    imagenet_package: ClassVar[str] = ""
    """Python package with a file models/*.pth of its ImageNet weights, for --model.weights imagenet; empty without."""
    requirements: ClassVar[tuple[str, ...]] = ()
    """Distributions besides torch whose code it runs; their versions are part of the stage cache's keys."""

    def checkpoint_segments(self) -> Sequence[Callable[[Tensor], Tensor]]:
        """The consecutive parts of `forward` between which activation checkpointing stores activations.

        Cut where activations are small. No segment may start by changing its input in place. By default the backbone is
        one segment.
        """
        return [self]

    def map_decoder(self, task: str) -> nn.Module:
        """Decoder of one map task from features (B, C, h, w) to a map (B, 1, h, w).

        With `output_stride` below `stride` the map is at least as large as the image in cells, and is cut at the bottom
        and the right.
        """
        return DilatedDecoder(self.channels)

    def count_decoder(self, side: int) -> nn.Module:
        """The paper's count decoder from features (B, C, side, side) to counts (B,)."""
        return CountDecoder(self.channels, side, self.count_widths, self.count_dropout)

    def load_pretrained(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Load the parameters whose names start with `pretrained_prefixes`; the others stay as they are.

        Raises:
            UserError: If one is missing or has another shape; no parameter is changed then. `source` names the file.
        """
        own = {name: value for name, value in self.state_dict().items() if name.startswith(self.pretrained_prefixes)}
        problems = [f"{name} is missing" for name in own if name not in tensors]
        problems += [
            f"{name} is {tuple(tensors[name].shape)}, expected {tuple(value.shape)}"
            for name, value in own.items()
            if name in tensors and tensors[name].shape != value.shape
        ]
        if not own:
            problems = [f"none of its parameters starts with {' or '.join(self.pretrained_prefixes)!r}"]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise UserError(
                f"{source} does not fit {type(self).__name__}: {', '.join(problems[:3])}{more}; give weights that were "
                "published for this network"
            )
        self.load_state_dict({name: tensors[name] for name in own}, strict=False)


def checkpointed_forward(backbone: Backbone, image: Tensor) -> Tensor:
    """`backbone(image)` with activation checkpointing: only the input of each segment is stored.

    The backward pass recomputes the rest (Chen et al. 2016, arXiv 1604.06174). Dropout draws the same numbers again,
    and buffers are restored afterwards, so that running statistics are updated once per batch.
    """
    for segment in backbone.checkpoint_segments():
        image = checkpoint(
            segment, image, use_reentrant=False, context_fn=lambda: (nullcontext(), _restored_buffers(backbone))
        )
    return image


@contextmanager
def _restored_buffers(module: nn.Module) -> Iterator[None]:
    """Let a block change copies of the module's buffers, then restore the originals."""
    buffers = [(part, name, value) for part in module.modules() for name, value in part.named_buffers(recurse=False)]
    for part, name, value in buffers:
        setattr(part, name, value.clone())
    try:
        yield
    finally:
        for part, name, value in buffers:
            setattr(part, name, value)
