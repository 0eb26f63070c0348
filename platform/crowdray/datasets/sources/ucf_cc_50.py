"""UCF_CC_50: fifty grey photos of very dense crowds, evaluated over five folds.

Layout: n.jpg and n_ann.mat with `annPoints`, n from 1 to 50.
"""

from collections.abc import Sequence
from typing import Annotated

from crowdray import storage
from crowdray.datasets.sources import Item
from crowdray.datasets.sources.base import AnnotatedImages, Heads, pair_items
from crowdray.datasets.sources.layout import IMAGE, files_by_name, not_found, visible_files
from crowdray.datasets.sources.matlab import read_points
from crowdray.errors import UserError

COORDINATE_BASE = 1.0
"""The centre of the first pixel is (1, 1). Assumed, because the files are MATLAB's; not verified on a copy."""

FOLDS, FOLD_IMAGES = 5, 10
"""Number of folds, and images per fold: the first fold is images 1 to 10."""

SPLITS = ("train", "test")


class UcfCc50(AnnotatedImages):
    """UCF_CC_50 with one fold for testing and the others for training."""

    official_splits = SPLITS

    def __init__(
        self,
        source: str,
        *,
        fold: Annotated[int, "fold for testing, 1 to 5; the others are for training"] = 1,
        depth: str = "auto",
    ) -> None:
        if not 1 <= fold <= FOLDS:
            raise UserError(f"--fold {fold}: ucf-cc-50 has folds 1 to {FOLDS}; choose one of them")
        self._fold = fold
        self.name = f"ucf-cc-50-fold{fold}"
        files = visible_files(source)
        self._images = files_by_name(files, IMAGE)
        self._annotations = files_by_name(files, r"(?P<name>[^/]+)_ann\.mat")
        if unexpected := [name for name in self._images | self._annotations if not name.isdecimal()]:
            raise UserError(f"{source} contains {unexpected[0]}, but UCF_CC_50 has images such as 1.jpg; move it away")
        available = {self._split(name) for name in self._images}
        if not available:
            raise not_found(source, "UCF_CC_50", "1.jpg", files)
        super().__init__(storage.resolve(source), [split for split in SPLITS if split in available], depth)

    def split_items(self, split: str) -> list[Item]:
        """Images in the order of their numbers."""
        items = pair_items(split, self._images, self._annotations)
        return [item for item in items if self._split(item.name) == split]

    def heads(self, item: Item) -> Heads:
        """Heads of one n_ann.mat, including those outside the image."""
        return read_points(item.annotation, "annPoints", COORDINATE_BASE)

    def notes(self, splits: Sequence[str] = ()) -> list[str]:
        """Missing splits, and the images of the test fold."""
        last = self._fold * FOLD_IMAGES
        test = f"fold {self._fold} of {FOLDS}: images {last - FOLD_IMAGES + 1} to {last} are for testing"
        return [*super().notes(splits), f"{test}; results on this dataset are means over all folds"]

    def _split(self, name: str) -> str:
        return SPLITS[(int(name) - 1) // FOLD_IMAGES == self._fold - 1]
