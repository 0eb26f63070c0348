"""Counting of people in photos, in one process: overlays, density maps and a table of counts.

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
"""Table of all counts, written last."""


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
            reasons = "\n".join(f"  {uri}: {reason}" for uri, reason in self.failed.items())
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
        raise UserError(f"there is no image in {location}; give a file or a folder with {', '.join(SUFFIXES)}")
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

    A photo that is unreadable or too small is listed as failed in the result.

    Args:
        density: Maps uint8 RGB (1, 3, H, W) to heads per cell (1, 1, h, w).

    Raises:
        UserError: The results cannot be written.
    """
    counted: list[PhotoCount] = []
    failed: dict[str, str] = {}
    for uri, stem in zip(images, _stems(images), strict=True):
        try:
            content = storage.read_bytes(uri)
            image = turn_upright(decode_image(content), encoded_orientation(content))
            with torch.inference_mode():
                cells = density(image_to_tensor(image, torch.device("cpu")))[0, 0].float().cpu().numpy()
        except UserError as error:
            failed[uri] = str(error)
        else:
            counted.append(_write(image, cells, uri, storage.join(output, stem)))
        advance(1)
    counts = storage.join(output, COUNTS)
    storage.write_bytes(counts, _csv(counted))
    return Prediction(counted, failed, counts)


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


def _write(image: NDArray[np.uint8], density: NDArray[np.float32], uri: str, stem: str) -> PhotoCount:
    density_uri, overlay_uri = f"{stem}.density.npy", f"{stem}.overlay.png"
    buffer = io.BytesIO()
    np.save(buffer, density, allow_pickle=False)
    storage.write_bytes(density_uri, buffer.getvalue())
    draw_overlay(image, density, overlay_uri)
    height, width = image.shape[:2]
    count = float(density.sum(dtype=np.float64))
    return PhotoCount(PurePosixPath(uri).name, height, width, count, density_uri, overlay_uri)


def _csv(counted: Sequence[PhotoCount]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "count"])
    writer.writerows([photo.image, f"{photo.count:.6f}"] for photo in counted)
    return text.getvalue().encode()


def _stems(images: Sequence[str]) -> list[str]:
    """Return a name for the results of each photo: without its suffix, if that is unique."""
    paths = [PurePosixPath(uri) for uri in images]
    uses = Counter(path.stem.lower() for path in paths)
    return [path.stem if uses[path.stem.lower()] == 1 else path.name for path in paths]
