"""Validate a MATLAB 5 file before scipy reads it.

scipy looks up element types without a bounds check, trusts the declared number of elements and reads past the end of a
matrix: one flipped bit can crash the process or loop for hours. Format: MAT-File Format, The MathWorks, chapter 1.
"""

import math
import struct
import zlib

MAX_ARRAY_BYTES = 2**28
"""Largest accepted array: a damaged header can declare any size."""

ORDERS = {b"\x00\x01IM": "<", b"\x01\x00MI": ">"}
"""Byte order by the last four bytes of the header: version 1.0 and the endian indicator."""

HEADER, TAG = 128, 8
INT8, INT32, UINT32, MATRIX, COMPRESSED = 1, 5, 6, 14, 15
VALUES = frozenset({1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 16, 17, 18})
"""Types of elements with plain values."""
CELL, STRUCT = 1, 2
ARRAYS = frozenset({4, *range(6, 16)})
"""Classes of matrices of text or numbers."""
COMPLEX = 0x0800
MAX_DEPTH = 32
"""Nesting of cells and structs; scipy recurses into each."""

Element = tuple[int, memoryview]
"""Type and content."""


def check_matlab5(content: bytes) -> None:
    """Raise ValueError unless all matrices of the file are complete text, numbers, cells or structs."""
    order = ORDERS.get(content[124:HEADER])
    if order is None:
        raise ValueError("it has no MATLAB header")
    for kind, data in _elements(memoryview(content)[HEADER:], order):
        inner = _elements(memoryview(_inflated(data)), order) if kind == COMPRESSED else [(kind, data)]
        for inner_kind, matrix in inner:
            if inner_kind != MATRIX:
                raise ValueError(f"an element of type {inner_kind} instead of a matrix")
            _check_matrix(matrix, order, 0)


def _elements(data: memoryview, order: str) -> list[Element]:
    """Split `data` into its consecutive elements."""
    found, position = [], 0
    while position < len(data):
        if len(data) - position < TAG:
            raise ValueError(f"{len(data) - position} trailing bytes where an element should start")
        kind, size = struct.unpack_from(f"{order}II", data, position)
        if kind >> 16:  # small element format: size and type share a word, the data follows inside the tag
            kind, size, start, end, limit = kind & 0xFFFF, kind >> 16, position + 4, position + TAG, 4
        else:
            start = position + TAG
            end = start + (size if kind == COMPRESSED else -(-size // 8) * 8)
            limit = len(data) - start
        if size > limit or kind not in VALUES | {MATRIX, COMPRESSED}:
            raise ValueError(f"an element of type {kind} and {size} bytes")
        found.append((kind, data[start : start + size]))
        position = end
    return found


def _check_matrix(data: memoryview, order: str, depth: int) -> None:
    """Check one matrix at nesting level `depth`; no content is an empty matrix."""
    if depth > MAX_DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} nested cells and structs")
    if not data:
        return
    (flag_kind, flags), (shape_kind, shape), (name_kind, _), *rest = _elements(data, order)
    if (flag_kind, len(flags), shape_kind, len(shape) % 4, name_kind) != (UINT32, 8, INT32, 0, INT8):
        raise ValueError("a matrix without flags, shape or name")
    (flag,) = struct.unpack_from(f"{order}I", flags)
    sides = struct.unpack(f"{order}{len(shape) // 4}i", shape)
    elements = math.prod(sides)
    if len(sides) < 2 or min(sides) < 0 or elements > len(data):
        raise ValueError(f"a matrix of shape {sides} in {len(data)} bytes")
    kinds = [kind for kind, _ in rest]
    match flag & 0xFF:
        case kind if kind in ARRAYS:
            complete = len(kinds) == (2 if flag & COMPLEX else 1) and VALUES.issuperset(kinds)
        case kind if kind == CELL:
            complete = kinds == [MATRIX] * elements
        case kind if kind == STRUCT:
            complete = kinds == [INT32, INT8] + [MATRIX] * (_fields(rest[:2], order) * elements)
        case kind:
            raise ValueError(f"a matrix of class {kind}, which is not text, numbers, cell or struct")
    if not complete:
        raise ValueError(f"a matrix of class {kind} and shape {sides} with {len(kinds)} elements")
    for inner_kind, inner in rest:
        if inner_kind == MATRIX:
            _check_matrix(inner, order, depth + 1)


def _fields(heads: list[Element], order: str) -> int:
    """Count the fields of a struct from its field name length and field names."""
    (_, length), (_, names) = heads
    each: int = struct.unpack(f"{order}i", length)[0]
    if each < 1 or len(names) % each:
        raise ValueError(f"names of {each} bytes each in {len(names)} bytes")
    return len(names) // each


def _inflated(data: memoryview) -> bytes:
    stream = zlib.decompressobj()
    inflated = stream.decompress(data, MAX_ARRAY_BYTES)
    if not stream.eof:
        raise ValueError(f"a compressed element that is truncated or larger than {MAX_ARRAY_BYTES} bytes")
    return inflated
