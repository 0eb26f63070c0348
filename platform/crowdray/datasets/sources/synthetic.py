"""Rendered crowds as a source: no download, exact heads and depth, the same bytes for the same options."""

from collections.abc import Sequence
from typing import Annotated, Any

import simplejpeg

from crowdray.data.sample import Sample, encode_depth, encode_roi, make_sample
from crowdray.datasets.depth import View, open_teacher
from crowdray.datasets.sources import Item
from crowdray.datasets.sources.layout import chosen_splits
from crowdray.errors import UserError
from crowdray.scenes import SceneSpec, render

FIRST_INDEX = {"train": 0, "val": 1_000_000, "test": 2_000_000}
"""Where each split's pictures begin: far apart, so that more training images leave the others as they are."""

JPEG_QUALITY = 92


class Synthetic:
    """So many rendered pictures for each split; further options are the fields of SceneSpec."""

    name = "synthetic"

    def __init__(
        self,
        *,
        train: Annotated[int, "images for training"] = 400,
        val: Annotated[int, "images for a split of their own for validation; 0: training takes its share"] = 0,
        test: Annotated[int, "images for testing"] = 100,
        seed: Annotated[int, "another seed gives other scenes"] = 0,
        width: Annotated[int, "image width in pixels"] = 320,
        height: Annotated[int, "image height in pixels"] = 240,
        cameras: Annotated[int, "number of places"] = 8,
        depth: str = "auto",
        **scene: Any,
    ) -> None:
        self._counts = {"train": train, "val": val, "test": test}
        wrong = {split: n for split, n in self._counts.items() if not 0 <= n <= 1_000_000}
        if wrong or not any(self._counts.values()):
            raise UserError(f"synthetic: images per split are {self._counts}; give 0 to 1000000, and not 0 for all")
        self._spec = SceneSpec(seed=seed, width=width, height=height, cameras=cameras, **scene)
        self._teacher = open_teacher(depth, ("own", "points", "none"))
        self.depth_teacher, self.gpu = self._teacher.name, self._teacher.gpu

    def items(self, splits: Sequence[str] = ()) -> list[Item]:
        """Pictures by number; only the splits with a picture are there."""
        there = [split for split, count in self._counts.items() if count]
        return [
            Item(split, f"{number:06d}", number=FIRST_INDEX[split] + number)
            for split in chosen_splits(self.name, there, splits)
            for number in range(self._counts[split])
        ]

    def load(self, item: Item) -> Sample:
        """Render one picture and encode it as a camera would."""
        scene = render(self._spec, item.number)
        height, width = scene.image.shape[:2]
        image = simplejpeg.encode_jpeg(scene.image, quality=JPEG_QUALITY, colorsubsampling="420")
        # Depth beyond the farthest annotated place teaches nothing, and sky would squeeze all the rest.
        depth = scene.depth.clip(max=scene.depth[scene.roi].max()) if scene.roi.any() else scene.depth
        view = View(
            image=image,
            height=height,
            width=width,
            points=scene.points,
            split=item.split,
            name=item.name,
            own_depth=depth,
        )
        taught = self._teacher.depth(view)
        return make_sample(
            name=item.name,
            split=item.split,
            scene=scene.scene,
            image=image,
            points=scene.points,
            roi=None if scene.roi.all() else encode_roi(scene.roi),
            depth=None if taught is None else encode_depth(taught),
            shape=(height, width),
        )

    def notes(self, splits: Sequence[str] = ()) -> list[str]:
        """Nothing: every split that was asked for is made."""
        return []
