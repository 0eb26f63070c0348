"""A user's backbone, in a module of its own so that a configuration can name it."""

from collections.abc import Sequence

from torch import Tensor, nn

from crowdray.models.backbone import Backbone


class SmallBackbone(Backbone):
    """Stride 8 in two segments, with both kinds of running statistics and dropout."""

    channels = 16
    stride = 8
    output_stride = 8
    receptive_radius = 70

    def __init__(self) -> None:
        super().__init__()
        blocks = [
            nn.Sequential(
                nn.Conv2d(before, after, 3, stride=2, padding=1),
                nn.BatchNorm2d(after, momentum=momentum),
                nn.ReLU(inplace=True),
                nn.Dropout(0.3),
            )
            for before, after, momentum in ((3, 8, 0.1), (8, 16, None), (16, 16, 0.1))
        ]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, image: Tensor) -> Tensor:
        features: Tensor = self.blocks(image)
        return features

    def checkpoint_segments(self) -> Sequence[nn.Module]:
        return [self.blocks[:1], self.blocks[1:]]


class SingleSegmentBackbone(SmallBackbone):
    """The same in one segment, as for a class that defines only `forward`."""

    def checkpoint_segments(self) -> Sequence[nn.Module]:
        return Backbone.checkpoint_segments(self)  # type: ignore[return-value]


SMALL, SINGLE_SEGMENT = (f"{kind.__module__}:{kind.__name__}" for kind in (SmallBackbone, SingleSegmentBackbone))
