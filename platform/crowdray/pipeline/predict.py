"""Counting of people in photos: which ones, what is written for each, and the part that one process counts.

Shape legend: H W photo, h w density, N people.
"""

import contextlib
import csv
import fnmatch
import hashlib
import io
import itertools
import json
import os
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from heapq import nlargest
from pathlib import PurePosixPath
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crowdray import storage
from crowdray.config import Device
from crowdray.data.decoding import DECODED_SUFFIXES, SUFFIXES, decode_upright
from crowdray.errors import JobFailed, UserError, escaped, first_line
from crowdray.evaluation.inference import TILE, image_to_tensor, tiled_density
from crowdray.evaluation.localisation import head_points
from crowdray.pipeline.count_table import FORMATS, Parts, PhotoCount, TableFormat, printable, write_part, write_table
from crowdray.pipeline.zones import Zones
from crowdray.plots.overlay import draw_overlay
from crowdray.plots.prediction_sheet import SheetPhoto, draw_prediction_sheet
from crowdray.registry.loading import LoadedCounter

Save = Literal["counts", "densities", "overlays", "points"]
SAVED: tuple[Save, ...] = get_args(Save)
"""What can be written: the table, and for each photo its density, an overlay and the likely positions of people."""
DENSITY, OVERLAY, POINTS = ".density.npy", ".overlay.png", ".points.csv"
"""Suffixes of the results of a photo."""
SHEET = "contact_sheet.png"

PART_PHOTOS = 50
"""Photos of a part: what a killed process loses at most."""
MAX_LISTED = 20
"""Failures that a message lists before it only counts the rest."""
SHOWN_PHOTOS, SHEET_PHOTOS = 30, 6
"""Photos that a terminal shows, and of each kind on the contact sheet."""

_MAX_STEM_BYTES = 220
"""Limit on the stem of a result's name: file systems allow 255 bytes, with its suffix and a number."""


class PredictionError(JobFailed):
    """Some photos could not be counted; the message lists them, the others are finished."""


@dataclass(frozen=True)
class Photo:
    """A photo to count."""

    uri: str
    stem: str
    """Start of the names of its results."""
    key: str
    """Digest of its location, size and modification time: a photo that was replaced is counted again."""

    @property
    def name(self) -> str:
        """File name, with bytes that are not UTF-8 escaped."""
        return printable(PurePosixPath(self.uri).name)


@dataclass(frozen=True, eq=False)
class CountedPhoto:
    """A photo with its count."""

    count: float
    """Number of heads: the sum of the density."""
    density: NDArray[np.float32]
    """(h, w) heads per cell."""
    interval: tuple[float, float] | None
    """Lower and upper end of its 95% interval; None if that is unknown, or the photo is unlike the training data."""
    warnings: tuple[str, ...]
    """In what the photo lies far outside the training data."""

    def __float__(self) -> float:
        return self.count


