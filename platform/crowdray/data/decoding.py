"""Decoding of images: the formats that are read, their limits, and how pixels become 8-bit RGB.

No other module opens encoded images. The first bytes choose the decoder: a library that guesses may reach others, such
as Pillow, which starts Ghostscript for a PostScript file named photo.jpg.

Transparency and colour profiles are ignored, 16-bit values are divided by 256, and other values that do not fit 8 bits
are refused. Cameras store the sensor's pixels and record in an EXIF tag how to turn them: decoding ignores the tag,
except in TIFF files, which every reader shows upright; annotation tools and photo viewers follow it.

Shape legend: H W image in pixels.
"""

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError

from crowdray import storage
from crowdray.data.jpeg_strips import cut_strip
from crowdray.errors import DataError, UserError, first_line

Encoded = bytes | memoryview
"""Encoded content: bytes, or a read-only view into a mapped shard."""

DECODED_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
"""Suffixes of images, in any case; the content decides on the format."""
SUFFIXES = (*DECODED_SUFFIXES, ".heic", ".heif")
"""The same, with those of photos that are reported as not decoded instead of being skipped in silence."""

MAX_PIXELS = 2**28
"""Limit on an image's height times width, as in 16384x16384: 0.8 GB of RGB, and up to 4 GB while WebP is decoded."""
Image.MAX_IMAGE_PIXELS = None  # the limit above is checked for all decoders

SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap height and width."""

_SIGNATURES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF....WEBP",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "BMP": rb"BM",
    "PPM": rb"P[56]\s",
    "AVIF": rb"....ftyp(?:avif|avis|mif1|msf1)",
}
"""First bytes of each format, by Pillow's name."""
_REFUSED_SIGNATURES = {
    "HEIF": rb"....ftyphe",
    "GIF": rb"GIF8",
    "PDF": rb"%PDF",
    "PostScript": rb"%!PS|\xc5\xd0\xd3\xc6",
}
"""First bytes of formats that are not decoded, for messages."""
_SIGNATURE_BYTES = 16
_MAX_PIXELS_PER_BYTE = 1024
"""Limit for photos of more than `_SMALL` pixels; those of cameras have fewer than 100, empty images many more."""
_SMALL = 2**24
_MAX_SCAN_PIXELS = 2**34
"""Limit on the pixels of a JPEG times its scans, which a progressive one takes few bytes to repeat: about a minute."""
_TIFF_SAMPLE_FORMATS = {2: "signed integers", 3: "floats", 5: "complex numbers", 6: "complex numbers"}
_TIFF_WHITE_IS_ZERO = 0
_MIN_BRIGHTEST = 16
"""Level of 256 that the brightest pixel of a 16-bit image must reach."""


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What the header of an encoded image says."""

    format: str
    """Pillow's name of the format."""
    height: int
    """Height in pixels, as decoded."""
    width: int
    """Width in pixels, as decoded."""
    mode: str
    """Pillow's name of the type of its pixels, such as RGB, L (grey) or CMYK."""

    @property
    def colours(self) -> str:
        """Colour model: colour, grey or CMYK."""
        grey = self.mode.startswith(("1", "L", "I", "F")) and self.mode != "LAB"
        return "grey" if grey else "CMYK" if self.mode == "CMYK" else "colour"


def read_header(content: Encoded | IO[bytes]) -> ImageHeader:
    """Read the header of an image, not its pixels. Raises DataError for other content."""
    with open_image(content) as image:
        assert image.format
        return ImageHeader(image.format, image.height, image.width, image.mode)


def content_size(content: Encoded) -> tuple[int, int]:
    """Height and width in pixels from the header of an image. Raises DataError for other content."""
    header = read_header(content)
    return header.height, header.width


def image_size(uri: str) -> tuple[int, int]:
    """Height and width in pixels from the header of an image file. Raises DataError for other files."""
    with storage.open_read(uri) as file:
        try:
            header = read_header(file)
        except DataError as error:
            raise DataError(f"{uri}: {error}") from error
        return header.height, header.width


def upright_size(uri: str) -> tuple[int, int]:
    """Height and width in pixels of an image file turned upright. Raises DataError for other files."""
    height, width = image_size(uri)
    with storage.open_read(uri) as file:
        return (width, height) if orientation(file) in SIDEWAYS else (height, width)


