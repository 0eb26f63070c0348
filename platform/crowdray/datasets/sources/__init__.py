"""One adapter per dataset: each lists small items and loads one as a sample, whatever its files look like."""

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, get_args, get_type_hints

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
    """Position in the source, for sources that hold many annotations in one file or make their images."""
    scene: str = ""
    """The camera or place; "" makes the image a scene of its own, since nothing says which share one."""
    head_scale: float = 0.0
    """For the depth teacher `points`: the ratio of head sizes, top to bottom, of its camera or split; 0 is unknown."""


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


@dataclass(frozen=True, slots=True)
class KnownSource:
    """A source with a name of its own."""

    path: str
    """Where its class is: module:Class, the module below this package; imported when it is asked for."""
    summary: str
    """What it is, in one line."""

    def adapter(self) -> type[Source]:
        """Its class. What its signature takes by keyword are its options."""
        module, _, name = self.path.partition(":")
        found: type[Source] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        return found


SOURCES = {
    "synthetic": KnownSource("synthetic:Synthetic", "rendered crowds, made from a seed; needs no --source"),
    "mall": KnownSource("mall:Mall", "Mall: one surveillance camera, 2,000 frames"),
    "shanghaitech": KnownSource("shanghaitech:ShanghaiTech", "ShanghaiTech part A or B: photos of crowds"),
    "worldexpo": KnownSource("worldexpo:WorldExpo", "WorldExpo'10: 108 surveillance cameras, 5 of them to test"),
    "ucsd": KnownSource("ucsd:Ucsd", "UCSD: one surveillance camera, 2,000 small grey frames"),
    "ucf-cc-50": KnownSource("ucf_cc_50:UcfCc50", "UCF_CC_50: 50 photos of very dense crowds, in five folds"),
    "ucf-qnrf": KnownSource("ucf_qnrf:UcfQnrf", "UCF-QNRF: 1,535 large photos"),
    "jhu": KnownSource("jhu:Jhu", "JHU-CROWD++: 4,372 photos in every weather"),
    "nwpu": KnownSource("nwpu:Nwpu", "NWPU-Crowd: 3,609 photos with labels, some without anybody"),
    "csv": KnownSource("annotations.csv_points:CsvTable", "your own photos, with a table of heads"),
    "coco": KnownSource("annotations.coco:Coco", "your own photos, with keypoints as COCO's JSON"),
    "label-studio": KnownSource("annotations.label_studio:LabelStudio", "your own photos, annotated with Label Studio"),
    "cvat": KnownSource("annotations.cvat:Cvat", "your own photos, annotated with CVAT"),
    "labelme": KnownSource("annotations.labelme:LabelMe", "your own photos, annotated with LabelMe"),
    "crowdray": KnownSource("converted:Converted", "a dataset that was converted: to --check it, or to take a part"),
}
"""Sources by their names on the command line: a new one is one line here, its options are its signature's."""


@dataclass(frozen=True, slots=True)
class Option:
    """An option that a source takes besides --source and --depth."""

    type: Any
    """Its type, as annotated."""
    default: Any
    """What it is when it is not given."""
    meaning: str
    """One line for the help: the text in its Annotated."""


def source_options(name: str) -> dict[str, Option]:
    """The options that the source called `name` has of its own, by name; a UserError for unknown sources."""
    found: dict[str, Option] = {}
    for part in _known(name).adapter().__mro__:
        build = vars(part).get("__init__")
        if build is None:
            continue
        parameters, hints = inspect.signature(build).parameters.values(), get_type_hints(build, include_extras=True)
        for parameter in parameters:
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.name != "depth":
                meant, meaning = get_args(hints[parameter.name])[:2]
                found.setdefault(parameter.name, Option(meant, parameter.default, meaning))
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break  # else the class hands further options on to its base
    return found


def open_source(name: str, source: str | None = None, **options: Any) -> Source:
    """The source called `name` over the files at `source`; a UserError for unknown names and options."""
    adapter = _known(name).adapter()
    reads = "source" in inspect.signature(adapter).parameters
    if reads and source is None:
        raise UserError(f"{name} needs --source, the folder or URI that holds the dataset")
    if not reads and source is not None:
        raise UserError(f"--source {source}: {name} reads nothing; leave --source out")
    try:
        return adapter(*([source] if reads else []), **options)
    except TypeError as error:
        raise UserError(f"source {name}: {error}; its options were {options}") from error


def _known(name: str) -> KnownSource:
    if name not in SOURCES:
        raise UserError(f"no source is called {name!r}; choose one of {', '.join(SOURCES)}")
    return SOURCES[name]
