"""A look over a MATLAB file of version 5 before scipy reads it.

scipy looks the type of each element up in a table without looking at its bounds, and reads as many as a matrix
claims to have: one flipped byte ends the whole process, or keeps it for hours, instead of one item. The format:
MAT-File Format, The MathWorks, chapter 1.
"""

import math
import struct
import zlib

LARGEST = 2**28
"""Bytes of the largest array that is believed: a damaged header can claim any size."""

ORDERS = {b"\x00\x01IM": "<", b"\x01\x00MI": ">"}
"""Byte order by the last four bytes of the header: version 1.0 and a mark."""

HEADER, TAG, FLAGS = 128, 8, 16
NUMBERS = frozenset({1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 16, 17, 18})
"""Types of elements that hold plain values."""
INT32, MATRIX, COMPRESSED = 5, 14, 15
DEEPEST = 32
"""Cells and structs inside each other; scipy calls itself for each."""


def check_matlab5(content: bytes) -> None:
    """Raises ValueError unless the elements of the file are of types that exist, end inside what holds them, and
    have as many bytes at least as their shape has places."""
    order = ORDERS.get(content[124:HEADER])
    if order is None or 0 in content[:4]:
        raise ValueError("it has no header of MATLAB")
    _check(content, HEADER, order, 0)


def _check(data: bytes, place: int, order: str, depth: int) -> None:
    """Checks the elements from `place` to the end of `data`; `depth` counts the matrices around them."""
    if depth > DEEPEST:
        raise ValueError(f"more than {DEEPEST} cells and structs inside each other")
    while place < len(data):
        if len(data) - place < TAG:
            raise ValueError(f"{len(data) - place} bytes are left over where an element begins")
        kind, size = struct.unpack_from(f"{order}II", data, place)
        if kind >> 16:  # a small element: size and type share a word, and its bytes lie in the tag
            kind, size, start, following = kind & 0xFFFF, kind >> 16, place + 4, place + TAG
            fits = size <= 4
        else:
            start = place + TAG
            following = start + size if kind == COMPRESSED else start + -(-size // 8) * 8
            fits = start + size <= len(data)
        if not fits or not (kind in NUMBERS or kind == MATRIX or (kind == COMPRESSED and depth == 0)):
            raise ValueError(f"an element of type {kind} and {size} bytes")
        if kind == COMPRESSED:
            _check(_inflated(data[start : start + size]), 0, order, depth)
        elif kind == MATRIX and size:
            _check(data[start : start + size], 0, order, depth + 1)
            _check_shape(data[start : start + size], order)
        place = following


def _check_shape(matrix: bytes, order: str) -> None:
    """Checks the shape of a matrix, the second of its elements, after the 16 bytes of its flags."""
    kind, size = struct.unpack_from(f"{order}II", matrix, FLAGS)
    if kind >> 16:
        kind, size, start = kind & 0xFFFF, kind >> 16, FLAGS + 4
    else:
        start = FLAGS + TAG
    if kind != INT32 or size % 4 or not size:
        raise ValueError(f"a matrix with a shape of type {kind} and {size} bytes")
    sides = struct.unpack_from(f"{order}{size // 4}i", matrix, start)
    if min(sides) < 0 or math.prod(sides) > len(matrix):
        raise ValueError(f"a matrix of shape {sides} in {len(matrix)} bytes")


def _inflated(data: bytes) -> bytes:
    stream = zlib.decompressobj()
    inflated = stream.decompress(data, LARGEST)
    if not stream.eof:
        raise ValueError(f"a compressed element that is cut off, or holds more than {LARGEST} bytes")
    return inflated
