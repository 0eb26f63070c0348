"""UCF-QNRF: large photos of crowds from the web.

Layout: Train/img_0001.jpg with Train/img_0001_ann.mat, which contains `annPoints`, and the same in Test/.
"""

from typing import Annotated

import numpy as np
import simplejpeg
from PIL import Image

from crowdray.data.decoding import content_size, decode_image
from crowdray.datasets.sources import Item
from crowdray.datasets.sources.base import AnnotatedImages, Heads, pair_items
from crowdray.datasets.sources.layout import IMAGE, files_by_name, find_root
from crowdray.datasets.sources.matlab import read_points
from crowdray.errors import UserError

COORDINATE_BASE = 1.0
"""The centre of the first pixel is (1, 1). Assumed, because the files are MATLAB's; not verified on a copy."""

SPLITS = ("train", "test")

MAX_SIDE = 1536
"""Maximum longer side in pixels, as in PET (Liu et al., ICCV 2023). Photos reach 6,000 x 9,000."""

JPEG_QUALITY = 95


class UcfQnrf(AnnotatedImages):
    """UCF-QNRF, with larger photos reduced to a size suitable for training."""

    name = "ucf-qnrf"
    official_splits = SPLITS

    def __init__(
        self,
        source: str,
        *,
        longest: Annotated[int, "maximum longer side in pixels, to which photos are reduced; 0: no limit"] = MAX_SIDE,
        depth: str = "auto",
    ) -> None:
        if longest != 0 and longest < 64:
            raise UserError(f"--longest {longest}: give at least 64 pixels, or 0 to keep photos unchanged")
        self._longest = longest
        root, files = find_root(source, "UCF-QNRF", "Train/img_0001.jpg", IMAGE, "(?:train|test)")
        super().__init__(root, [split for split in SPLITS if files_by_name(files, IMAGE, split)], depth, files=files)

    def split_items(self, split: str) -> list[Item]:
        """Photos in the order of their numbers."""
        annotations = files_by_name(self._visible_files, r"(?P<name>[^/]+)_ann\.mat", split)
        return pair_items(split, files_by_name(self._visible_files, IMAGE, split), annotations)

    def heads(self, item: Item) -> Heads:
        """Heads of one img_n_ann.mat, in pixels of the original photo."""
        return read_points(item.annotation, "annPoints", COORDINATE_BASE)

    def image(self, item: Item, heads: Heads) -> tuple[bytes, Heads]:
        """The photo, reduced and encoded again if it is too large, and its heads in pixels of the result."""
        return reduce_image(*super().image(item, heads), self._longest)


def reduce_image(content: bytes, heads: Heads, longest: int) -> tuple[bytes, Heads]:
    """Reduce an image to a longer side of at most `longest` pixels, and scale its heads (N, 2).

    Smaller images, and all images for 0, keep their bytes; the result is deterministic. Raises DataError for an image
    that cannot be decoded.
    """
    height, width = content_size(content)
    if not longest or max(width, height) <= longest:
        return content, heads
    columns, rows = (max(1, round(side * longest / max(width, height))) for side in (width, height))
    small = Image.fromarray(decode_image(content)).resize((columns, rows), Image.Resampling.LANCZOS)
    encoded: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(small), quality=JPEG_QUALITY, colorsubsampling="444")
    return encoded, heads * [columns / width, rows / height]
