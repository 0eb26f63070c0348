"""Count people in photos: a file, a folder or a pattern goes in, overlays, densities and counts come out.

One process does it, without Ray: a light counter is done with a photo before a worker has been sent one. On a
cluster it runs as any job does, through ray job submit.

Shape legend: H W photo, h w density.
"""

import csv
import fnmatch
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crowdray import storage
from crowdray.config import Device
from crowdray.data.orientation import encoded_orientation, turn_upright
from crowdray.data.sample import decode_image
from crowdray.errors import JobFailed, UserError
from crowdray.evaluation.inference import image_to_tensor, tiled_density
from crowdray.plots.overlay import draw_overlay
from crowdray.registry.loading import LoadedCounter

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
COUNTS = "counts.csv"
"""The file of all counts: written last, it stands for the whole."""


class PredictionError(JobFailed):
    """Some photos could not be counted; the message names each of them. The others are done."""


@dataclass(frozen=True, slots=True)
class Counted:
    """One photo that was counted."""

    image: str
    """File name."""
    height: int
    """Height in pixels, upright."""
    width: int
    """Width in pixels, upright."""
    count: float
    """Heads: the sum of the density."""
    density: str
    """URI of the density, (h, w) float32 heads per cell, as .npy."""
    overlay: str
    """URI of the picture."""


@dataclass(frozen=True)
class Prediction:
    """What became of the photos of one call."""

    counted: list[Counted]
    """Those that were counted, in the order given."""
    failed: dict[str, str]
    """URI and reason of those that could not be."""
    counts: str
    """URI of the file with all counts."""

    def check(self) -> None:
        """Raise PredictionError when a photo failed."""
        if self.failed:
            total = len(self.counted) + len(self.failed)
            reasons = "\n".join(f"  {uri}: {reason}" for uri, reason in self.failed.items())
            raise PredictionError(f"{len(self.failed)} of {total} images could not be counted:\n{reasons}")


def find_images(place: str, output: str) -> list[str]:
    """URIs of the photos at `place`: one file, those of a folder, or those that match a pattern, a/*.jpg.

    Raises UserError when there are none, and when their folder is `output`, where results would become input.
    """
    resolved = storage.resolve(place)
    folder, _, last = resolved.rpartition("/")
    if PurePosixPath(last).suffix.lower() in SUFFIXES:
        if storage.exists(resolved):
            return [resolved]
        if not _is_pattern(resolved):
            raise UserError(f"there is no image at {place}; check the path")
    if _is_pattern(folder):
        raise UserError(f"{place}: only the last part of a path may hold *, ? or [; name one folder")
    listed = storage.list_files(folder if _is_pattern(last) else resolved, SUFFIXES)
    images = [uri for uri in listed if not _is_pattern(last) or _matches(uri, last)]
    if not images:
        raise UserError(f"there is no image in {place}; name a file or a folder with {', '.join(SUFFIXES)}")
    if images[0].rpartition("/")[0] == storage.resolve(output):
        raise UserError(f"the images are in {output} themselves; give another folder as --output")
    return images


def predict_images(
    density: Callable[[Tensor], Tensor],
    images: Sequence[str],
    output: str,
    advance: Callable[[int], None] = lambda number: None,
) -> Prediction:
    """Count each photo and write its overlay, its density, and all counts as CSV below the URI `output`.

    `density` maps uint8 RGB (1, 3, H, W) to heads per cell (1, 1, h, w). `advance` is told of each photo that
    is done. A photo that cannot be read or decoded, or is too small, is left out and named in the result; a
    UserError is raised when the results cannot be written.
    """
    counted: list[Counted] = []
    failed: dict[str, str] = {}
    for uri, stem in zip(images, _stems(images), strict=True):
        try:
            content = storage.read_bytes(uri)
            image = turn_upright(decode_image(content), encoded_orientation(content))
            cells = _count(density, image)
        except UserError as error:
            failed[uri] = str(error)
        else:
            counted.append(_write(image, cells, uri, storage.join(output, stem)))
        advance(1)
    counts = storage.join(output, COUNTS)
    storage.write_bytes(counts, _csv(counted))
    return Prediction(counted, failed, counts)


def tiled(counter: LoadedCounter, side: int) -> Callable[[Tensor], Tensor]:
    """A counter that looks at about `side` pixels at once; at whole photos where its package does not say how its cells
    lie, or `side` is 0."""
    if side < 0:
        raise UserError(f"--tile is {side}; give the side of a tile in pixels, or 0 for whole photos")
    return tiled_density(counter, counter.geometry, side) if side and counter.geometry else counter


def choose_device(device: Device) -> torch.device:
    """Where to count: auto takes a GPU where there is one; a UserError when a GPU is asked for in vain."""
    there = torch.cuda.is_available()
    if device == "gpu" and not there:
        raise UserError("--device gpu: torch finds no GPU here; give --device cpu")
    return torch.device("cuda" if there and device != "cpu" else "cpu")


def _count(density: Callable[[Tensor], Tensor], image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Density (h, w) of a photo (H, W, 3)."""
    with torch.inference_mode():
        cells: NDArray[np.float32] = density(image_to_tensor(image, torch.device("cpu")))[0, 0].float().cpu().numpy()
    return cells


def _write(image: NDArray[np.uint8], density: NDArray[np.float32], uri: str, stem: str) -> Counted:
    map_uri, picture_uri = f"{stem}.density.npy", f"{stem}.overlay.png"
    buffer = io.BytesIO()
    np.save(buffer, density, allow_pickle=False)
    storage.write_bytes(map_uri, buffer.getvalue())
    draw_overlay(image, density, picture_uri)
    height, width = image.shape[:2]
    count = float(density.sum(dtype=np.float64))
    return Counted(PurePosixPath(uri).name, height, width, count, map_uri, picture_uri)


def _csv(counted: Sequence[Counted]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "count"])
    writer.writerows([one.image, f"{one.count:.6f}"] for one in counted)
    return text.getvalue().encode()


def _stems(images: Sequence[str]) -> list[str]:
    """A name for each photo's results: without its suffix, where no two photos share that."""
    paths = [PurePosixPath(uri) for uri in images]
    taken = Counter(path.stem.lower() for path in paths)
    return [path.stem if taken[path.stem.lower()] == 1 else path.name for path in paths]


def _is_pattern(part: str) -> bool:
    return any(character in part for character in "*?[")


def _matches(uri: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(PurePosixPath(uri).name, pattern)
