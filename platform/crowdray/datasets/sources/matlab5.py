"""A look over a MATLAB file of version 5 before scipy reads it.

scipy looks the type of each element up in a table without looking at its bounds, reads as many elements as a
matrix claims to have, and goes on in the next matrix where one ends too early: a flipped bit ends the whole
process, or keeps it for hours, instead of one item. The format: MAT-File Format, The MathWorks, chapter 1.
"""

import math
import struct
import zlib

LARGEST = 2**28
"""Bytes of the largest array that is believed: a damaged header can claim any size."""

ORDERS = {b"\x00\x01IM": "<", b"\x01\x00MI": ">"}
"""Byte order by the last four bytes of the header: version 1.0 and a mark."""

HEADER, TAG = 128, 8
INT8, INT32, UINT32, MATRIX, COMPRESSED = 1, 5, 6, 14, 15
VALUES = frozenset({1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 16, 17, 18})
"""Types of elements that hold plain values."""
CELL, STRUCT = 1, 2
ARRAYS = frozenset({4, *range(6, 16)})
"""Classes of matrices that hold text or numbers."""
COMPLEX = 0x0800
DEEPEST = 32
"""Cells and structs inside each other; scipy calls itself for each."""

Element = tuple[int, memoryview]
"""Type and content."""


def check_matlab5(content: bytes) -> None:
    """Raises ValueError unless all matrices of the file are whole: text, numbers, cells and structs of such."""
    order = ORDERS.get(content[124:HEADER])
    if order is None or 0 in content[:4]:
        raise ValueError("it has no header of MATLAB")
    for kind, data in _elements(memoryview(content)[HEADER:], order):
        inner = _elements(memoryview(_inflated(data)), order) if kind == COMPRESSED else [(kind, data)]
        for inner_kind, matrix in inner:
            if inner_kind != MATRIX:
                raise ValueError(f"an element of type {inner_kind} where a matrix belongs")
            _check_matrix(matrix, order, 0)


def _elements(data: memoryview, order: str) -> list[Element]:
    """The elements that lie one after the other in `data`."""
    found, place = [], 0
    while place < len(data):
        if len(data) - place < TAG:
            raise ValueError(f"{len(data) - place} bytes are left over where an element begins")
        kind, size = struct.unpack_from(f"{order}II", data, place)
        if kind >> 16:  # a small element: size and type share a word, and its content lies in the tag
            kind, size, start, following, most = kind & 0xFFFF, kind >> 16, place + 4, place + TAG, 4
        else:
            start = place + TAG
            following = start + (size if kind == COMPRESSED else -(-size // 8) * 8)
            most = len(data) - start
        if size > most or kind not in VALUES | {MATRIX, COMPRESSED}:
            raise ValueError(f"an element of type {kind} and {size} bytes")
        found.append((kind, data[start : start + size]))
        place = following
    return found


def _check_matrix(data: memoryview, order: str, depth: int) -> None:
    """Checks one matrix, which has `depth` others around it; one without content is an empty one."""
    if depth > DEEPEST:
        raise ValueError(f"more than {DEEPEST} cells and structs inside each other")
    if not data:
        return
    (flag_kind, flags), (shape_kind, shape), (name_kind, _), *rest = _elements(data, order)
    if (flag_kind, len(flags), shape_kind, len(shape) % 4, name_kind) != (UINT32, 8, INT32, 0, INT8):
        raise ValueError("a matrix without flags, shape or name")
    (flag,) = struct.unpack_from(f"{order}I", flags)
    sides = struct.unpack(f"{order}{len(shape) // 4}i", shape)
    places = math.prod(sides)
    if len(sides) < 2 or min(sides) < 0 or places > len(data):
        raise ValueError(f"a matrix of shape {sides} in {len(data)} bytes")
    kinds = [kind for kind, _ in rest]
    match flag & 0xFF:
        case kind if kind in ARRAYS:
            whole = len(kinds) == (2 if flag & COMPLEX else 1) and VALUES.issuperset(kinds)
        case kind if kind == CELL:
            whole = kinds == [MATRIX] * places
        case kind if kind == STRUCT:
            whole = kinds == [INT32, INT8] + [MATRIX] * (_fields(rest[:2], order) * places)
        case kind:
            raise ValueError(f"a matrix of class {kind}, which is neither text, numbers, cell nor struct")
    if not whole:
        raise ValueError(f"a matrix of class {kind} and shape {sides} that holds {len(kinds)} elements")
    for inner_kind, inner in rest:
        if inner_kind == MATRIX:
            _check_matrix(inner, order, depth + 1)


def _fields(heads: list[Element], order: str) -> int:
    """How many fields a struct has, from the length of a name and all names."""
    (_, length), (_, names) = heads
    each: int = struct.unpack(f"{order}i", length)[0]
    if each < 1 or len(names) % each:
        raise ValueError(f"names of {each} bytes each in {len(names)} bytes")
    return len(names) // each


def _inflated(data: memoryview) -> bytes:
    stream = zlib.decompressobj()
    inflated = stream.decompress(data, LARGEST)
    if not stream.eof:
        raise ValueError(f"a compressed element that is cut off, or holds more than {LARGEST} bytes")
    return inflated
