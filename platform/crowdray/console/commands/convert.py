"""`crowdray convert`: convert a dataset from its official layout, or check its annotations."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import tyro

from crowdray.console.arguments import console, parse
from crowdray.datasets.sources import SOURCES, Option, open_source, source_options
from crowdray.errors import UserError

EXAMPLES = (
    "synthetic --dest data/demo",
    "mall --source mall_dataset --check",
    "mall --source mall_dataset --dest data/mall",
    "csv --source photos --dest data/market --test-fraction 0.2",
)


@dataclass(frozen=True)
class ConvertJob:
    """Convert a dataset into shards with an index; the same command resumes an interrupted conversion."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(name="SOURCE", metavar="SOURCE")]
    """Layout of the dataset, one of those above; SOURCE --help lists the options of one."""
    dest: Annotated[str, tyro.conf.arg(metavar="URI")] = ""
    """Path or URI of the new dataset."""
    source: Annotated[str | None, tyro.conf.arg(metavar="URI")] = None
    """Folder or URI of the dataset in its official layout."""
    split: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Splits to convert; all by default."""
    depth: str = "auto"
    """Source of depth: perspective, points, own or none (auto picks the best that the dataset has), or, for any
    dataset, precomputed:URI, onnx:URI or hf:MODEL, each with options after commas (docs/depth.md)."""
    overwrite: bool = False
    """Replace an existing dataset at --dest."""
    restart_markers: bool = False
    """Add restart markers to JPEGs, without loss: training then decodes only the rows of its windows. Needs jpegtran
    (docs/own-data.md)."""
    check: bool = False
    """Check every image instead of converting; --dest is not needed and not changed."""
    report: Annotated[str, tyro.conf.arg(metavar="URI")] = ""
    """Folder or URI for statistics and figures of --check (default: outputs/check/NAME)."""
    strict: bool = False
    """Fail if any item is unusable; by default such items are left out and listed in quarantine.json. With --check:
    exit with status 1 if there is a problem."""


def parse_arguments(arguments: list[str]) -> ConvertJob:
    """Parse the arguments of the command, those of its source included."""
    fields = [(key, Annotated[o.type, tyro.conf.arg(help=o.help)], o.default) for key, o in _options(arguments).items()]
    job_type: type[ConvertJob] = dataclasses.make_dataclass("ConvertJob", fields, bases=(ConvertJob,), frozen=True)
    job_type.__doc__ = ConvertJob.__doc__
    sources = {name: known.summary for name, known in SOURCES.items()}
    job = parse(job_type, arguments, "convert", examples=EXAMPLES, lists={"SOURCE is one of": sources})
    source_options(job.name)  # raises for an unknown source, before the imports of main
    return job


def main(arguments: list[str]) -> None:
    """Run the command with its arguments."""
    job = parse_arguments(arguments)

    # Imported late: help and usage errors do not wait for torch.
    from crowdray.cluster.check import check
    from crowdray.cluster.convert import convert
    from crowdray.console.progress import image_progress
    from crowdray.console.tables import show_check, show_dataset

    own = {field.name for field in dataclasses.fields(ConvertJob)}
    options = {field.name: getattr(job, field.name) for field in dataclasses.fields(job) if field.name not in own}
    source = open_source(job.name, job.source, depth=job.depth, **options)
    if job.check:
        folder = job.report or f"outputs/check/{source.name}"
        report = check(source, folder, splits=job.split, progress=image_progress)
        show_check(report, folder, console(), strict=job.strict)
        return
    if not job.dest:
        raise UserError("--dest is missing; give the path or URI of the new dataset, or --check to check the source")
    index = convert(
        source,
        job.dest,
        splits=job.split,
        overwrite=job.overwrite,
        strict=job.strict,
        restart_markers=job.restart_markers,
        progress=image_progress,
    )
    show_dataset(index, job.dest, console())


def _options(arguments: Sequence[str]) -> dict[str, Option]:
    """Options of the first argument that names a source and is not the value of an option."""
    with_value = {f"--{field.name}" for field in dataclasses.fields(ConvertJob) if field.type is not bool}
    words = (word for before, word in pairwise(["", *arguments]) if before not in with_value)
    name = next((word for word in words if word in SOURCES), None)
    return source_options(name) if name else {}
