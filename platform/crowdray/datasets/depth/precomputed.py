"""Precomputed depth maps: a folder of PNG, NPY or EXR files, matched by image name."""

import hashlib
import io
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crowdray import storage
from crowdray.data.decoding import decode_grey16
from crowdray.data.sample import Sample
from crowdray.datasets.depth.inverse import RANGE, depth_map
from crowdray.datasets.depth.options import TeacherOptions
from crowdray.datasets.depth.teacher import DepthInput, DepthTeacher
from crowdray.datasets.extras import import_extra
from crowdray.errors import DataError, UserError, first_line

OPTIONS = {"inverse": "", "range": f"{RANGE:g}", "flat": ""}


class PrecomputedDepth(DepthTeacher):
    """Maps at `<split>/<name>.png`, `.npy` or `.exr` below a folder or URI.

    With the option `flat`, maps are at `<name>.png` and so on. Larger is farther, or nearer with `inverse`. The
    teacher's name contains a hash of names, sizes and times of all maps, so replacing maps makes another teacher.
    """

    per_image = True

    def __init__(self, text: str) -> None:
        options = TeacherOptions.parse("precomputed", text, OPTIONS)
        self._inverse = options.flag("inverse")
        self._ratio = options.ratio()
        self._flat = options.flag("flat")
        self._folder = storage.resolve(options.location)
        files = [file for file in storage.find_files(self._folder) if not storage.is_hidden(file.name)]
        listed = [file for file in files if PurePosixPath(file.name).suffix in READERS]
        if not listed:
            raise UserError(f"--depth precomputed: {self._folder} contains no file that ends with {', '.join(READERS)}")
        if any(file.name.endswith(".exr") for file in listed):
            import_extra("OpenEXR", "an .exr file")
        self._names = frozenset(file.name for file in listed)
        listing = sorted((file.name, file.size, file.modified) for file in listed)
        self.name = options.identity(1, hashlib.sha256(repr(listing).encode()).hexdigest())

    def depth(self, inputs: DepthInput) -> NDArray[np.float32]:
        """Stored map of an image; DataError unless exactly one exists and fits the image."""
        sample = inputs.sample
        path = sample.name if self._flat else f"{sample.split}/{sample.name}"
        found = [path + ending for ending in READERS if path + ending in self._names]
        if len(found) > 1:
            raise DataError(f"{self._folder} contains {' and '.join(found)} for one image; keep one of them")
        if not found:
            hint = "" if self._flat else "; for maps directly in the folder, add the option flat"
            raise DataError(f"{self._folder} contains none of {', '.join(path + e for e in READERS)}{hint}")
        uri = storage.join(self._folder, found[0])
        values = READERS[PurePosixPath(uri).suffix](storage.read_bytes(uri), uri)
        _check_shape(values, sample, uri)
        return depth_map(values, sample, uri, inverse=self._inverse, ratio=self._ratio)


def _png(content: bytes, uri: str) -> NDArray[Any]:
    try:
        return decode_grey16(content)
    except DataError as error:
        # Maps of 8 bits are usually visualisations, stretched or coloured, and too coarse to invert.
        raise DataError(f"{uri}: {error}; write it as such, or as .npy") from error


def _npy(content: bytes, uri: str) -> NDArray[Any]:
    try:
        values = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # numpy does not document which ones a damaged header raises
        reason = first_line(error)
        raise DataError(f"{uri} is not an array of numbers ({reason}); write it again with numpy.save") from error
    if values.ndim != 2 or values.dtype.kind != "f":
        raise DataError(f"{uri} contains {values.dtype} of shape {values.shape}, expected floats (height, width)")
    return np.asarray(values)


def _exr(content: bytes, uri: str) -> NDArray[Any]:
    library = import_extra("OpenEXR", "an .exr file")
    with storage.scratch_folder("exr") as folder:  # the library only reads files
        (file := folder / "depth.exr").write_bytes(content)
        try:
            channels = library.File(str(file), separate_channels=True).channels()
        except Exception as error:
            raise DataError(f"{uri} cannot be read as EXR; write it again") from error
    candidates = ("Z", "Y") if len(channels) > 1 else tuple(channels)
    chosen = next((name for name in candidates if name in channels), None)
    if chosen is None:
        raise DataError(f"{uri} has the channels {', '.join(sorted(channels))}; write depth alone, or as Z")
    return np.asarray(channels[chosen].pixels, dtype=np.float32)


READERS: dict[str, Callable[[bytes, str], NDArray[Any]]] = {".png": _png, ".npy": _npy, ".exr": _exr}
"""Readers by file suffix: from content, and URI for messages, to an array (h, w)."""


def _check_shape(values: NDArray[Any], sample: Sample, uri: str) -> None:
    """Raise DataError for a map that is not the whole image at some scale, up to rounding of each side."""
    height, width = values.shape
    if abs(height / sample.height - width / sample.width) >= 1 / sample.height + 1 / sample.width:
        raise DataError(
            f"{uri} is {height}x{width} (HxW), its image {sample.height}x{sample.width}: it maps a crop or "
            "another image; replace it, or resize it to the image"
        )
