"""A converted dataset as a source: to check it, or to convert some of its splits."""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace

from crowdray.data.decoding import check_image
from crowdray.data.sample import Sample
from crowdray.data.shards import Dataset
from crowdray.datasets.depth.analytic import NoDepth, SourceDepth
from crowdray.datasets.depth.teacher import DepthTeacher
from crowdray.datasets.sources import Item
from crowdray.datasets.sources.layout import chosen_splits
from crowdray.errors import UserError


class Converted:
    """Samples of a dataset at a path or URI, with its name and depth."""

    def __init__(self, source: str, *, depth: str = "auto") -> None:
        if depth not in ("auto", "none"):
            raise UserError(f"--depth {depth}: a converted dataset keeps its depth (auto) or drops it (none)")
        # Without verification a damaged shard would be converted into one with a valid hash.
        self._dataset = Dataset.open(source)
        self._keeps_depth = depth == "auto"
        self.name = self._dataset.index.name
        self.teacher: DepthTeacher = SourceDepth(self._dataset.index.depth_teacher) if self._keeps_depth else NoDepth()

    def items(self, splits: Sequence[str] = ()) -> list[Item]:
        """Samples of each split, in the dataset's order."""
        return [
            Item(split, name, number=row)
            for split in chosen_splits(self.name, list(self._dataset.index.splits), splits)
            for row, name in zip(self._dataset.rows(split).tolist(), self._dataset.strings("name", split), strict=True)
        ]

    def load(self, item: Item) -> Sample:
        """One stored sample; DataError if its shard is damaged, or its image cannot be decoded."""
        sample = copy(self._dataset.sample(item.number))
        check_image(sample.image)
        return sample if self._keeps_depth else replace(sample, depth=None)

    def notes(self, splits: Sequence[str] = ()) -> list[str]:
        """Notes of its own conversion."""
        return list(self._dataset.index.notes)
