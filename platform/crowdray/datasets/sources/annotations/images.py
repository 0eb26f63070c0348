"""The images of a folder: found by what an annotation calls them, and turned upright as it saw them."""

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

import numpy as np
import simplejpeg
from PIL import Image

from crowdray import storage
from crowdray.data.orientation import SIDEWAYS, exif_orientation, turn_upright
from crowdray.datasets.sources.layout import IMAGES
from crowdray.errors import DataError

ENDINGS = (*IMAGES, ".webp", ".tif", ".tiff")
"""Endings of image files, in any case."""

JPEG_QUALITY = 95
"""Of an image that had to be turned; all others keep their own bytes."""

_LONGEST = 65_500
"""Pixels along a side of a JPEG, as the library writes it."""
_SPLIT = re.compile(r"(train|val|test)(?:ing|id|idation)?(?:\d{4})?", re.IGNORECASE)
_STORES = ("images",)
"""Folders whose name says nothing of the place where images were taken."""


class Names:
    """Paths of images below a folder, to be found by a path, the end of a path, or a name without ending."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._by_name: dict[str, list[str]] = {}
        self._by_stem: dict[str, list[str]] = {}
        for path in paths:
            self._by_name.setdefault(PurePosixPath(path).name, []).append(path)
            self._by_stem.setdefault(PurePosixPath(path).stem, []).append(path)

    def find(self, name: str, place: str) -> str | None:
        """The path that shares most of its end with `name`, None when no file is called so.

        Raises DataError, with the place where the name was given, when several share as much.
        """
        parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("/", "..")]
        if not parts:
            return None
        found = self._by_name.get(parts[-1], [])
        if not found and not parts[-1].lower().endswith(ENDINGS):
            found = self._by_stem.get(parts[-1], [])
        if "/".join(parts) in found:
            return "/".join(parts)
        shared = [_shared_end(parts[:-1], PurePosixPath(path).parts[:-1]) for path in found]
        best = [path for path, length in zip(found, shared, strict=True) if length == max(shared)]
        if len(best) > 1:
            raise DataError(
                f"{place}: {name!r} may be {best[0]} or {best[1]}; name its folder too, or rename one of them"
            )
        return best[0] if best else None


def is_hidden(path: str) -> bool:
    """Whether a path leads through what systems hide, such as .ipynb_checkpoints or macOS's own archives."""
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(path).parts)


def split_called(text: str) -> str:
    """train, val or test when a word says so in one of its usual spellings, else ""."""
    said = _SPLIT.fullmatch(text.strip())
    return said.group(1).lower() if said else ""


def split_among(path: str) -> str:
    """The first word in the names of a path that says a split, such as person_keypoints_train2017.json, else ""."""
    return next((split for word in re.split(r"[^A-Za-z0-9]+", path) if (split := split_called(word))), "")


def split_and_scene(path: str) -> tuple[str, str]:
    """What the folders of an image say: its split, and the place where it was taken; "" where they do not."""
    folders = PurePosixPath(path).parts[:-1]
    splits = [split for folder in folders if (split := split_called(folder))]
    places = [folder for folder in folders if not split_called(folder) and folder.lower() not in _STORES]
    return splits[0] if splits else "", "/".join(places)


def upright(content: bytes, size: tuple[int, int] | None) -> bytes:
    """An encoded image, turned as its EXIF tag asks, since annotation tools show it so; most are left as they are.

    `size` (H, W) is that of the annotated image: one that was annotated as its pixels lie stays so. Raises DataError
    for one that is too large to be written anew.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            orientation, stored_size = exif_orientation(image), (image.height, image.width)
            as_stored = orientation in SIDEWAYS and image.height != image.width and size == stored_size
            if orientation == 1 or as_stored:
                return content
            turned = turn_upright(np.asarray(image.convert("RGB")), orientation)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return content  # whoever decodes it will say what is wrong
    if max(turned.shape) > _LONGEST:
        height, width = turned.shape[:2]
        raise DataError(
            f"its EXIF tag asks for {height}x{width} pixels, more than the {_LONGEST} of a JPEG; cut it into parts"
        )
    encoded: bytes = simplejpeg.encode_jpeg(turned, quality=JPEG_QUALITY, colorsubsampling="444")
    return encoded


def upright_size(uri: str) -> tuple[int, int]:
    """Height and width of the upright image, from the head of its file; a DataError when Pillow does not know it."""
    with storage.open_read(uri) as file:
        try:
            with Image.open(file) as image:
                return (
                    (image.width, image.height) if exif_orientation(image) in SIDEWAYS else (image.height, image.width)
                )
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{uri} is no image: {error}") from error


def _shared_end(left: Sequence[str], right: Sequence[str]) -> int:
    length = 0
    while length < min(len(left), len(right)) and left[-1 - length] == right[-1 - length]:
        length += 1
    return length