def check_image(content: Encoded) -> tuple[int, int]:
    """Height and width in pixels of an image, decoded to its end. Raises DataError if `decode_image` would."""
    height, width = _decoded(content, "GRAY").shape[:2]
    return height, width


def decode_image(content: Encoded) -> NDArray[np.uint8]:
    """Decode an image to uint8 (H, W, 3) RGB, as stored.

    Raises:
        DataError: For content that is damaged, too large, in another format or has several frames, and for pixels that
            8 bits cannot represent.
    """
    return _decoded(content, "RGB")


def decode_rows(content: Encoded, first: int, last: int) -> NDArray[np.uint8]:
    """Decode the rows `first` to `last` - 1 of an image to uint8 (last - first, W, 3) RGB, equal to `decode_image`'s.

    Of a JPEG with a restart marker after each row of MCUs, only rows near these are decoded: damage elsewhere is not
    seen. Shards are verified by their hash.

    Raises:
        DataError: As `decode_image`.
    """
    if (strip := cut_strip(content, first, last)) is not None:
        with contextlib.suppress(DataError):  # raised again, with the reason that the whole image has
            return _decoded(strip.content, "RGB")[first - strip.top : last - strip.top]
    return decode_image(content)[first:last]


def decode_upright(content: Encoded) -> NDArray[np.uint8]:
    """Decode an image to uint8 (H, W, 3) RGB, turned as its EXIF orientation asks. Raises as `decode_image`."""
    return turn_upright(decode_image(content), orientation(content))


def orientation(content: Encoded | IO[bytes]) -> int:
    """EXIF orientation by which the decoded image must be turned, 1 (upright) to 8; 1 if it is missing or damaged."""
    with contextlib.suppress(DataError), open_image(content) as image:
        if image.format != "TIFF":
            value = image.getexif().get(ExifTags.Base.Orientation)
            return value if isinstance(value, int) and value in range(1, 9) else 1
    return 1


