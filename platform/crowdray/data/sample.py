"""One annotated image, its Arrow schema, and the encodings of image, region of interest and depth.

Shapes: H and W are an image's height and width in pixels, N its number of heads.
"""

import hashlib
import io
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from crowdray import storage
from crowdray.errors import DataError

SCHEMA_VERSION = 1

SCHEMA: pa.Schema = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("scene", pa.string(), nullable=False),
        pa.field("image", pa.large_binary(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("points", pa.large_list(pa.field("item", pa.float32(), nullable=False)), nullable=False),
        pa.field("roi", pa.large_binary()),
        pa.field("depth", pa.large_binary()),
        pa.field("sha256", pa.string(), nullable=False),
    ],
    metadata={"crowdray.schema_version": str(SCHEMA_VERSION)},
)
"""A row of a shard; `points` holds x and y of one head after the other."""

Encoded = bytes | memoryview
"""Encoded content: bytes of its own, or a read-only view into a mapped shard."""

FARTHEST = 1e6
"""Pixels from the corner of its image at which a point is no longer a head beside it but a broken number."""

_DEPTH_STEPS = 65535
_PIXELS_PER_BYTE = 1024


@dataclass(frozen=True, eq=False, slots=True)
class Sample:
    """One image with all that is known about it; nothing is decoded."""

    name: str
    """Name within its split, unique there."""
    split: str
    """The part of the dataset it belongs to, such as train or test."""
    scene: str
    """The camera or place, by which reports group images; those of one camera share their perspective."""
    image: Encoded
    """The source's own JPEG or PNG."""
    height: int
    """Image height in pixels."""
    width: int
    """Image width in pixels."""
    points: NDArray[np.float32]
    """(N, 2) heads as continuous (x, y) in pixels; the centre of the first pixel is (0.5, 0.5)."""
    roi: Encoded | None
    """PNG with one bit per pixel, 1 where heads are annotated; None means everywhere."""
    depth: Encoded | None
    """Grey PNG of 16 bits at image size or smaller; 0..65535 spans [0, 1], larger = farther."""
    sha256: str
    """Hash of the image's bytes."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with bytes of its own, since a view into a mapped file cannot travel."""

        def own(content: Encoded | None) -> bytes | None:
            return None if content is None else bytes(content)

        return Sample, (
            self.name,
            self.split,
            self.scene,
            own(self.image),
            self.height,
            self.width,
            np.array(self.points),
            own(self.roi),
            own(self.depth),
            self.sha256,
        )


def make_sample(
    *,
    name: str,
    split: str,
    scene: str,
    image: bytes,
    points: NDArray[Any],
    roi: bytes | None = None,
    depth: bytes | None = None,
    shape: tuple[int, int] | None = None,
) -> Sample:
    """A sample with its image decoded once to check it, its size read from that, and its hash taken.

    `points` may be any (N, 2) array, also an empty one; `shape` (H, W) skips the decoding of an image that
    was made here and cannot be broken. Raises DataError for an image or points that cannot be used.
    """
    try:
        heads = usable_points(points)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    height, width = shape or check_image(image)
    sha256 = hashlib.sha256(image).hexdigest()
    return Sample(name, split, scene, image, height, width, np.ascontiguousarray(heads), roi, depth, sha256)


def usable_points(points: NDArray[Any]) -> NDArray[np.float32]:
    """Heads as float32 (N, 2), of an empty array of any shape (0, 2); a DataError for what cannot be heads."""
    given = np.asarray(points, dtype=np.float64)
    given = given.reshape(0, 2) if given.size == 0 else given
    if given.ndim != 2 or given.shape[1] != 2:
        raise DataError(f"points have shape {given.shape}, expected (heads, 2) with x and y")
    if bad := int((~np.isfinite(given)).any(axis=1).sum()):
        raise DataError(f"{bad} of {len(given)} points are not finite numbers; mend its annotation")
    if (farthest := np.abs(given).max(initial=0.0)) > FARTHEST:
        raise DataError(f"a point lies {farthest:g} pixels from the image's corner; mend its annotation")
    return given.astype(np.float32)


def points_outside(points: NDArray[np.float32], height: int, width: int) -> int:
    """How many of the (N, 2) points lie outside [0, width] x [0, height]."""
    return int(((points < 0) | (points > np.array([width, height], dtype=np.float32))).any(axis=1).sum())


