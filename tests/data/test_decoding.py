"""Decoding: agreement with Pillow, stated rules for unusual pixels, and one kind of error for whatever is damaged."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import ExifTags, Image, ImageFile, ImageOps

from crowdray.data.decoding import check_image, content_size, decode_image, decode_upright, orientation, turn_upright
from crowdray.errors import DataError

from ..support.builders import encode, jpeg

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 31, 3), dtype=np.uint8)
RAMP = np.linspace(0, 65535, 256).round().astype(np.uint16)


def png(width: int, height: int, bits: int, colours: int, data: bytes, *chunks: bytes) -> bytes:
    """A PNG of any depth and colour type from its unfiltered lines."""
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    parts = [b"IHDR" + header, *chunks, b"IDAT" + zlib.compress(data), b"IEND"]
    framed = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def tiff(order: str, *, size: tuple[int, int] = (256, 1), data: bytes, **tags: int) -> bytes:
    """A TIFF file of one strip; tags by their number in hexadecimal, as t102=16 for the bits of a sample."""
    fields = {0x100: size[0], 0x101: size[1], 0x102: 8, 0x103: 1, 0x106: 1, 0x111: 8, 0x115: 1, 0x116: size[1]}
    fields |= {0x117: len(data)} | {int(name[1:], 16): value for name, value in tags.items()}
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, fields[tag]) for tag in sorted(fields))
    start = 8 + len(data)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", start)
    return head + data + struct.pack(order + "H", len(fields)) + entries + struct.pack(order + "I", 0)


def webp(height: int, width: int) -> bytes:
    """A lossless WebP of one colour, with another size in its header."""
    content = encode(Image.new("RGB", (1, 1)), "WEBP", lossless=True)
    start = content.index(b"VP8L") + 9
    return content[:start] + struct.pack("<I", (height - 1) << 14 | width - 1) + content[start + 4 :]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_decode_image_equals_pillow_for_png(mode: str) -> None:
    image = Image.fromarray(PIXELS).convert(mode)
    np.testing.assert_array_equal(decode_image(encode(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_decode_image_agrees_with_pillow_for_jpeg(mode: str) -> None:
    smooth = np.broadcast_to(np.arange(0, 248, 8, dtype=np.uint8)[None, :, None], (24, 31, 3)).copy()
    content = encode(Image.fromarray(smooth).convert(mode), "JPEG")
    with Image.open(io.BytesIO(content)) as image:
        reference = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(decode_image(content).astype(int) - reference).max() <= 2


@pytest.mark.parametrize(
    ("form", "options"),
    [("WEBP", {"lossless": True}), ("TIFF", {"compression": "tiff_lzw"}), ("BMP", {}), ("PPM", {}), ("AVIF", {})],
)
def test_decode_image_reads_every_listed_format(form: str, options: dict[str, Any]) -> None:
    smooth = np.broadcast_to(np.arange(0, 248, 8, dtype=np.uint8)[None, :, None], (24, 31, 3)).copy()
    content = encode(Image.fromarray(smooth), form, **options)
    error = np.abs(decode_image(content).astype(int) - smooth).max()
    assert error == 0 or (form == "AVIF" and error < 8)
    assert content_size(content) == check_image(memoryview(content)) == (24, 31)


@pytest.mark.parametrize(
    "content",
    [
        png(256, 1, 16, 0, b"\0" + RAMP.astype(">u2").tobytes()),
        png(256, 1, 16, 2, b"\0" + RAMP.astype(">u2").repeat(3).tobytes()),
        png(256, 1, 16, 4, b"\0" + RAMP.astype(">u2").repeat(2).tobytes()),
        png(256, 1, 16, 6, b"\0" + RAMP.astype(">u2").repeat(4).tobytes()),
        tiff("<", data=RAMP.astype("<u2").tobytes(), t102=16),
        tiff(">", data=RAMP.astype(">u2").tobytes(), t102=16),
        encode(Image.fromarray(RAMP[None]), "TIFF", compression="tiff_lzw"),
        b"P5\n256 1\n65535\n" + RAMP.astype(">u2").tobytes(),
        b"P5\n256 1\n4095\n" + (RAMP >> 4).astype(">u2").tobytes(),
        b"P6\n256 1\n65535\n" + RAMP.astype(">u2").repeat(3).tobytes(),
    ],
    ids=["png", "png-rgb", "png-la", "png-rgba", "tiff", "tiff-big-endian", "tiff-lzw", "pgm", "pgm-12", "ppm"],
)
def test_decode_image_scales_16_bits_to_8(content: bytes) -> None:
    np.testing.assert_array_equal(decode_image(content)[0], np.arange(256)[:, None].repeat(3, axis=1))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (encode(Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32)[None]), "TIFF"), "pixels are floats"),
        (tiff("<", data=bytes(512), t102=16, t153=2), "pixels are signed integers"),
        (tiff("<", data=bytes(256), t102=8, t153=2), "pixels are signed integers"),
        (tiff("<", data=bytes(384), t102=12), "pixels are 12-bit integers"),
        (tiff("<", data=bytes(1024), t102=32), "pixels are 32-bit integers"),
        (tiff("<", data=RAMP.astype("<u2").tobytes(), t102=16, t106=0), "of which 0 is white"),
        (tiff(">", data=bytes(2048), t102=64), "pixels of an unknown type"),
        (encode(Image.fromarray(RAMP[None] >> 4)), "all below 4096 of 65536"),
        (png(2, 1, 16, 2, b"\0\x01\x80" + bytes(10)), "all below 512 of 65536"),
        (jpeg(1).replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "precision 12"),
    ],
)
def test_decode_image_refuses_pixels_that_8_bits_cannot_represent(content: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        decode_image(content)


@pytest.mark.parametrize("form", ["TIFF", "WEBP", "PNG"])
def test_decode_image_refuses_several_images_in_a_file(form: str) -> None:
    frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    with pytest.raises(DataError, match="contains several images"):
        decode_image(encode(frames[0], form, save_all=True, append_images=frames[1:]))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an image: the file is empty"),
        (b"<html>404 Not Found</html>", "not an image: it begins with b'<html>404 Not Fo'"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript files are not decoded"),
        (b"\xc5\xd0\xd3\xc6" + bytes(40), "PostScript files are not decoded"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "HEIF files are not decoded; save it as JPEG or PNG"),
        (b"%PDF-1.7\n", "PDF files are not decoded"),
        (encode(Image.fromarray(PIXELS), "GIF"), "GIF files are not decoded"),
        (encode(Image.fromarray(PIXELS), "TGA"), "not an image: it begins with"),
    ],
)
def test_decode_image_refuses_formats_outside_the_list(content: bytes, reason: str) -> None:
    for read in (decode_image, content_size, check_image):
        with pytest.raises(DataError, match=reason):
            read(content)


def test_decode_image_of_damaged_files_raises_the_same_reason_each_time() -> None:
    photo = Image.fromarray(PIXELS)
    originals = [encode(photo, form) for form in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "AVIF")]
    originals += [encode(photo, "TIFF", compression=name) for name in ("jpeg", "tiff_lzw", "tiff_adobe_deflate")]

    def outcome(content: bytes) -> str:
        try:
            decode_upright(content)
        except DataError as error:
            return str(error)
        return ""

    rng, reasons = np.random.default_rng(0), set[str]()
    for content in originals:
        for case in range(25):
            damaged = bytearray(content[: rng.integers(1, len(content))] if case % 2 else content)
            for _ in range(3):
                damaged[rng.integers(min(len(damaged), 150))] = rng.integers(256)
            reason = outcome(bytes(damaged))
            assert outcome(bytes(damaged)) == reason
            reasons.add(reason)
    assert len(reasons) > 20 and not [reason for reason in reasons if " at 0x" in reason or "\n" in reason]
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("error", [RuntimeError("bad\nsecond"), MemoryError(), struct.error("bad"), zlib.error("bad")])
def test_decode_image_translates_every_exception_of_a_decoder(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(DataError, match=r"the PNG image cannot be decoded: (bad|out of memory); replace or remove"):
        decode_image(encode(Image.fromarray(PIXELS)))


@pytest.mark.parametrize("cut", [3, 300, -2])
def test_decode_image_and_check_image_reject_truncated_images(cut: int) -> None:
    content = simplejpeg.encode_jpeg(np.repeat(PIXELS, 4, axis=0), quality=90)
    for decode in (decode_image, check_image):
        with pytest.raises(DataError, match="cannot be decoded"):
            decode(content[:cut])


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"keep_rgb": True}], ids=str)
def test_check_image_agrees_with_decode_image(mode: str, options: dict[str, bool]) -> None:
    """Wherever a JPEG is truncated: the check decodes only its luma."""
    content = encode(Image.fromarray(np.repeat(PIXELS, 3, axis=0)).convert(mode), "JPEG", **options)
    assert check_image(content) == decode_image(content).shape[:2] == (72, 31)

    def outcome(decode: Callable[[bytes], object], cut: int) -> str:
        try:
            decode(content[:cut])
        except DataError as error:
            return str(error)
        return "valid"

    cuts = range(len(content) // 2, len(content), len(content) // 16)
    assert [outcome(check_image, cut) for cut in cuts] == [outcome(decode_image, cut) for cut in cuts]


def declared_jpeg(height: int, width: int, size: int = 0) -> bytes:
    """A JPEG whose header claims a size, filled to `size` bytes."""
    content = bytearray(jpeg(1))
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(content) + bytes(max(0, size - len(content)))


@pytest.mark.parametrize(
    "content",
    [
        declared_jpeg(9000, 16000),
        png(16000, 9000, 1, 0, b""),
        webp(9000, 16000),
        tiff("<", data=b"", t102=8, t142=16000, t143=9000),
    ],
    ids=["jpeg", "png", "webp", "tile of tiff"],
)
def test_decode_image_refuses_large_images_in_few_bytes(content: bytes) -> None:
    with pytest.raises(DataError, match=r"16000x9000 pixels in [\d,]+ bytes"):
        decode_image(content)


def test_decode_image_takes_empty_images_of_16_megapixels() -> None:
    assert decode_image(encode(Image.new("1", (4096, 4096)))).shape == (4096, 4096, 3)


def test_decode_image_refuses_a_jpeg_of_many_scans() -> None:
    content = declared_jpeg(16000, 16000, 300_000)
    with pytest.raises(DataError, match="it has 101 scans of 16000x16000 pixels"):
        decode_image(content + b"\xff\xda" * 100)


@pytest.mark.parametrize(
    "content",
    [
        declared_jpeg(60_000, 60_000, 60_000**2 // 1024 + 4096),
        png(60_000, 60_000, 8, 2, bytes(100)),
        tiff("<", size=(60_000, 60_000), data=bytes(100)),
        b"P5\n60000 60000\n255\n" + bytes(100),
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 154, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 100, 0, 0, 0, 0) + bytes(100),
    ],
    ids=["jpeg", "png", "tiff", "pgm", "bmp"],
)
def test_decode_image_refuses_too_many_pixels_before_decoding(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simplejpeg, "decode_jpeg", None)
    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", None)  # takes the memory of the pixels
    for read in (decode_image, check_image, content_size):
        with pytest.raises(DataError, match="60000x60000 pixels, more than the limit of 268,435,456"):
            read(content)


def test_decode_image_starts_to_decode_photos_of_200_megapixels() -> None:
    with pytest.raises(DataError, match="image file is truncated"):  # beyond Pillow's own limit
        decode_image(png(16320, 12240, 1, 0, b"", b"iTXt" + bytes(200_000)))


@pytest.mark.parametrize("value", [None, *range(1, 10)])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_decode_upright_equals_pillow(value: int | None, form: str) -> None:
    exif = Image.Exif()
    if value is not None:
        exif[ExifTags.Base.Orientation] = value
    pixels = np.tile(PIXELS[:16, :24], (2, 1, 1))
    content = encode(Image.fromarray(pixels), form, exif=exif)
    with Image.open(io.BytesIO(content)) as opened:
        opened.load()
        stored = Image.fromarray(decode_image(content))
        stored.getexif().update(opened.getexif())
    np.testing.assert_array_equal(decode_upright(content), np.asarray(ImageOps.exif_transpose(stored)))
    if value and value < 9 and form in ("PNG", "TIFF"):  # which are lossless
        np.testing.assert_array_equal(decode_upright(content), turn_upright(pixels, value))


def test_damaged_exif_leaves_the_photo_as_stored() -> None:
    plain = encode(Image.fromarray(PIXELS), "JPEG")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    tagged = exif.tobytes()
    for damaged in (
        tagged[:9],
        tagged[:13],
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM",
        b"Exif\0\0" + b"\xff" * 30,
    ):
        segment = b"\xff\xe1" + struct.pack(">H", len(damaged) + 2) + damaged
        content = plain[:2] + segment + plain[2:]
        assert orientation(content) == 1
        np.testing.assert_array_equal(decode_upright(content), decode_image(plain))
    assert orientation(b"not an image") == 1
