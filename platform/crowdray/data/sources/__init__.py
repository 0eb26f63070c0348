"""One adapter per dataset: each lists small items and loads one as a sample, whatever its files look like."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from crowdray.data.sample import Sample
from crowdray.errors import UserError


@dataclass(frozen=True, slots=True)
class Item:
    """One image that a source can load: small and picklable, so that it can be sent to any worker."""

    split: str
    """The part of the dataset it belongs to."""
    name: str
    """Its name, unique in the split."""
    image: str | None = None
    """URI of the image; None when only its annotation is there, which load() refuses."""
    annotation: str | None = None
    """URI of its annotation; None when it is missing, which load() refuses, or held elsewhere."""
    number: int = 0
    """Position in the source, for sources that hold all annotations in one file or make their images."""
    head_scale: float = 0.0
    """For the depth teacher `points`: the ratio of head sizes, top to bottom, of its split; 0 is unknown."""


class Source(Protocol):
    """A dataset in its own layout; picklable, so that loading can be spread over workers."""

    name: str
    """Its name on the command line and in the index."""
    depth_teacher: str
    """Where its depth comes from: name and version of the teacher."""
    gpu: bool
    """Whether load() needs a GPU, as its depth teacher may."""

    def items(self, splits: Sequence[str] = ()) -> list[Item]:
        """Items of the given splits, or of all that are there, naturally sorted; a missing split is a
        UserError."""
        ...

    def load(self, item: Item) -> Sample:
        """One sample, its image decoded once as a check; what is wrong with the item is a DataError."""
        ...

    def notes(self, splits: Sequence[str] = ()) -> list[str]:
        """What a user should know of this copy, such as a split that it lacks."""
        ...


def _mall(source: str | None, **options: Any) -> Source:
    from crowdray.data.sources.mall import Mall

    return Mall(_required("mall", source), **options)


def _shanghaitech(source: str | None, **options: Any) -> Source:
    from crowdray.data.sources.shanghaitech import ShanghaiTech

    return ShanghaiTech(_required("shanghaitech", source), **options)


def _synthetic(source: str | None, **options: Any) -> Source:
    from crowdray.data.sources.synthetic import Synthetic

    if source is not None:
        raise UserError(
            f"--source {source}: synthetic scenes are made from a seed and read nothing; leave --source out"
        )
    return Synthetic(**options)


SOURCES: dict[str, Callable[..., Source]] = {
    "synthetic": _synthetic,
    "mall": _mall,
    "shanghaitech": _shanghaitech,
}
"""Factories by name; each takes the source's URI and its options."""


def open_source(name: str, source: str | None = None, **options: Any) -> Source:
    """The source called `name` over the files at `source`; a UserError for unknown names and options."""
    if name not in SOURCES:
        raise UserError(f"no source is called {name!r}; choose one of {', '.join(SOURCES)}")
    try:
        return SOURCES[name](source, **options)
    except TypeError as error:
        raise UserError(f"source {name}: {error}; its options were {options}") from error


def _required(name: str, source: str | None) -> str:
    if source is None:
        raise UserError(f"{name} needs --source, the folder or URI that holds the dataset")
    return source