def image_size(uri: str) -> tuple[int, int]:
    """Height and width in pixels from the head of an image file; a DataError when Pillow does not know it."""
    with storage.open_read(uri) as file:
        try:
            return _header_size(file)
        except DataError as error:
            raise DataError(f"{uri}: {error}") from error


def content_size(content: bytes) -> tuple[int, int]:
    """Height and width in pixels from the head of an encoded image; a DataError when Pillow does not know it."""
    return _header_size(io.BytesIO(content))


def _header_size(file: IO[bytes]) -> tuple[int, int]:
    try:
        with Image.open(file) as image:
            return image.height, image.width
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"it is no image: {error}; replace the file or leave it out") from error


def check_image(content: Encoded) -> tuple[int, int]:
    """Height and width in pixels of an image that decode_image can decode, read to its end; else a DataError."""
    height, width = _decoded(content, "GRAY").shape[:2]
    return height, width


def decode_image(content: Encoded) -> NDArray[np.uint8]:
    """Decode JPEG, or what else Pillow reads, to uint8 (H, W, 3) RGB; grey becomes RGB. Raises DataError."""
    return _decoded(content, "RGB")


def _decoded(content: Encoded, jpeg_colours: Literal["RGB", "GRAY"]) -> NDArray[np.uint8]:
    """RGB, or of a JPEG only its luma: all of its bytes are read, and a fifth of the work is saved."""
    try:
        if simplejpeg.is_jpeg(content):
            height, width, colours = simplejpeg.decode_jpeg_header(content)[:3]
            if height * width > _PIXELS_PER_BYTE * len(content):  # a block of 8x8 takes a bit at the least
                raise ValueError(f"{len(content)} bytes cannot hold {height}x{width} pixels")
            if colours not in ("CMYK", "YCCK"):
                pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(content, colorspace=jpeg_colours)
                return pixels
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(image.convert("RGB"))
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"the image cannot be decoded: {error}; replace the file or leave it out") from error


def encode_roi(mask: NDArray[np.bool_]) -> bytes:
    """A region of interest, bool (H, W), True where heads are annotated, as a PNG with one bit per pixel."""
    return _png(Image.fromarray(np.asarray(mask, dtype=np.bool_)))


@lru_cache(maxsize=8)
def _decoded_roi(content: bytes) -> NDArray[np.bool_]:
    with Image.open(io.BytesIO(content)) as image:
        mask = np.array(image.convert("1"), dtype=np.bool_)
    mask.setflags(write=False)
    return mask


def decode_roi(content: Encoded) -> NDArray[np.bool_]:
    """The region of interest as bool (H, W), read-only: images of one scene share the array."""
    return _decoded_roi(bytes(content))


def encode_depth(depth: NDArray[Any]) -> bytes:
    """Depth (H, W) of any positive scale, larger = farther, as a 16-bit PNG in which the farthest pixel is 1.

    The map is divided by its maximum, not stretched from its minimum: ratios of distances survive, and a near
    head keeps a depth above the 0 that distillation gives the background. Infinite depth (sky) becomes 1.
    Raises DataError for negative values and NaN, and for a map without a positive finite value.
    """
    values = np.asarray(depth, dtype=np.float64)
    finite = np.isfinite(values)
    if values.ndim != 2 or np.isnan(values).any() or (values < 0).any():
        raise DataError(f"depth of shape {values.shape} must be a (H, W) map of numbers that are not negative")
    farthest = values[finite].max(initial=0.0)
    if farthest <= 0:
        raise DataError("depth holds no positive finite value, so it cannot be scaled to [0, 1]")
    scaled = np.where(finite, values, farthest) / farthest
    return _png(Image.fromarray(np.round(scaled * _DEPTH_STEPS).astype(np.uint16)))


@lru_cache(maxsize=8)
def _decoded_depth(content: bytes) -> NDArray[np.float32]:
    with Image.open(io.BytesIO(content)) as image:
        depth = np.asarray(image, dtype=np.float32) / np.float32(_DEPTH_STEPS)
    depth.setflags(write=False)
    return depth


def decode_depth(content: Encoded) -> NDArray[np.float32]:
    """Depth as float32 (H, W) in [0, 1], larger = farther, read-only: images of one scene share the array."""
    return _decoded_depth(bytes(content))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()
