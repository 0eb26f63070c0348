"""An annotated image: its Arrow schema and the encodings of region of interest and depth.

Shape legend: H W image in pixels, N heads.
"""

import hashlib
import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from crowdray.data.decoding import Encoded, check_image, decode_grey16, decode_mask
from crowdray.data.decoding import decode_image as decode_image  # for users: a sample's image, next to its maps
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
"""A row of a shard; `points` are x and y of one head after the other."""

REWRITTEN_SCHEMA: pa.Schema = SCHEMA.append(pa.field("source_sha256", pa.string()))
"""A row of a shard whose images conversion may have rewritten without loss."""

MAX_DISTANCE = 1e6
"""Distance in pixels from the image's corner beyond which a point is an error, not a head outside the image."""

_DEPTH_STEPS = 65535


@dataclass(frozen=True, eq=False, slots=True)
class Sample:
    """One encoded image with its annotation."""

    name: str
    """Name, unique within its split."""
    split: str
    """Split of the dataset, such as train or test."""
    scene: str
    """Camera or location, by which reports group images; images of one camera share their perspective."""
    image: Encoded
    """The image, byte for byte as in the source unless `source_sha256` differs from `sha256`."""
    height: int
    """Image height in pixels."""
    width: int
    """Image width in pixels."""
    points: NDArray[np.float32]
    """(N, 2) x y of heads in continuous pixels; the centre of the first pixel is (0.5, 0.5)."""
    roi: Encoded | None
    """PNG with one bit per pixel, 1 where heads are annotated; None: everywhere."""
    depth: Encoded | None
    """16-bit greyscale PNG of at most the image's size; 0..65535 maps to [0, 1], larger = farther."""
    sha256: str
    """SHA-256 of the image's bytes."""
    source_sha256: str | None = None
    """SHA-256 of its bytes in the source, if conversion may have rewritten them without loss; None: the same."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with copies of views into a mapped file."""
        values = (getattr(self, name) for name in self.__slots__)
        return Sample, tuple(bytes(value) if isinstance(value, memoryview) else value for value in values)


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
    """Make a sample: decode the image to check it and get its size, and hash it.

    Args as the fields of `Sample`, and:
        shape: (H, W) of an image that needs no check; skips decoding.

    Raises:
        DataError: For an invalid image or invalid points.
    """
    try:
        heads = validate_points(points)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    height, width = shape or check_image(image)
    sha256 = hashlib.sha256(image).hexdigest()
    return Sample(name, split, scene, image, height, width, np.ascontiguousarray(heads), roi, depth, sha256)


def validate_points(points: NDArray[Any]) -> NDArray[np.float32]:
    """Heads as float32 (N, 2); any empty array becomes (0, 2). Raises DataError for invalid points."""
    given = np.asarray(points, dtype=np.float64)
    given = given.reshape(0, 2) if given.size == 0 else given
    if given.ndim != 2 or given.shape[1] != 2:
        raise DataError(f"points have shape {given.shape}, expected (heads, 2) with x and y")
    if bad := int((~np.isfinite(given)).any(axis=1).sum()):
        raise DataError(f"{bad} of {len(given)} points are not finite numbers; fix the annotation")
    if (distance := np.abs(given).max(initial=0.0)) > MAX_DISTANCE:
        raise DataError(f"a point is {distance:g} pixels from the image's corner; fix the annotation")
    return given.astype(np.float32)


def points_outside(points: NDArray[np.float32], height: int, width: int) -> int:
    """Number of the (N, 2) points outside [0, width] x [0, height]."""
    return int(((points < 0) | (points > np.array([width, height], dtype=np.float32))).any(axis=1).sum())


def encode_roi(mask: NDArray[np.bool_]) -> bytes:
    """Encode a region of interest, bool (H, W), True where heads are annotated, as a PNG with one bit per pixel."""
    return _png(Image.fromarray(np.asarray(mask, dtype=np.bool_)))


@lru_cache(maxsize=8)
def decode_roi(content: bytes) -> NDArray[np.bool_]:
    """Decode a region of interest to bool (H, W), read-only because images of one scene share the array."""
    mask = decode_mask(content)
    mask.setflags(write=False)
    return mask


def encode_depth(depth: NDArray[Any]) -> bytes:
    """Encode depth (H, W) of any positive scale, larger = farther, as a 16-bit PNG whose maximum is 1.

    The map is divided by its maximum, not stretched from its minimum: this preserves ratios of distances, and keeps
    near heads above the 0 of the background in the distilled target. Infinite depth (sky) becomes 1.

    Raises:
        DataError: For negative values or NaN, or if no value is positive and finite.
    """
    values = np.asarray(depth, dtype=np.float64)
    finite = np.isfinite(values)
    if values.ndim != 2 or np.isnan(values).any() or (values < 0).any():
        raise DataError(f"depth of shape {values.shape} must be an (H, W) map of non-negative numbers")
    farthest = values[finite].max(initial=0.0)
    if farthest <= 0:
        raise DataError("depth has no positive finite value, so it cannot be scaled to [0, 1]")
    scaled = np.where(finite, values, farthest) / farthest
    return _png(Image.fromarray(np.round(scaled * _DEPTH_STEPS).astype(np.uint16)))


@lru_cache(maxsize=8)
def decode_depth(content: bytes) -> NDArray[np.float32]:
    """Decode depth to float32 (H, W) in [0, 1], larger = farther; read-only because images of one scene share it."""
    depth = decode_grey16(content).astype(np.float32) / np.float32(_DEPTH_STEPS)
    depth.setflags(write=False)
    return depth


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()
