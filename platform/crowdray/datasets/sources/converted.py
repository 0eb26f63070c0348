"""A dataset of ours as a source: to look at what was converted, or to convert a part of it again."""

from collections.abc import Sequence
from dataclasses import replace

from crowdray.data.sample import Sample, decode_depth, decode_roi, make_sample
from crowdray.data.shards import Dataset
from crowdray.datasets.sources import Item
from crowdray.datasets.sources.layout import chosen_splits
from crowdray.errors import DataError, UserError


class Converted:
    """The samples of a dataset at a path or URI, under the name and with the depth that it was converted with."""

    gpu = False

    def __init__(self, source: str, *, depth: str = "auto") -> None:
        if depth not in ("auto", "none"):
            raise UserError(f"--depth {depth}: converted data keeps its depth (auto) or leaves it out (none)")
        self._dataset = Dataset.open(source, verify=True)  # or what is damaged would be converted into sound shards
        self._keeps_depth = depth == "auto"
        self.name = self._dataset.index.name
        self.depth_teacher = self._dataset.index.depth_teacher if self._keeps_depth else "none"

    def items(self, splits: Sequence[str] = ()) -> list[Item]:
        """Samples of each split, in the dataset's order."""
        return [
            Item(split, name, number=row)
            for split in chosen_splits(self.name, list(self._dataset.index.splits), splits)
            for row, name in zip(self._dataset.rows(split).tolist(), self._dataset.texts("name", split), strict=True)
        ]

    def load(self, item: Item) -> Sample:
        """One sample as it lies there; a DataError when its shard is damaged, or something in it cannot be decoded."""
        stored = self._dataset.sample(item.number)
        sample = make_sample(
            name=stored.name,
            split=stored.split,
            scene=stored.scene,
            image=bytes(stored.image),
            points=stored.points,
            roi=None if stored.roi is None else bytes(stored.roi),
            depth=None if stored.depth is None else bytes(stored.depth),
        )
        try:
            if sample.roi is not None:
                decode_roi(sample.roi)
            if sample.depth is not None:
                decode_depth(sample.depth)
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(
                f"its region of interest or depth cannot be decoded: {error}; convert {self._dataset.uri} again"
            ) from error
        return sample if self._keeps_depth else replace(sample, depth=None)

    def notes(self, splits: Sequence[str] = ()) -> list[str]:
        """What its own conversion found."""
        return list(self._dataset.index.notes)
