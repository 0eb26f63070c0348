"""The seam between a counter and its backbone: an encoder, and what it says of itself.

Shape legend: B batch, H W image, C h w features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import ClassVar

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crowdray.errors import UserError
from crowdray.models.decoders import CountDecoder, DilatedDecoder


class Backbone(nn.Module):
    """An encoder from normalised RGB (B, 3, H, W) to features (B, channels, ceil(H / stride), ceil(W / stride)), and
    the decoders that fit it.

    A backbone of one's own derives from this, sets the numbers below and defines `forward`; docs/backbone.md is an
    example. What keeps running statistics (BatchNorm) or draws random numbers (dropout) may be in it.
    """

    channels: ClassVar[int]
    """Channels of the features."""
    stride: ClassVar[int]
    """Pixels from one feature to the next, along a side."""
    output_stride: ClassVar[int]
    """Pixels of one cell of the maps, along a side; it divides the stride."""
    receptive_radius: ClassVar[int]
    """Pixels that can change the density of an output cell lie no farther than this from any pixel of the cell."""
    count_widths: ClassVar[tuple[int, ...]] = (64, 32)
    """Hidden layers of the paper's count decoder for this backbone."""
    count_dropout: ClassVar[float] = 0.0
    """Dropout after the first of them."""
    published: ClassVar[tuple[str, ...]] = ("",)
    """How the names of published weights begin, those that `load_published` takes."""
    libraries: ClassVar[tuple[str, ...]] = ()
    """Distributions beside torch whose code it runs: their versions are part of what it trains."""

    def segments(self) -> Sequence[Callable[[Tensor], Tensor]]:
        """`forward` in parts, one after the other, for `recomputed`: cut where little has to be kept between two, and
        where no part begins by changing its input in place. Without one of its own a backbone is a single part."""
        return [self]

    def map_decoder(self, task: str) -> nn.Module:
        """A decoder of one map task: features (B, C, h, w) to a map (B, 1, h, w), or where `output_stride` is smaller
        than `stride` to one larger than the image's cells, which is cut at the bottom and the right."""
        return DilatedDecoder(self.channels)

    def count_decoder(self, side: int) -> nn.Module:
        """The paper's count decoder, from features (B, C, side, side) to counts (B,)."""
        return CountDecoder(self.channels, side, self.count_widths, self.count_dropout)

    def load_pretrained(self, tensors: Mapping[str, Tensor], place: str) -> None:
        """Take published weights of the encoder, by the names they were published under; others are left alone.

        Raises UserError, naming `place`, when one is missing or has another shape; then nothing is changed.
        """
        own = {name: value for name, value in self.state_dict().items() if name.startswith(self.published)}
        problems = [f"{name} is missing" for name in own if name not in tensors]
        problems += [
            f"{name} is {tuple(tensors[name].shape)}, expected {tuple(value.shape)}"
            for name, value in own.items()
            if name in tensors and tensors[name].shape != value.shape
        ]
        if not own:
            problems = [f"none of its names begins with {' or '.join(self.published)!r}, as its `published` says"]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise UserError(
                f"{place} holds no weights of {type(self).__name__}: {', '.join(problems[:3])}{more}; give the file "
                "that was published for it"
            )
        self.load_state_dict({name: tensors[name] for name in own}, strict=False)


def recomputed(backbone: Backbone, image: Tensor) -> Tensor:
    """What `backbone(image)` gives, with nothing kept for the backward pass but the input of each segment: there its
    activations are computed once more (Chen et al. 2016, arXiv 1604.06174).

    Dropout draws the same numbers again, and what the second pass changes in buffers is dropped: running statistics
    take a batch in once.
    """
    for segment in backbone.segments():
        image = checkpoint(segment, image, use_reentrant=False, context_fn=lambda: (nullcontext(), _in_vain(backbone)))
    return image


@contextmanager
def _in_vain(module: nn.Module) -> Iterator[None]:
    """Copies in the place of all buffers."""
    buffers = [(part, name, value) for part in module.modules() for name, value in part.named_buffers(recurse=False)]
    for part, name, value in buffers:
        setattr(part, name, value.clone())
    try:
        yield
    finally:
        for part, name, value in buffers:
            setattr(part, name, value)
