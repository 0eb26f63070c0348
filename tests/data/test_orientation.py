"""EXIF orientation equals Pillow's own handling of it."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from crowdray.data.orientation import encoded_orientation, turn_upright
from crowdray.data.sample import decode_image

from ..support.builders import encode


@pytest.mark.parametrize("orientation", [None, *range(1, 10)])
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_turn_upright_equals_pillow(orientation: int | None, form: str) -> None:
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    content = encode(Image.fromarray(pixels), form, exif=exif)
    stored = decode_image(content)
    with Image.open(io.BytesIO(content)) as opened:
        tagged = Image.fromarray(stored)
        tagged.getexif().update(opened.getexif())
        expected = np.asarray(ImageOps.exif_transpose(tagged))
    np.testing.assert_array_equal(turn_upright(stored, encoded_orientation(content)), expected)


def test_encoded_orientation_of_unreadable_content_is_upright() -> None:
    assert encoded_orientation(b"not an image") == 1
