"""Rendered crowds: no download, exact heads and depth, equal bytes for equal options."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import simplejpeg

from crowdray.data.sample import Sample, encode_depth, encode_roi, make_sample
from crowdray.datasets.depth import open_teacher
from crowdray.datasets.depth.teacher import DepthInput
from crowdray.datasets.sources import Item
from crowdray.datasets.sources.layout import chosen_splits
from crowdray.errors import UserError
from crowdray.scenes import SceneSpec, render

FIRST_INDEX = {"train": 0, "val": 1_000_000, "test": 2_000_000}
"""First scene number of each split: far apart, so that more training images do not change other splits."""

JPEG_QUALITY = 92


class Synthetic:
    """A given number of rendered images per split; further options are the fields of SceneSpec."""

    name = "synthetic"

    def __init__(
        self,
        *,
        train: Annotated[int, "images for training"] = 400,
        val: Annotated[int, "images for a validation split; 0: training sets some of its own aside"] = 0,
        test: Annotated[int, "images for testing"] = 100,
        seed: Annotated[int, "random seed of the scenes"] = 0,
        width: Annotated[int, "image width in pixels"] = 320,
        height: Annotated[int, "image height in pixels"] = 240,
        cameras: Annotated[int, "number of cameras"] = 8,
        depth: str = "auto",
        **scene: Any,
    ) -> None:
        self._counts = {"train": train, "val": val, "test": test}
        wrong = {split: n for split, n in self._counts.items() if not 0 <= n <= 1_000_000}
        if wrong or not any(self._counts.values()):
            raise UserError(f"synthetic: images per split are {self._counts}; give 0 to 1000000, and not 0 for all")
        self._spec = SceneSpec(seed=seed, width=width, height=height, cameras=cameras, **scene)
        self.teacher = open_teacher(depth, ("own", "points", "none"))

    def items(self, splits: Sequence[str] = ()) -> list[Item]:
        """Images in the order of their numbers; splits without images are not available."""
        available = [split for split, count in self._counts.items() if count]
        return [
            Item(split, f"{number:06d}", number=FIRST_INDEX[split] + number)
            for split in chosen_splits(self.name, available, splits)
            for number in range(self._counts[split])
        ]

    def load(self, item: Item) -> Sample:
        """Render one image and encode it as a camera would."""
        scene = render(self._spec, item.number)
        height, width = scene.image.shape[:2]
        image = simplejpeg.encode_jpeg(scene.image, quality=JPEG_QUALITY, colorsubsampling="420")
        # Depth beyond the farthest annotated pixel is useless, and sky would compress the rest.
        depth = scene.depth.clip(max=scene.depth[scene.roi].max()) if scene.roi.any() else scene.depth
        sample = make_sample(
            name=item.name,
            split=item.split,
            scene=scene.scene,
            image=image,
            points=scene.points,
            roi=None if scene.roi.all() else encode_roi(scene.roi),
            shape=(height, width),
        )
        teacher_depth = self.teacher.depth(DepthInput(sample=sample, source_depth=depth))
        return replace(sample, depth=None if teacher_depth is None else encode_depth(teacher_depth))

    def notes(self, splits: Sequence[str] = ()) -> list[str]:
        """No notes: every requested split is complete."""
        return []
