"""Convert a dataset from its own layout: python jobs/convert.py SOURCE --source PATH|URI --dest URI."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "platform"))

from crowdray.cli import console, parse, run_job
from crowdray.cluster.convert import convert
from crowdray.cluster.summary import show_dataset
from crowdray.data.sources import open_source
from crowdray.errors import UserError

OPTIONS = {
    "synthetic": ("train", "val", "test", "seed", "width", "height", "cameras"),
    "shanghaitech": ("part",),
    "mall": (),
}
"""Which sources know which of the options that not all of them know."""


@dataclass(frozen=True)
class ConvertJob:
    """Convert a dataset into shards with an index; the same command goes on where it was stopped."""

    name: tyro.conf.Positional[Literal["synthetic", "mall", "shanghaitech"]]
    """The dataset's layout; synthetic scenes are rendered and need no --source."""
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
    strict: bool = False
    """Publish nothing if any item cannot be used; else such items are left out and listed in quarantine.json."""
    train: int | None = None
    """synthetic: images for training (400)."""
    val: int | None = None
    """synthetic: images for a split of their own for validation (0: training takes its share)."""
    test: int | None = None
    """synthetic: images for testing (100)."""
    seed: int | None = None
    """synthetic: another seed gives other scenes."""
    width: int | None = None
    """synthetic: image width in pixels (320)."""
    height: int | None = None
    """synthetic: image height in pixels (240)."""
    cameras: int | None = None
    """synthetic: number of places (8)."""
    part: str | None = None
    """shanghaitech: A or B, where --source holds both."""


def main(arguments: list[str]) -> None:
    job = parse(ConvertJob, arguments, "jobs/convert.py")
    known = {option for options in OPTIONS.values() for option in options}
    given = {key: value for key, value in dataclasses.asdict(job).items() if key in known and value is not None}
    if strange := sorted(given.keys() - set(OPTIONS[job.name])):
        raise UserError(f"{job.name} knows no --{', no --'.join(strange)}; leave that out")
    source = open_source(job.name, job.source, depth=job.depth, **given)
    index = convert(source, job.dest, splits=job.split, overwrite=job.overwrite, strict=job.strict)
    show_dataset(index, job.dest, console())


if __name__ == "__main__":
    run_job(main)
