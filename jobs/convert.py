"""Convert a dataset from its own layout: python jobs/convert.py SOURCE --source PATH|URI --dest URI; or --check it."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "platform"))

from crowdray.cluster.check import check
from crowdray.cluster.convert import convert
from crowdray.console.arguments import console, named_source, parse, refuse_strange_options, run_job
from crowdray.console.summary import show_check, show_dataset
from crowdray.datasets.sources import SOURCES, open_source, source_options
from crowdray.errors import UserError


@dataclass(frozen=True)
class ConvertJob:
    """Convert a dataset into shards with an index; the same command goes on where it was stopped."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """The dataset's layout, one of those above; its own options are shown by SOURCE --help."""
    dest: str = ""
    """Path or URI of the new dataset."""
    source: str | None = None
    """Folder or URI of the dataset as it was published."""
    split: tuple[str, ...] = ()
    """Splits to convert; all by default."""
    depth: str = "auto"
    """Where depth comes from: perspective, points, own or none (auto takes the best that the source has), or, for any
    source, precomputed:URI, onnx:URI or hf:MODEL, each with options after commas (docs/depth.md)."""
    overwrite: bool = False
    """Replace a dataset that is at --dest."""
    check: bool = False
    """Look at every image instead, and convert nothing: --dest is not needed, and not touched."""
    report: str = ""
    """Folder or URI for what --check finds: figures and pictures (outputs/check/NAME)."""
    strict: bool = False
    """Publish nothing if any item cannot be used; else such items are left out and listed in quarantine.json. With
    --check: status 1 when it finds a problem."""


def main(arguments: list[str]) -> None:
    named = named_source(ConvertJob, arguments)
    options = source_options(named) if named else {}
    refuse_strange_options(ConvertJob, named, options, arguments)
    fields = [(key, Annotated[o.type, tyro.conf.arg(help=o.meaning)], o.default) for key, o in options.items()]
    made: type[ConvertJob] = dataclasses.make_dataclass("ConvertJob", fields, bases=(ConvertJob,), frozen=True)
    about = "\n".join(f"  {name:<13}{known.summary}" for name, known in SOURCES.items())
    job = parse(made, arguments, "jobs/convert.py", f"{ConvertJob.__doc__}\n\nSOURCE is one of\n{about}")
    source = open_source(job.name, job.source, depth=job.depth, **{key: getattr(job, key) for key in options})
    if job.check:
        report = job.report or f"outputs/check/{source.name}"
        return show_check(check(source, report, splits=job.split), report, console(), strict=job.strict)
    if not job.dest:
        raise UserError("--dest is missing; give the path or URI of the new dataset, or --check to look at the source")
    index = convert(source, job.dest, splits=job.split, overwrite=job.overwrite, strict=job.strict)
    show_dataset(index, job.dest, console())


if __name__ == "__main__":
    run_job(main)
