"""EXIF orientation: how stored pixels must be turned to show an image upright.

Cameras store the sensor's pixels and record in a tag how to turn them. Decoding ignores the tag; annotation tools and
photo viewers follow it.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

SIDEWAYS = (5, 6, 7, 8)
"""Values of the tag that swap height and width."""


def exif_orientation(image: Image.Image) -> int:
    """EXIF orientation of an opened image, 1 to 8; 1 (upright) where the tag is missing or invalid."""
    orientation: int = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation if orientation in range(1, 9) else 1


def encoded_orientation(content: bytes) -> int:
    """EXIF orientation of an encoded image; 1 where its metadata cannot be read."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return exif_orientation(image)
    except (OSError, SyntaxError, ValueError):
        return 1


def turn_upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn pixels (H, W, 3) as an EXIF orientation asks."""
    image = Image.fromarray(pixels)
    image.getexif()[ExifTags.Base.Orientation] = orientation
    return np.array(ImageOps.exif_transpose(image))
