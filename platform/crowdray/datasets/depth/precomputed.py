"""Depth maps that somebody made before: a folder of PNG, NPY or EXR files, found by the names of the images."""

import hashlib
import io
import tempfile
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crowdray import storage
from crowdray.datasets.depth.inverse import RANGE, depth_map
from crowdray.datasets.depth.options import Arguments, number_from
from crowdray.datasets.depth.teacher import DepthTeacher, View
from crowdray.errors import DataError, UserError

OPTIONS = {"inverse": "", "range": f"{RANGE:g}", "flat": ""}


class Precomputed(DepthTeacher):
    """Maps at `<split>/<name>.png`, `.npy` or `.exr` below a folder or URI; with `flat`, at `<name>.png` and so on.

    Larger is farther, or nearer with `inverse`. Its name holds a hash over names, sizes and times of all maps, so that
    maps made anew in the same place are another teacher.
    """

    per_image = True

    def __init__(self, text: str) -> None:
        arguments = Arguments.parse("precomputed", text, OPTIONS)
        self._inverse = arguments.flag("inverse")
        self._ratio = arguments.value("range", number_from(1), RANGE)
        self._flat = arguments.flag("flat")
        self._folder = storage.resolve(arguments.place)
        listed = [file for file in storage.find_files(self._folder) if PurePosixPath(file.name).suffix in READERS]
        if not listed:
            raise UserError(f"--depth precomputed: {self._folder} holds no file that ends with {', '.join(READERS)}")
        if any(file.name.endswith(".exr") for file in listed):
            _openexr()
        self._names = frozenset(file.name for file in listed)
        told = sorted((file.name, file.size, file.modified) for file in listed)
        self.name = arguments.identity(1, hashlib.sha256(repr(told).encode()).hexdigest())

    def depth(self, view: View) -> NDArray[np.float32]:
        """The view's own map; a DataError when there is none or more than one, or when it does not fit the image."""
        if not view.name:
            raise DataError("this source does not name its images, so their maps cannot be found; use another --depth")
        place = view.name if self._flat else f"{view.split}/{view.name}"
        found = [place + ending for ending in READERS if place + ending in self._names]
        if len(found) > 1:
            raise DataError(f"{self._folder} holds {' and '.join(found)} for it; keep one of them")
        if not found:
            hint = "" if self._flat else "; maps directly in the folder need the option flat"
            raise DataError(f"{self._folder} holds none of {', '.join(place + e for e in READERS)}{hint}")
        uri = storage.join(self._folder, found[0])
        values = READERS[PurePosixPath(uri).suffix](storage.read_bytes(uri), uri)
        _check_shape(values, view, uri)
        try:
            return depth_map(values, view, inverse=self._inverse, ratio=self._ratio)
        except DataError as error:
            raise DataError(f"{uri}: {error}") from error


def _png(content: bytes, uri: str) -> NDArray[Any]:
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if image.mode == "I;16":
                return np.asarray(image)
            kind = image.mode
    except (OSError, SyntaxError) as error:
        raise DataError(f"{uri} is no PNG ({error}); write it again") from error
    # 256 steps are mostly a picture for the eye, stretched or coloured, and too coarse to turn round.
    raise DataError(f"{uri} has the mode {kind}, expected grey with 16 bits; write it as such, or as .npy")


def _npy(content: bytes, uri: str) -> NDArray[Any]:
    try:
        values = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{uri} is no array of numbers ({error}); write it again with numpy.save") from error
    if values.ndim != 2 or values.dtype.kind != "f":
        raise DataError(f"{uri} holds {values.dtype} of shape {values.shape}, expected floats of shape (height, width)")
    return np.asarray(values)


def _exr(content: bytes, uri: str) -> NDArray[Any]:
    library = _openexr()
    with tempfile.NamedTemporaryFile(suffix=".exr") as file:  # the library reads nothing but files
        file.write(content)
        file.flush()
        try:
            channels = library.File(file.name, separate_channels=True).channels()
        except RuntimeError as error:
            raise DataError(f"{uri} cannot be read as EXR; write it again") from error
    candidates = ("Z", "Y") if len(channels) > 1 else tuple(channels)
    chosen = next((name for name in candidates if name in channels), None)
    if chosen is None:
        raise DataError(f"{uri} has the channels {', '.join(sorted(channels))}; write depth alone, or as Z")
    return np.asarray(channels[chosen].pixels, dtype=np.float32)


READERS: dict[str, Callable[[bytes, str], NDArray[Any]]] = {".png": _png, ".npy": _npy, ".exr": _exr}
"""How each kind of file is read: its bytes and its URI, for messages, to an array (h, w)."""


def _check_shape(values: NDArray[Any], view: View, uri: str) -> None:
    """Refuse a map that is not the whole image at some scale, but for rounding each side to whole pixels."""
    height, width = values.shape
    if abs(height / view.height - width / view.width) >= 1 / view.height + 1 / view.width:
        raise DataError(
            f"{uri} is {height}x{width} (HxW), its image {view.height}x{view.width}: the map of a part or of "
            "another image; mend it, or resize it to the image"
        )


def _openexr() -> Any:
    try:
        import OpenEXR
    except ImportError as error:
        raise UserError("depth maps in EXR need the package OpenEXR: pip install 'crowdray[exr]'") from error
    return OpenEXR
