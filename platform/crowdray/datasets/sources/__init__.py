"""Sources: one adapter per dataset layout, which lists small items and loads each as a sample."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, get_args, get_type_hints

from crowdray.errors import UserError

if TYPE_CHECKING:  # the list of sources is imported for a help text, without pyarrow
    from crowdray.data.sample import Sample
    from crowdray.datasets.depth.teacher import DepthTeacher


@dataclass(frozen=True, slots=True)
class Item:
    """One image that a source can load: small and picklable, so that it can be sent to any worker."""

    split: str
    """Split of the dataset."""
    name: str
    """Name, unique in the split."""
    image: str = ""
    """URI of the image; "" if only its annotation exists, which load() refuses."""
    annotation: str = ""
    """URI of its annotation; "" if missing, which load() refuses, or if the source needs none."""
    number: int = 0
    """Position in the source, for sources with many annotations in one file or rendered images."""
    scene: str = ""
    """Camera or location; "" makes the image a scene of its own."""
    head_scale: float = 0.0
    """For the depth teacher `points`: ratio of head size, top to bottom, of its camera or split; 0 if unknown."""


class Source(Protocol):
    """A dataset in its official layout; picklable, so that workers can load its items."""

    name: str
    """Name on the command line and in the index."""
    teacher: DepthTeacher
    """Depth teacher; one that is never asked if samples keep their stored depth."""

    def items(self, splits: Sequence[str] = ()) -> list[Item]:
        """Items of the given or all splits, in natural order; UserError for a missing split."""
        ...

    def load(self, item: Item) -> Sample:
        """One sample, its image decoded once as a check; DataError for a faulty item."""
        ...

    def notes(self, splits: Sequence[str] = ()) -> list[str]:
        """Facts about this copy that a user should know, such as a missing split."""
        ...


@dataclass(frozen=True, slots=True)
class SourceEntry:
    """A source in the registry."""

    path: str
    """Location of its class as module:Class below this package; imported on first use."""
    summary: str
    """One line for the help."""

    def adapter(self) -> type[Source]:
        """Import the class; its keyword arguments are the source's options."""
        module, _, name = self.path.partition(":")
        found: type[Source] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        return found


SOURCES = {
    "synthetic": SourceEntry("synthetic:Synthetic", "rendered crowds, made from a seed; needs no --source"),
    "mall": SourceEntry("mall:Mall", "Mall: one surveillance camera, 2,000 frames"),
    "shanghaitech": SourceEntry("shanghaitech:ShanghaiTech", "ShanghaiTech part A or B: photos of crowds"),
    "worldexpo": SourceEntry("worldexpo:WorldExpo", "WorldExpo'10: 108 surveillance cameras, 5 of them for testing"),
    "ucsd": SourceEntry("ucsd:Ucsd", "UCSD: one surveillance camera, 2,000 small grey frames"),
    "ucf-cc-50": SourceEntry("ucf_cc_50:UcfCc50", "UCF_CC_50: 50 photos of very dense crowds, in five folds"),
    "ucf-qnrf": SourceEntry("ucf_qnrf:UcfQnrf", "UCF-QNRF: 1,535 large photos"),
    "jhu": SourceEntry("jhu:Jhu", "JHU-CROWD++: 4,372 photos in all weather conditions"),
    "nwpu": SourceEntry("nwpu:Nwpu", "NWPU-Crowd: 3,609 labelled photos, some without people"),
    "csv": SourceEntry("annotations.csv_points:CsvTable", "your own photos, with a table of heads or boxes"),
    "text": SourceEntry("annotations.text:TextPoints", "your own photos, with a text file of heads for each"),
    "coco": SourceEntry("annotations.coco:Coco", "your own photos, with keypoints in COCO JSON"),
    "label-studio": SourceEntry("annotations.label_studio:LabelStudio", "your own photos, annotated with Label Studio"),
    "cvat": SourceEntry("annotations.cvat:Cvat", "your own photos, annotated with CVAT"),
    "labelme": SourceEntry("annotations.labelme:LabelMe", "your own photos, annotated with LabelMe"),
    "via": SourceEntry("annotations.via:Via", "your own photos, annotated with the VGG Image Annotator"),
    "yolo": SourceEntry("annotations.yolo:Yolo", "your own photos, with boxes in YOLO's text files"),
    "voc": SourceEntry("annotations.voc:Voc", "your own photos, with boxes in Pascal VOC's XML"),
    "cclabeler": SourceEntry(
        "annotations.cclabeler:CcLabeler", "your own photos, with JSON of cclabeler or NWPU's style"
    ),
    "supervisely": SourceEntry("annotations.supervisely:Supervisely", "your own photos, annotated with Supervisely"),
    "crowdray": SourceEntry("converted:Converted", "a converted dataset: to --check it, or to take some splits"),
}
"""Sources by their names on the command line; a new source is one line here, and its signature is its options."""


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a source besides --source and --depth."""

    type: Any
    default: Any
    help: str
    """One line, from the text in its Annotated."""


def source_options(name: str) -> dict[str, Option]:
    """Options of a source by name; UserError for unknown sources."""
    found: dict[str, Option] = {}
    for part in _entry(name).adapter().__mro__:
        build = vars(part).get("__init__")
        if build is None:
            continue
        parameters, hints = inspect.signature(build).parameters.values(), get_type_hints(build, include_extras=True)
        for parameter in parameters:
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.name != "depth":
                type_, help_ = get_args(hints[parameter.name])[:2]
                found.setdefault(parameter.name, Option(type_, parameter.default, help_))
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break  # else the class passes further options to its base
    return found


def open_source(name: str, source: str | None = None, **options: Any) -> Source:
    """Open a source over the files at `source`; UserError for an unknown name."""
    adapter = _entry(name).adapter()
    needs_files = "source" in inspect.signature(adapter).parameters
    if needs_files and source is None:
        raise UserError(f"{name} needs --source, the folder or URI of the dataset")
    if not needs_files and source is not None:
        raise UserError(f"--source {source}: {name} reads no files; leave --source out")
    return adapter(*([source] if needs_files else []), **options)


def _entry(name: str) -> SourceEntry:
    if name not in SOURCES:
        raise UserError(f"unknown source {name!r}; choose one of {', '.join(SOURCES)}")
    return SOURCES[name]