@dataclass(frozen=True)
class PredictOptions:
    """What is counted and written, apart from the photos."""

    output: str
    """Folder or URI of the results."""
    model: str
    """Name of the counter in the table."""
    save: tuple[str, ...] = ("counts",)
    """Of SAVED; the table is always written."""
    tile: int = TILE
    """Side of tiles in pixels; 0 for whole photos."""
    zones: Zones | None = None
    table_format: TableFormat = "csv"

    def __post_init__(self) -> None:
        if self.tile < 0:
            raise UserError(f"--tile is {self.tile}; give the side of a tile in pixels, or 0 for whole photos")
        if unknown := [name for name in self.save if name not in SAVED]:
            raise UserError(f"--save has {unknown[0]!r}; choose from {', '.join(SAVED)}")
        if self.output.lower().endswith(tuple(f".{name}" for name in FORMATS)):
            raise UserError(f"--output {self.output} is a folder; leave out the suffix and give --format")

    @property
    def zone_columns(self) -> list[str]:
        """Columns of the zones."""
        return self.zones.columns if self.zones else []

    @property
    def table(self) -> str:
        """URI of the table."""
        return storage.join(storage.resolve(self.output), f"counts.{self.table_format}")

    def command(self, counter: LoadedCounter) -> str:
        """Digest of everything that decides the counts of a photo and the files that are written for it."""
        content = {
            "program": counter.digest,
            "metadata": counter.metadata,
            "precision": counter.precision,
            **{name: repr(getattr(self, name)) for name in ("model", "tile", "zones")},
            "save": sorted(set(self.save) - {"counts"}),
        }
        return hashlib.sha256(json.dumps(content, default=str, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Prediction:
    """Totals of a prediction, and the photos that are shown first."""

    table: str
    """URI of the table of counts."""
    sheet: str | None = None
    """URI of the contact sheet; None if no photo could be counted."""
    photos: int = 0
    """Counted photos."""
    heads: float = 0.0
    """Sum of their counts."""
    failed: int = 0
    """Photos that could not be counted."""
    unlike: int = 0
    """Counted photos that are unlike the training data."""
    unlike_example: PhotoCount | None = None
    """The first of them."""
    trained_on: str = ""
    """What the counter was trained on; empty if its package does not say so."""
    rendered: bool = False
    """Whether that were rendered scenes."""
    failures: dict[str, str] = field(default_factory=dict)
    """Reasons of the first failures by the URI of their photo."""
    first: list[PhotoCount] = field(default_factory=list)
    """First counted photos."""

    def check(self) -> None:
        """Raise PredictionError if a photo failed."""
        if self.failed:
            total = self.photos + self.failed
            reasons = [escaped(f"  {uri}: {reason}") for uri, reason in self.failures.items()]
            if more := self.failed - len(reasons):
                reasons.append(f"  and {more:,} more, see {escaped(self.table)}")
            raise PredictionError("\n".join([f"{self.failed} of {total} images could not be counted:", *reasons]))


def find_images(location: str, output: str) -> list[str]:
    """Return the URIs of a photo, of all photos in a folder, or of those that match a pattern such as a/*.jpg.

    Raises:
        UserError: There are none, or their folder is `output`, where results would be mistaken for photos.
    """
    resolved = storage.resolve(location)
    folder, _, last = resolved.rpartition("/")
    if PurePosixPath(last).suffix.lower() in SUFFIXES and storage.exists(resolved):
        return [resolved]
    if any(character in last for character in "*?[") and not storage.exists(resolved):
        listed = storage.list_files(folder, SUFFIXES)
        images = [uri for uri in listed if fnmatch.fnmatchcase(uri.rpartition("/")[2], last)]
    else:
        images = storage.list_files(resolved, SUFFIXES)
    if not images:
        raise UserError(f"there is no image in {location}; give a file or a folder with {', '.join(DECODED_SUFFIXES)}")
    if images[0].rpartition("/")[0] == storage.resolve(output):
        raise UserError(f"the images are in --output {output}; give another folder")
    return images


def result_stems(images: Sequence[str]) -> list[str]:
    """Return a name for the results of each photo: without its suffix if that is unique, and short enough for a file.

    No two are equal, even where case and Unicode form do not distinguish files.
    """
    paths = [PurePosixPath(uri) for uri in images]
    uses = Counter(_folded(path.stem) for path in paths)
    taken: set[str] = set()
    stems = []
    for path in paths:
        name = _shortened(path.name)
        preferred = [_shortened(path.stem), name] if uses[_folded(path.stem)] == 1 else [name]
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        stem = next(stem for stem in itertools.chain(preferred, numbered) if _folded(stem) not in taken)
        taken.add(_folded(stem))
        stems.append(stem)
    return stems


def list_photos(images: Sequence[str], save: Sequence[str] = ()) -> list[Photo]:
    """Return what identifies each photo, and the names of its results."""
    folder = images[0].rpartition("/")[0]
    # The folder of a single file on a web server cannot be listed.
    listed = storage.find_files(folder, depth=1) if len(images) > 1 or storage.is_local(folder) else []
    stamps = {file.name: (file.size, file.modified) for file in listed}
    has_files = set(save) - {"counts"}

    def key(uri: str, stem: str) -> str:
        stamp = [
            os.fsencode(uri).hex(),
            stamps.get(uri.rpartition("/")[2]),
            os.fsencode(stem).hex() if has_files else "",
        ]
        return hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:24]

    return [Photo(uri, stem, key(uri, stem)) for uri, stem in zip(images, result_stems(images), strict=True)]


def split_into_parts(photos: Sequence[Photo]) -> list[list[Photo]]:
    """Slices of PART_PHOTOS."""
    return [list(photos[start : start + PART_PHOTOS]) for start in range(0, len(photos), PART_PHOTOS)]


def count_part(
    counter: LoadedCounter, photos: Sequence[Photo], options: PredictOptions, command: str
) -> Iterator[PhotoCount]:
    """Count some photos, yield each count, and write them as one part at the end.

    Whatever goes wrong with one photo, or with writing its results, it has an error and the others are counted.

    Raises:
        UserError: The part cannot be written.
    """
    counts: dict[str, PhotoCount] = {}
    for photo, image in _decode_ahead(photos):
        try:
            counts[photo.key] = _count(counter, photo, image.result(), options)
        except Exception as error:  # of a decoder, torch or a file system: the documentation of none lists all
            counts[photo.key] = PhotoCount(photo.name, options.model, error=printable(_reason(error)))
            for suffix in (DENSITY, OVERLAY, POINTS):  # of this run or an earlier one
                with contextlib.suppress(Exception):
                    storage.remove(storage.join(options.output, photo.stem + suffix))
        yield counts[photo.key]
    write_part(options.output, command, counts)


def combine(counter: LoadedCounter, photos: Sequence[Photo], options: PredictOptions, command: str) -> Prediction:
    """Write the table and the contact sheet of all photos from their parts, and return their totals."""
    parts, trained = Parts(options.output, command), counter.training_data
    if missing := sum(photo.key not in parts for photo in photos):
        raise UserError(
            f"the counts of {missing} photos are not in {options.output}; with several nodes --output must be a folder "
            "that all of them share, or a URI such as s3://bucket/folder"
        )
    prediction = Prediction(options.table, trained_on=str(trained or ""), rendered=bool(trained and trained.rendered))
    ranked: dict[str, list[tuple[float, int]]] = {"densest": [], "unlike the training data": []}

    def counts() -> Iterator[PhotoCount]:
        for number, photo in enumerate(photos):
            count = parts[photo.key]
            if count.count is None:
                prediction.failed += 1
                if len(prediction.failures) < MAX_LISTED:
                    prediction.failures[photo.uri] = count.error
            else:
                prediction.photos += 1
                prediction.heads += count.count
                if count.warnings:
                    prediction.unlike += 1
                    prediction.unlike_example = prediction.unlike_example or count
                if len(prediction.first) < SHOWN_PHOTOS:
                    prediction.first.append(count)
                scores = {"densest": count.count, "unlike the training data": float(len(count.warnings))}
                for kind, score in scores.items():
                    if score > 0 or kind == "densest":
                        ranked[kind] = nlargest(SHEET_PHOTOS, [*ranked[kind], (score, -number)])
            yield count

    write_table(counts(), options.table, options.table_format, options.zone_columns)
    chosen = {kind: [photos[-number] for _, number in best] for kind, best in ranked.items()}
    shown = {kind: list(_sheet_photos(counter, best, options.tile)) for kind, best in chosen.items()}
    if any(shown.values()):
        prediction.sheet = storage.join(storage.resolve(options.output), SHEET)
        draw_prediction_sheet(shown, f"{prediction.photos:,} photos, {prediction.heads:,.0f} heads", prediction.sheet)
    parts.remove_others()
    return prediction


def _sheet_photos(counter: LoadedCounter, photos: Sequence[Photo], tile: int) -> Iterator[SheetPhoto]:
    """Count photos again, for their density; skip those that are gone meanwhile."""
    for photo, image in _decode_ahead(photos):
        with contextlib.suppress(Exception):
            counted = count_photo(counter, image.result(), tile)
            yield SheetPhoto.of(photo.name, image.result(), counted.density, counter.geometry.cell, counted.warnings)


def count_photo(counter: LoadedCounter, image: NDArray[np.uint8], tile: int = TILE) -> CountedPhoto:
    """Count a photo (H, W, 3), upright uint8 RGB, in tiles of `tile` pixels; 0 counts it whole."""
    with torch.inference_mode():
        cells = tiled(counter, tile)(image_to_tensor(image, torch.device("cpu")))[0, 0].float().cpu()
    density: NDArray[np.float32] = cells.numpy()
    count = float(density.sum(dtype=np.float64))
    warnings = tuple(counter.training_data.differences(image, count)) if counter.training_data else ()
    interval = counter.interval.around(count) if counter.interval and not warnings else None
    return CountedPhoto(count, density, interval, warnings)


def tiled(counter: LoadedCounter, side: int) -> Callable[[Tensor], Tensor]:
    """Return a counter that processes tiles of about `side` pixels, or whole photos if `side` is 0."""
    if side < 0:
        raise UserError(f"--tile is {side}; give the side of a tile in pixels, or 0 for whole photos")
    return tiled_density(counter, counter.geometry, side) if side else counter


def choose_device(device: Device) -> torch.device:
    """Return the device to count on; "auto" is a GPU if there is one.

    Raises:
        UserError: A GPU is requested and there is none.
    """
    available = torch.cuda.is_available()
    if device == "gpu" and not available:
        raise UserError("--device gpu: torch finds no GPU; give --device cpu")
    return torch.device("cuda" if available and device != "cpu" else "cpu")


def _decode_ahead(photos: Sequence[Photo]) -> Iterator[tuple[Photo, "Future[NDArray[np.uint8]]"]]:
    """Yield each photo and its pixels, while a thread reads and decodes the next one."""

    def read(photo: Photo) -> NDArray[np.uint8]:
        return decode_upright(storage.read_bytes(photo.uri))

    with ThreadPoolExecutor(1, "decode") as reader:
        following: Future[NDArray[np.uint8]] | None = None
        for number, photo in enumerate(photos):
            image = following or reader.submit(read, photo)
            image.exception()  # wait, so that at most two photos are in memory
            following = reader.submit(read, photos[number + 1]) if number + 1 < len(photos) else None
            yield photo, image


def _count(counter: LoadedCounter, photo: Photo, image: NDArray[np.uint8], options: PredictOptions) -> PhotoCount:
    """Count a photo (H, W, 3), and write what is to be saved."""
    started = time.perf_counter()
    counted = count_photo(counter, image, options.tile)
    seconds, density = time.perf_counter() - started, counted.density
    height, width = image.shape[:2]
    cell = counter.geometry.cell
    zones = options.zones.count(density, cell, (width, height)) if options.zones else {}
    results = storage.join(options.output, photo.stem)
    if "densities" in options.save:
        buffer = io.BytesIO()
        np.save(buffer, density, allow_pickle=False)
        storage.write_bytes(results + DENSITY, buffer.getvalue())
    if "overlays" in options.save:
        draw_overlay(image, density, results + OVERLAY)
    if "points" in options.save:
        storage.write_bytes(results + POINTS, _points_csv(head_points(density, cell)))
    low, high = counted.interval or (None, None)
    return PhotoCount(
        image=photo.name,
        model=options.model,
        seconds=seconds,
        count=counted.count,
        count_low=low,
        count_high=high,
        width=width,
        height=height,
        warnings=counted.warnings,
        zones=zones,
    )


def _points_csv(points: NDArray[np.float64]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["x", "y"])
    writer.writerows([f"{x:.1f}", f"{y:.1f}"] for x, y in points)
    return text.getvalue().encode()


def _reason(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
        return f"not enough memory ({first_line(error)}); set a smaller --tile, or resize the photo"
    return f"{type(error).__name__}: {first_line(error)}"


def _folded(name: str) -> str:
    """Return what equal files have in common where case and Unicode form do not distinguish them."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _shortened(name: str) -> str:
    """Return a name, cut and made unique by its hash if it is too long for a file."""
    encoded = os.fsencode(name)
    if len(encoded) <= _MAX_STEM_BYTES:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:12]
    return f"{encoded[: _MAX_STEM_BYTES - 13].decode(errors='ignore')}-{digest}"
