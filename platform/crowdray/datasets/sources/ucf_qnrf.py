"""UCF-QNRF: large photos of crowds from the web.

Layout: Train/img_0001.jpg with Train/img_0001_ann.mat, which holds `annPoints`, and the same in Test/.
"""

from typing import Annotated

import numpy as np
import simplejpeg
from PIL import Image

from crowdray import storage
from crowdray.data.sample import content_size, decode_image
from crowdray.datasets.sources import Item
from crowdray.datasets.sources.base import AnnotatedImages, Heads, paired
from crowdray.datasets.sources.layout import by_stem
from crowdray.datasets.sources.matlab import read_points
from crowdray.errors import UserError

COORDINATE_BASE = 1.0
"""The centre of the first pixel is (1, 1). An assumption: no copy was at hand, and the files are MATLAB's."""

FOLDERS = {"train": "Train", "test": "Test"}

LONGEST = 1536
"""Pixels of the longer side at most: the cap of PET (Liu et al., ICCV 2023). Photos reach 6,000 x 9,000."""

JPEG_QUALITY = 95


class UcfQnrf(AnnotatedImages):
    """UCF-QNRF, its larger photos brought to a size that training can hold."""

    name = "ucf-qnrf"
    published = tuple(FOLDERS)

    def __init__(
        self,
        source: str,
        *,
        longest: Annotated[int, "pixels of the longer side at most, points go along; 0 leaves photos alone"] = LONGEST,
        depth: str = "auto",
    ) -> None:
        if longest != 0 and longest < 64:
            raise UserError(f"--longest {longest}: give at least 64 pixels, or 0 to leave the photos as they are")
        self._longest = longest
        root = storage.resolve(source)
        there = [split for split, folder in FOLDERS.items() if storage.exists(storage.join(root, folder))]
        if not there:
            raise UserError(f"{source} is not UCF-QNRF: it holds neither Train nor Test")
        super().__init__(root, there, depth, ("points", "none"))

    def split_items(self, split: str) -> list[Item]:
        """Photos by number."""
        folder = storage.join(self._root, FOLDERS[split])
        annotations = by_stem(storage.list_files(folder, ("_ann.mat",)))
        images = by_stem(storage.list_files(folder, (".jpg",)))
        return paired(split, images, {name.removesuffix("_ann"): uri for name, uri in annotations.items()})

    def heads(self, item: Item) -> Heads:
        """Heads of one img_n_ann.mat, in pixels of the photo as it was published."""
        assert item.annotation is not None
        return read_points(item.annotation, "annPoints", COORDINATE_BASE)

    def image(self, item: Item, heads: Heads) -> tuple[bytes, Heads]:
        """The photo, shrunk and encoded anew where it is too large, and its heads there."""
        return shrunk(*super().image(item, heads), self._longest)


def shrunk(content: bytes, heads: Heads, longest: int) -> tuple[bytes, Heads]:
    """An image whose longer side has at most `longest` pixels, and its heads (N, 2) in pixels of that.

    One that fits, as every one does for 0, keeps its bytes; the same bytes always give the same. Raises
    DataError for an image that cannot be decoded.
    """
    height, width = content_size(content)
    if not longest or max(width, height) <= longest:
        return content, heads
    columns, rows = (max(1, round(side * longest / max(width, height))) for side in (width, height))
    small = Image.fromarray(decode_image(content)).resize((columns, rows), Image.Resampling.LANCZOS)
    made: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(small), quality=JPEG_QUALITY, colorsubsampling="444")
    return made, heads * [columns / width, rows / height]
