"""Convert a dataset from its own layout: python jobs/convert.py SOURCE --source PATH|URI --dest URI."""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "platform"))

from crowdray.cli import console, parse, run_job
from crowdray.cluster.convert import convert
from crowdray.cluster.summary import show_dataset
from crowdray.data.sources import SOURCES, Option, open_source, source_options
from crowdray.errors import UserError


@dataclass(frozen=True)
class ConvertJob:
    """Convert a dataset into shards with an index; nothing is published unless all of it is sound."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """The dataset's layout, one of those above; its own options are shown by SOURCE --help."""
    dest: str
    """Path or URI of the new dataset."""
    source: str | None = None
    """Folder or URI of the dataset as it was published."""
    split: tuple[str, ...] = ()
    """Splits to convert; all by default."""
    depth: str = "auto"
    """Where depth comes from: perspective, points, own or none; auto takes the best that the source has."""
    overwrite: bool = False
    """Replace a dataset that is at --dest."""


def main(arguments: list[str]) -> None:
    source_name = named_source(arguments)
    options = source_options(source_name) if source_name else {}
    refuse_strange_options(source_name, options, arguments)
    fields = [(key, Annotated[o.type, tyro.conf.arg(help=o.meaning)], o.default) for key, o in options.items()]
    made: type[ConvertJob] = dataclasses.make_dataclass("ConvertJob", fields, bases=(ConvertJob,), frozen=True)
    about = "\n".join(f"  {name:<13}{known.summary}" for name, known in SOURCES.items())
    job = parse(made, arguments, "jobs/convert.py", f"{ConvertJob.__doc__}\n\nSOURCE is one of\n{about}")
    given = {key: getattr(job, key) for key in options}
    source = open_source(job.name, job.source, depth=job.depth, **given)
    show_dataset(convert(source, job.dest, splits=job.split, overwrite=job.overwrite), job.dest, console())


def named_source(arguments: list[str]) -> str | None:
    """The source that a command names, the first such word that is no option's value; None when it names none."""
    valued = {f"--{field.name}" for field in dataclasses.fields(ConvertJob) if field.type is not bool}
    words = (word for before, word in pairwise(["", *arguments]) if before not in valued)
    return next((word for word in words if word in SOURCES), None)


def refuse_strange_options(source: str | None, options: Mapping[str, Option], arguments: list[str]) -> None:
    """Raises UserError for options that the source does not know."""
    known = {field.name for field in dataclasses.fields(ConvertJob)} | options.keys() | {"help"}
    names = (word.partition("=")[0].removeprefix("--no-").removeprefix("--") for word in arguments if word[:2] == "--")
    strange = sorted({name for name in names if name.replace("-", "_") not in known})
    if source and strange:
        own = f"; its own options are --{', --'.join(options)}" if options else ""
        raise UserError(f"{source} knows no --{', no --'.join(strange)}; leave that out{own}")


if __name__ == "__main__":
    run_job(main)
