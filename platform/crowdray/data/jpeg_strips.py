"""Strips of a JPEG: some of its rows as a smaller JPEG, for decoders that only read whole files.

Huffman codes have no index, and each block's mean is stored as the difference from the block before: decoding starts at
the first row. A restart marker resets both. In a baseline JPEG with one after each row of MCUs, the blocks that are
coded together, any rows can be cut out without decoding the others (ITU-T T.81, sections B.2 and E.1.4).
"""

import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_BLOCK = 8
_SOF0, _DHT, _SOF15, _DRI, _SOS = 0xFFC0, 0xFFC4, 0xFFCF, 0xFFDD, 0xFFDA
_WITHOUT_LENGTH = range(0xFFD0, 0xFFDA)
"""Restart markers, start and end of the image: no segment follows."""
_RST0, _RSTS = 0xD0, 8
END_OF_IMAGE = b"\xff\xd9"


class Strip(NamedTuple):
    """Some rows of an image."""

    content: bytes
    """Encoded as a JPEG."""
    top: int
    """The image's row that is the first one of the strip."""


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """What a baseline JPEG of one scan, in grey or colour, says before its entropy-coded data."""

    frame: int
    """Position of the frame header (SOF0)."""
    scan: int
    """Position of the entropy-coded data."""
    height: int
    mcu_height: int
    """Height of a row of MCUs in pixels."""
    mcus: int
    """Number of MCUs in a row."""
    restart_interval: int
    """Number of MCUs between restart markers; 0 without them."""

    @property
    def mcu_rows(self) -> int:
        """Number of rows of MCUs."""
        return -(-self.height // self.mcu_height)


def read_jpeg_header(content: bytes | memoryview) -> JpegHeader | None:
    """Read the header; None if it is damaged, or of a JPEG that is progressive, has several scans or four colours."""
    frame, interval, position = 0, 0, 2
    while position + 4 <= len(content):
        marker, length = struct.unpack_from(">HH", content, position)
        if marker == _SOF0:
            frame = position
        elif marker == _DRI and length == 4:
            interval = int.from_bytes(content[position + 4 : position + 6])
        elif marker == _SOS:
            return _header(content, frame, position, interval) if frame else None
        elif marker < _SOF0 or marker in _WITHOUT_LENGTH or (marker <= _SOF15 and marker != _DHT):
            return None
        position += 2 + length
    return None


def has_restart_rows(content: bytes | memoryview) -> bool:
    """Whether `cut_strip` can cut rows out of an image."""
    return _row_starts(content) is not None


def cut_strip(content: bytes | memoryview, first: int, last: int) -> Strip | None:
    """Cut the rows `first` to `last` - 1 out of an image, with at least one row of MCUs more on each side.

    Chroma is interpolated between neighbouring rows of MCUs: pixels next to a cut differ from those of the whole image,
    all others are the same.

    Returns:
        None if the image is not a baseline JPEG with a restart marker after each row of MCUs.
    """
    found = _row_starts(content)
    if found is None:
        return None
    header, starts = found
    low = max(first // header.mcu_height - 1, 0)
    high = min(-(-last // header.mcu_height) + 1, header.mcu_rows)
    start, is_end = starts[low], high == header.mcu_rows
    data = bytearray(content[start:] if is_end else content[start : starts[high]])
    if not is_end:
        data[-2:] = END_OF_IMAGE
    for number, row in enumerate(range(low + 1, high)):
        data[starts[row] - start - 1] = _RST0 + number % _RSTS
    height = (header.height if is_end else high * header.mcu_height) - low * header.mcu_height
    size = header.frame + 5
    before, after = content[:size], content[size + 2 : header.scan]
    return Strip(b"".join((before, struct.pack(">H", height), after, data)), low * header.mcu_height)


def _header(content: bytes | memoryview, frame: int, scan: int, interval: int) -> JpegHeader | None:
    try:
        height, width, components = struct.unpack_from(">HHB", content, frame + 5)
        factors = [content[frame + 11 + 3 * number] for number in range(components)]
        length, scanned = struct.unpack_from(">HB", content, scan + 2)
    except (struct.error, IndexError):
        return None
    # Without a fourth colour: CMYK is not decoded by rows. In a scan of one component, an MCU is a block.
    across, down = (1, 1) if components == 1 else (max(f >> 4 for f in factors), max(f & 15 for f in factors))
    if components not in (1, 3) or scanned != components or not (height and width and across and down):
        return None
    return JpegHeader(frame, scan + 2 + length, height, _BLOCK * down, -(-width // (_BLOCK * across)), interval)


def _row_starts(content: bytes | memoryview) -> tuple[JpegHeader, list[int]] | None:
    """The header, and the position of each row of MCUs; None without a restart marker after each."""
    header = read_jpeg_header(content)
    if header is None or header.restart_interval != header.mcus:
        return None
    data = np.frombuffer(content, np.uint8)[header.scan :]
    prefixes = np.flatnonzero(data[:-1] == 0xFF)
    codes = data[prefixes + 1]
    is_restart = (codes & 0xF8) == _RST0
    expected = _RST0 + np.arange(header.mcu_rows - 1) % _RSTS
    if not np.array_equal(codes[is_restart], expected):
        return None
    return header, [header.scan, *(prefixes[is_restart] + (header.scan + 2)).tolist()]
