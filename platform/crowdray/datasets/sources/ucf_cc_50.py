"""UCF_CC_50: fifty grey photos of very dense crowds, scored over five folds.

Layout: n.jpg and n_ann.mat with `annPoints`, n from 1 to 50.
"""

from collections.abc import Sequence
from typing import Annotated

from crowdray import storage
from crowdray.datasets.sources import Item
from crowdray.datasets.sources.base import AnnotatedImages, Heads, paired
from crowdray.datasets.sources.layout import by_stem
from crowdray.datasets.sources.matlab import read_points
from crowdray.errors import UserError

COORDINATE_BASE = 1.0
"""The centre of the first pixel is (1, 1). An assumption: no copy was at hand, and the files are MATLAB's."""

FOLDS, FOLD_IMAGES = 5, 10
"""Folds by number: the first is images 1 to 10."""

SPLITS = ("train", "test")


class UcfCc50(AnnotatedImages):
    """UCF_CC_50 with one fold to test and the others to train."""

    published = SPLITS

    def __init__(
        self,
        source: str,
        *,
        fold: Annotated[int, "the fold that tests, 1 to 5; the rest trains"] = 1,
        depth: str = "auto",
    ) -> None:
        if not 1 <= fold <= FOLDS:
            raise UserError(f"ucf-cc-50 has no fold {fold}; choose one from 1 to {FOLDS}")
        self._fold = fold
        self.name = f"ucf-cc-50-fold{fold}"
        root = storage.resolve(source)
        self._images, self._annotations = (
            {name.removesuffix("_ann"): uri for name, uri in by_stem(storage.list_files(root, (ending,))).items()}
            for ending in (".jpg", "_ann.mat")
        )
        if strange := [name for name in self._images | self._annotations if not name.isdecimal()]:
            raise UserError(f"{source} holds {strange[0]}, which is no image of UCF_CC_50 such as 1.jpg; move it away")
        there = {self._split(name) for name in self._images}
        if not there:
            raise UserError(f"{source} is not UCF_CC_50: it holds no image such as 1.jpg")
        super().__init__(root, [split for split in SPLITS if split in there], depth, ("points", "none"))

    def split_items(self, split: str) -> list[Item]:
        """Images by number."""
        images, annotations = (
            {name: uri for name, uri in uris.items() if self._split(name) == split}
            for uris in (self._images, self._annotations)
        )
        return paired(split, images, annotations)

    def heads(self, item: Item) -> Heads:
        """Heads of one n_ann.mat, also those outside the image."""
        assert item.annotation is not None
        return read_points(item.annotation, "annPoints", COORDINATE_BASE)

    def notes(self, splits: Sequence[str] = ()) -> list[str]:
        """Missing splits, and which images test."""
        last = self._fold * FOLD_IMAGES
        said = f"fold {self._fold} of {FOLDS}: images {last - FOLD_IMAGES + 1} to {last} test"
        return [*super().notes(splits), f"{said}; the dataset's score is the mean over all folds"]

    def _split(self, name: str) -> str:
        return SPLITS[(int(name) - 1) // FOLD_IMAGES == self._fold - 1]