def turn_upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn pixels (H, W, 3) as an EXIF orientation asks."""
    if orientation == 1:
        return pixels  # without three copies
    image = Image.fromarray(pixels)
    image.getexif()[ExifTags.Base.Orientation] = orientation
    return np.array(ImageOps.exif_transpose(image))


def decode_grey16(content: Encoded) -> NDArray[np.uint16]:
    """Decode a 16-bit greyscale PNG, without scaling. Raises DataError for other content."""
    with open_image(content) as image:
        if (image.format, image.mode) != ("PNG", "I;16"):
            raise DataError(f"a {image.format} file of the mode {image.mode}, expected 16-bit grey PNG")
        return np.asarray(image)


def decode_mask(content: Encoded) -> NDArray[np.bool_]:
    """Decode an image with one bit per pixel to bool (H, W). Raises DataError for other content."""
    with open_image(content) as image:
        return np.array(image.convert("1"), dtype=np.bool_)


@contextlib.contextmanager
def open_image(content: Encoded | IO[bytes]) -> Iterator[ImageFile.ImageFile]:
    """Open an image with the decoder of its format, after a check of its size; the block may decode it.

    Raises:
        DataError: For content that is not an image, is too large or is damaged, also from within the block.
    """
    file = io.BytesIO(content) if isinstance(content, bytes | memoryview) else content
    name = _image_format(file.read(_SIGNATURE_BYTES))
    file.seek(0)
    with _decoder_errors(name, file is content), Image.open(file, formats=[name]) as image:
        _check_size(image.height, image.width)
        yield image


def _image_format(start: bytes) -> str:
    for name, signature in _SIGNATURES.items():
        if re.match(signature, start, re.DOTALL):
            return name
    if not start:
        raise DataError("not an image: the file is empty; replace or remove it")
    for name, signature in _REFUSED_SIGNATURES.items():
        if re.match(signature, start, re.DOTALL):
            raise DataError(f"{name} files are not decoded; save it as JPEG or PNG")
    raise DataError(f"not an image: it begins with {start!r}; replace or remove the file")


@contextlib.contextmanager
def _decoder_errors(name: str, is_file: bool = False) -> Iterator[None]:
    """Translate every exception of a decoder: which ones it raises for damaged content is not documented.

    Exceptions of the storage of a file pass.
    """
    try:
        yield
    except UserError:
        raise
    except UnidentifiedImageError as error:  # its message contains the address of an object
        reason = "its header is damaged, or describes pixels of an unknown type"
        raise DataError(f"the {name} image cannot be decoded: {reason}; save it again as JPEG or PNG") from error
    except Exception as error:
        if is_file and isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(
            f"the {name} image cannot be decoded: {first_line(error)}; replace or remove the file"
        ) from error


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise DataError(f"it has {width}x{height} pixels, more than the limit of {MAX_PIXELS:,}; resize or tile it")


def _check_photo_size(height: int, width: int, size: int) -> None:
    """Raise DataError if a photo of `size` bytes is too large, or has so few bytes that only its memory is large."""
    _check_size(height, width)
    if height * width > max(_SMALL, size * _MAX_PIXELS_PER_BYTE):
        raise DataError(
            f"it has {width}x{height} pixels in {size:,} bytes, more than {_MAX_PIXELS_PER_BYTE} for each; "
            "resize it or replace the file"
        )


def _decoded(content: Encoded, jpeg_colours: Literal["RGB", "GRAY"]) -> NDArray[np.uint8]:
    """RGB pixels, or those of a JPEG in `jpeg_colours`: luma reads all bytes with a fifth less work."""
    name = _image_format(bytes(content[:_SIGNATURE_BYTES]))
    if name == "JPEG":
        with _decoder_errors(name):
            height, width, colours = simplejpeg.decode_jpeg_header(content)[:3]
            _check_photo_size(height, width, len(content))
            if height * width * len(content) > 8 * _MAX_SCAN_PIXELS:  # so that it may have too many
                scans = bytes(content).count(b"\xff\xda")
                if height * width * scans > _MAX_SCAN_PIXELS:
                    raise ValueError(f"it has {scans} scans of {width}x{height} pixels")
            if colours not in ("CMYK", "YCCK"):
                pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(content, colorspace=jpeg_colours)
                return pixels
    with open_image(content) as image:
        _check_photo_size(image.height, image.width, len(content))
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            _check_tiff(image, len(content))
        return _to_rgb(image)


def _to_rgb(image: ImageFile.ImageFile) -> NDArray[np.uint8]:
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a JPEG with previews is one photo
        raise DataError("it contains several images, as an animation or a document does; save each one as a file")
    is_16_bit = any(";16" in str(tile.args) for tile in image.tile)
    if image.mode.startswith("I"):  # PGM has mode I, scaled to 16 bits
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        pixels = np.repeat(grey[:, :, None], 3, axis=2)
    else:
        pixels = np.asarray(image.convert("RGB"))
    if is_16_bit and (brightest := int(pixels.max())) < _MIN_BRIGHTEST:
        raise DataError(
            f"its 16-bit pixels are all below {(brightest + 1) * 256} of 65536, so it would be all but black; "
            "scale them to the full range and save it again"
        )
    return pixels


def _check_tiff(image: TiffImagePlugin.TiffImageFile, size: int) -> None:
    """Raise DataError for tiles that are too large, and for pixels that Pillow would decode to other brightnesses."""
    tags = image.tag_v2
    _check_photo_size(tags.get(TiffImagePlugin.TILELENGTH, 0), tags.get(TiffImagePlugin.TILEWIDTH, 0), size)
    bits = max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
    for sample_format in tags.get(TiffImagePlugin.SAMPLEFORMAT, ()):
        if sample_format in _TIFF_SAMPLE_FORMATS:
            raise DataError(_unsuitable(_TIFF_SAMPLE_FORMATS[sample_format]))
    if bits not in (1, 2, 4, 8, 16):
        raise DataError(_unsuitable(f"{bits}-bit integers"))
    if bits == 16 and tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == _TIFF_WHITE_IS_ZERO:
        raise DataError(_unsuitable("16-bit integers of which 0 is white"))


def _unsuitable(pixels: str) -> str:
    return f"its pixels are {pixels}, whose black and white are unknown; scale them to 8 bits and save it as PNG"
