"""Counting of people in photos, in one process: overlays, density maps and a table of counts.

Shape legend: H W photo, h w density.
"""

import contextlib
import csv
import fnmatch
import hashlib
import io
import itertools
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import torch
from torch import Tensor

from crowdray import storage
from crowdray.config import Device
from crowdray.data.decoding import DECODED_SUFFIXES, SUFFIXES, decode_upright
from crowdray.errors import JobFailed, UserError, escaped, first_line
from crowdray.evaluation.inference import image_to_tensor, tiled_density
from crowdray.plots.overlay import draw_overlay
from crowdray.registry.loading import LoadedCounter

COUNTS = "counts.csv"
"""Table of all counts, written last."""
DENSITY, OVERLAY = ".density.npy", ".overlay.png"
"""Suffixes of the results of a photo."""

_MAX_STEM_BYTES = 220
"""Limit on the stem of a result's name: file systems allow 255 bytes, with its suffix and a number."""
_FORMULA = (*"=+-@", *"\uff1d\uff0b\uff0d\uff20", "\t", "\r", "\n")
"""First characters of a cell that spreadsheets may run as a formula, of half and full width."""


class PredictionError(JobFailed):
    """Some photos could not be counted; the message lists them, the others are finished."""


@dataclass(frozen=True, slots=True)
class PhotoCount:
    """Count of one photo, and the files written for it."""

    image: str
    """File name."""
    height: int
    """Height in pixels, upright."""
    width: int
    """Width in pixels, upright."""
    count: float
    """Number of heads: the sum of the density."""
    density: str
    """URI of the density, (h, w) float32 heads per cell, as .npy."""
    overlay: str
    """URI of the overlay image."""


@dataclass(frozen=True)
class Prediction:
    """Results of a set of photos."""

    counted: list[PhotoCount]
    """Counted photos, in input order."""
    failed: dict[str, str]
    """Reason of each failure by the URI of its photo."""
    counts: str
    """URI of the table of counts."""

    def check(self) -> None:
        """Raise PredictionError if a photo failed."""
        if self.failed:
            total = len(self.counted) + len(self.failed)
            reasons = "\n".join(escaped(f"  {uri}: {reason}") for uri, reason in self.failed.items())
            raise PredictionError(f"{len(self.failed)} of {total} images could not be counted:\n{reasons}")


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


def predict_images(
    density: Callable[[Tensor], Tensor],
    images: Sequence[str],
    output: str,
    advance: Callable[[int], None] = lambda number: None,
) -> Prediction:
    """Count each photo and write its overlay, its density map and a table of all counts to the URI `output`.

    Whatever goes wrong with one photo, or with writing its results, it is listed as failed and the others are counted.

    Args:
        density: Maps uint8 RGB (1, 3, H, W) to heads per cell (1, 1, h, w).

    Raises:
        UserError: The table cannot be written.
    """
    counted: list[PhotoCount] = []
    failed: dict[str, str] = {}
    for uri, stem in zip(images, result_stems(images), strict=True):
        results = storage.join(output, stem)
        try:
            counted.append(_count(density, uri, results))
        except Exception as error:  # of a decoder, torch or a file system: the documentation of none lists all
            failed[uri] = _reason(error)
            for suffix in (DENSITY, OVERLAY):  # of this run or an earlier one
                with contextlib.suppress(Exception):
                    storage.remove(results + suffix)
        advance(1)
    counts = storage.join(output, COUNTS)
    storage.write_bytes(counts, _csv(counted))
    return Prediction(counted, failed, counts)


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


def _count(density: Callable[[Tensor], Tensor], uri: str, results: str) -> PhotoCount:
    """Count a photo, and write files whose names start with the URI `results`."""
    image = decode_upright(storage.read_bytes(uri))
    with torch.inference_mode():
        cells = density(image_to_tensor(image, torch.device("cpu")))[0, 0].float().cpu().numpy()
    buffer = io.BytesIO()
    np.save(buffer, cells, allow_pickle=False)
    storage.write_bytes(results + DENSITY, buffer.getvalue())
    draw_overlay(image, cells, results + OVERLAY)
    height, width = image.shape[:2]
    count = float(cells.sum(dtype=np.float64))
    return PhotoCount(PurePosixPath(uri).name, height, width, count, results + DENSITY, results + OVERLAY)


def _reason(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
        return f"not enough memory ({first_line(error)}); set a smaller --tile, or resize the photo"
    return f"{type(error).__name__}: {first_line(error)}"


def _csv(counted: Sequence[PhotoCount]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "count"])
    writer.writerows([_text_cell(photo.image), f"{photo.count:.6f}"] for photo in counted)
    return text.getvalue().encode(errors="backslashreplace")


def _text_cell(text: str) -> str:
    """Return a cell that a spreadsheet shows as text: an apostrophe in front of what it would take for a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text


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
